"""TinyLoRA: R = Σ_k v_k P_k with fixed random P_k, and a v that layers may share, down to one number in all."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .core import Core, InitWeights, seeded_generator
from .sharding import complete


class TinyOptions(NamedTuple):
    """How an adapter makes R in one layer.

    Attributes:
        u: length of v.
        seed: of the projections of this layer: the adapter's seed plus the index of the layer.
        init_bound: v ~ U(−init_bound, init_bound) at the start for `init_weights="uniform"`.
        keep_projections: store the projections with the adapter.
    """

    u: int
    seed: int
    init_bound: float
    keep_projections: bool


class TinyCore(Core):
    """R = Σ_k v_k P_k, where v [u] is trained and P [u, r, r] is fixed.

    In a state dict it is `loraxs_R.<adapter>.v`, in the first layer of a group that shares it and nowhere else, and in
    every layer `.seed`, from which P is drawn again, or `.projections`, P itself, where that is kept.

    P belongs to the basis that was recorded first, for ever: neither P nor the sketch can move, because the one follows
    from the seed and v is shared with layers whose bases moved otherwise. What stands on the basis of the layer is
    `placed` [u, r, r], P with the signs and rotations that lead there, which no state dict holds.

    Args:
        v: [u], initial value; dropped when the core joins the group of another.
        rank: r.
        seed: of the projections.
        basis_shape: (K, N) to keep the basis with the adapter, None to keep its sketch only.
        keep_projections: store P.

    Source: "Learning to Reason in 13 Parameters" (arXiv:2602.04118), in the conventions of PEFT.
    """

    identity = (*Core.identity, "seed", "projections")

    def __init__(
        self,
        v: Tensor,
        rank: int,
        seed: int,
        basis_shape: tuple[int, int] | None = None,
        keep_projections: bool = False,
    ) -> None:
        super().__init__(rank, basis_shape, v.dtype)
        self.u = v.shape[0]
        self.v: nn.Parameter | None = nn.Parameter(v)
        # In a tuple, so that it is not registered, and saved, as a part of this layer.
        self._owner: tuple[TinyCore, ...] = ()
        self.seed: Tensor
        self.placed: Tensor
        self.projections: Tensor | None
        self.register_buffer("seed", torch.tensor(seed, device="cpu"))
        self.register_buffer("projections", self._draw() if keep_projections else None)
        self.register_buffer("placed", self.on_basis.to(v.dtype, copy=True), persistent=False)

    @property
    def vector(self) -> Tensor:
        """v [u], wherever it lives."""
        owner = self._owner[0] if self._owner else self
        v = owner._parameters["v"]
        assert v is not None
        return v

    def join(self, owner: TinyCore) -> None:
        """Use the v of `owner` from now on."""
        self._owner, self.v = (owner,), None

    def matrix(self) -> Tensor:
        """R [r, r] in the dtype of the projections, differentiable in v."""
        placed = self.placed
        kind = placed.device.type
        # Autocast would round v; leaving it costs as much as the product, so it is left only where it is on.
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            vector = complete(self.vector)
            if len(vector) != self.u:
                raise RuntimeError(
                    f"weight_tying: expected the {self.u} numbers of v, got {len(vector)}: FSDP1 has divided v, which "
                    f"another block owns; use FSDP2, or weight_tying=0"
                )
            return (vector.to(placed.device, placed.dtype) @ placed.flatten(1)).view(placed.shape[1:])

    @property
    def on_basis(self) -> Tensor:
        """P [u, r, r]."""
        return self._draw() if self.projections is None else self.projections

    def place(self, moved: Tensor) -> None:
        """`placed` = `moved` [u, r, r]."""
        self.placed = moved.to(self.placed.device, self.placed.dtype, copy=True)

    @property
    def device(self) -> torch.device:
        """That of v."""
        return self.vector.device

    def record(self, sketch: Tensor, a: Tensor, bt: Tensor) -> None:
        """Note which basis P belongs to, the first time; P is placed on every other one."""
        if self.stored_basis is None and self.recorded_sketch.isnan().any():
            super().record(sketch, a, bt)
        self.settled = True

    def _draw(self) -> Tensor:
        return draw_projections(self.u, self.rank, int(self.seed))

    def _apply(self, fn: Any, recurse: bool = True) -> TinyCore:
        def keep_precision(tensor: Tensor) -> Tensor:
            # A few numbers steer a whole model: half precision would save nothing and lose three digits.
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.is_floating_point() and moved.itemsize < 4 else moved

        super()._apply(keep_precision, recurse)
        return self


def draw_projections(u: int, rank: int, seed: int) -> Tensor:
    """P [u, r, r] ~ N(0, 1/r) in fp32, the numbers that PEFT's TinyLoRA draws from the same seed."""
    generator = torch.Generator().manual_seed(seed)
    size = (u, rank, rank)
    return torch.normal(0.0, 1.0 / rank**0.5, size, generator=generator, dtype=torch.float32, device="cpu")


def initial_vector(options: TinyOptions, init: InitWeights, *, seed: int, key: str, dtype: torch.dtype) -> Tensor:
    """v [u] before training, a function of its arguments alone.

    Args:
        options: length and bound.
        init: True or "zeros" for 0, which leaves the model as it is; "uniform"; False for a random vector of length 1,
            which clearly changes it, for tests.
        seed: seed of the configuration.
        key: name of the module.
        dtype: of the result.
    """
    v = torch.zeros(options.u, dtype=torch.float32, device="cpu")
    generator = seeded_generator(seed, key)
    if init == "uniform":
        v.uniform_(-options.init_bound, options.init_bound, generator=generator)
    elif init is False:
        v.normal_(generator=generator)
        v /= v.norm()
    return v.to(dtype)


def group_of(index: int, count: int, weight_tying: float) -> int:
    """The group whose v the layer `index` of `count` uses: groups are contiguous, the last takes the remainder.

    Args:
        weight_tying: 0 for a v per layer, 1 for a single one, values in between for fewer and fewer groups.
    """
    groups = max(1, round(count * (1.0 - weight_tying)))
    return min(index // (count // groups), groups - 1)


def tie(cores: Sequence[TinyCore], weight_tying: float) -> None:
    """Make the cores of an adapter, in the order of the model, share their v within each group."""
    owners: dict[int, TinyCore] = {}
    for index, core in enumerate(cores):
        owner = owners.setdefault(group_of(index, len(cores), weight_tying), core)
        if owner is not core:
            core.join(owner)
