"""The rows that a model reads: one tensor, a row a slot, and how an adapter is written into one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import RowLayout, Segment
from .row import AdapterRow

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Of layouts other than the slab's; a store has few.
_MAX_PLANS = 64


class _Plan(NamedTuple):
    """How the numbers of one layout come into a row of the slab."""

    same: bool  # every number has its place already
    scalings: Tensor | None  # fp32 [numbers]; None if all are 1
    places: Tensor  # int64 [numbers], where each goes
    modules: Tensor  # int64 [numbers], the segment of each


class Slab:
    """One row of numbers for each slot, on the device that computes.

    A row holds s·R of every module, rounded once to the slab's dtype. A smaller R lies in the top left corner of its
    page and zeros fill the rest, which is the same adapter as the singular vectors are in order; the pages of a module
    that an adapter has not are zero.

    Args:
        layout: modules in the order of their numbers, each with the largest rank it has room for. Scalings are ignored.
        slots: S, how many adapters fit at once.
        dtype: fp32, fp16 or bf16.
        device: where the rows lie.

    Attributes:
        rows: [S, layout.size], contiguous; zero at first.
        layout: the modules, with scaling 1.

    Raises:
        ValueError: no slots, or another dtype.
    """

    def __init__(
        self,
        layout: RowLayout,
        slots: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots: expected at least 1, got {slots}")
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(map(str, FLOAT_DTYPES))}, got {dtype}")
        self.layout = RowLayout(Segment(key, r) for key, r, _ in layout.segments)
        # An inference tensor could not be written from a thread that is not in inference mode.
        with torch.inference_mode(False):
            self.rows = torch.zeros(slots, self.layout.size, dtype=dtype, device=device)
        self._plans: OrderedDict[bytes, _Plan] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def slots(self) -> int:
        """S."""
        return self.rows.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self.rows.device

    @property
    def nbytes(self) -> int:
        """Memory of the rows."""
        return self.rows.nbytes

    def pages(self, key: str) -> Tensor:
        """The pages of one module, a view [S, r, r] with strides (layout.size, r, 1).

        Raises:
            KeyError: the slab has no such module.
        """
        if key not in self.layout.index:
            raise KeyError(f"the slab has no module {key!r}")
        i = self.layout.index[key]
        r = self.layout.segments[i].r
        return self.rows.narrow(1, self.layout.offsets[i], r * r).unflatten(1, (r, r))

    def write(self, slot: int, row: AdapterRow) -> None:
        """Fill a slot and return when that is done; see `pack` for what is refused."""
        self.write_many([slot], [row])

    def write_many(self, slots: Sequence[int], rows: Iterable[AdapterRow]) -> None:
        """Fill slots, each with one row, through one host buffer and one copy; see `pack` for what is refused.

        Each row is used before the next is asked for.

        Raises:
            ValueError: a slot is not 0 to S - 1, or there are not as many rows as slots.
        """
        for slot in slots:
            if not 0 <= slot < self.slots:
                raise ValueError(f"slots: expected 0 to {self.slots - 1}, got {slot}")
        if self.device.type == "cpu":
            for slot, row in zip(slots, rows, strict=True):
                self.pack(row, self.rows[slot])
            return
        host = torch.empty(len(slots), self.layout.size, dtype=self.dtype)
        for out, row in zip(host, rows, strict=True):
            self.pack(row, out)
        self.rows.index_copy_(0, torch.tensor(slots, device=self.device), host.to(self.device))

    def pack(self, row: AdapterRow, out: Tensor) -> None:
        """Write an adapter as a row of this slab.

        Args:
            row: fp32, fp16, bf16, or int8 with steps; any layout whose modules are among the slab's, of no larger rank.
            out: [layout.size] in the slab's dtype, on the CPU: a slot's row or a staging buffer.

        Raises:
            ValueError: the row does not fit the slab, or its parts do not fit each other, or s·R is beyond the range of
                the dtype; `out` is then as before.
        """
        plan = self._plans.get(row.layout.digest) or self._make_plan(row)
        _check_parts(row)
        numbers = row.numbers.detach()
        exact = out.dtype in (torch.float32, numbers.dtype)
        if exact and plan.same and plan.scalings is None and row.steps is None:
            out.copy_(numbers)
            return
        numbers = numbers.float()
        if row.steps is not None:
            numbers = numbers * row.steps[plan.modules]
        if plan.scalings is not None:
            numbers = numbers * plan.scalings
        numbers = numbers.to(out.dtype)
        if not numbers.isfinite().all():
            raise ValueError(
                f"row: adapter {row.name!r}: expected s·R in the range of {out.dtype}, got NaN or infinity"
            )
        if plan.same:
            out.copy_(numbers)
        else:
            out.zero_()
            out.index_copy_(0, plan.places, numbers)

    def _make_plan(self, row: AdapterRow) -> _Plan:
        layout = row.layout
        self._check_fits(layout, row.name)
        ranks = torch.tensor([r for _, r, _ in layout.segments], dtype=torch.int64)
        positions = [self.layout.index[key] for key, _, _ in layout.segments]
        strides = torch.tensor([self.layout.segments[i].r for i in positions], dtype=torch.int64)
        begins = torch.tensor([self.layout.offsets[i] for i in positions], dtype=torch.int64)
        scalings = torch.tensor([scaling for _, _, scaling in layout.segments], dtype=torch.float32)

        modules = torch.repeat_interleave(ranks * ranks)
        number = torch.arange(layout.size) - torch.tensor(layout.offsets, dtype=torch.int64)[modules]
        r = ranks[modules]
        places = begins[modules] + number // r * strides[modules] + number % r
        plan = _Plan(
            same=layout.size == self.layout.size and bool((places == torch.arange(layout.size)).all()),
            scalings=scalings[modules] if bool((scalings != 1).any()) else None,
            places=places,
            modules=modules,
        )
        with self._lock:
            self._plans[layout.digest] = plan
            if len(self._plans) > _MAX_PLANS:
                self._plans.popitem(last=False)
        return plan

    def _check_fits(self, layout: RowLayout, name: str) -> None:
        unknown = [key for key, _, _ in layout.segments if key not in self.layout.index]
        if unknown:
            raise ValueError(
                f"row: adapter {name!r}: expected modules among the slab's {len(self.layout.segments)}, got "
                f"{len(unknown)} others of {len(layout.segments)}, the first {unknown[0]!r}"
            )
        for key, r, _ in layout.segments:
            room = self.layout.segments[self.layout.index[key]].r
            if r > room:
                raise ValueError(f"row: adapter {name!r}: {key}: expected rank {room} or less, got {r}")


def _check_parts(row: AdapterRow) -> None:
    """Refuse a row whose numbers or steps are not what its layout says."""
    numbers, steps, layout = row.numbers, row.steps, row.layout
    if numbers.shape != (layout.size,):
        raise ValueError(f"row: adapter {row.name!r}: expected {layout.size} numbers, got {tuple(numbers.shape)}")
    if numbers.dtype is torch.int8:
        modules = len(layout.segments)
        if steps is None or steps.shape != (modules,) or steps.dtype is not torch.float32:
            got = "none" if steps is None else f"{steps.dtype} {tuple(steps.shape)}"
            raise ValueError(f"row: adapter {row.name!r}: expected fp32 steps of {modules} modules for int8, got {got}")
    elif numbers.dtype not in FLOAT_DTYPES:
        raise ValueError(f"row: adapter {row.name!r}: expected fp32, fp16, bf16 or int8, got {numbers.dtype}")
    elif steps is not None:
        raise ValueError(f"row: adapter {row.name!r}: expected steps for int8 only, got them for {numbers.dtype}")
