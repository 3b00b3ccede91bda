"""AdamW over the rows of a table, where each row has its own step count and only the rows of the batch are touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Own step of an adapter, counted from 0 → factor on the learning rate.
Schedule = Callable[[int, int], float]


class SlotAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` for every row by itself, as if it were trained alone; a row without a gradient rests.

    On the CPU the numbers are those of `torch.optim.AdamW` bit for bit. On a GPU, which fuses products and sums as it
    likes, they are equal to rounding. Clipping, where it acts, sums the squares of a row in another order than
    `torch.nn.utils.clip_grad_norm_` those of several tensors.

    Args:
        params: tensors [S, size]; their gradients are sparse, or None.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        max_grad_norm: longest gradient of a row; None to leave them as they are.
        schedule: (slot, own step from 0) → factor on `lr`.

    Raises:
        ValueError: a number is out of range, or a gradient is not sparse.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_grad_norm: float | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            if not 0.0 <= value:
                raise ValueError(f"{name}: expected a number of at least 0, got {value}")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
        if max_grad_norm is not None and not max_grad_norm > 0.0:
            raise ValueError(f"max_grad_norm: expected a positive number or None, got {max_grad_norm}")
        self.max_grad_norm, self.schedule = max_grad_norm, schedule
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every row that has a gradient; `closure` as in every optimiser of torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for rows in group["params"]:
                if rows.grad is not None:
                    self._step(rows, group)
        return loss

    def own_steps(self, rows: nn.Parameter) -> Tensor:
        """int64 [S]: how many steps each row has made."""
        return self._state_of(rows)["step"]

    def _step(self, rows: nn.Parameter, group: dict[str, Any]) -> None:
        active, grad = active_rows(rows)
        if not len(active):
            return
        if self.max_grad_norm is not None:
            norms = grad.norm(dim=1, keepdim=True)
            grad = grad * (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        state = self._state_of(rows)
        slots = active.cpu()
        state["step"][slots] += 1
        decay, step_size, correction = self._scalars(slots.tolist(), state["step"][slots].tolist(), group, rows)
        row = rows.index_select(0, active)
        if group["weight_decay"]:
            row.mul_(decay)
        beta1, beta2 = group["betas"]
        first, second = (state[name].index_select(0, active) for name in ("exp_avg", "exp_avg_sq"))
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        row.sub_((first * step_size).div_(second.sqrt().div_(correction).add_(group["eps"])))
        for table, values in ((rows, row), (state["exp_avg"], first), (state["exp_avg_sq"], second)):
            table.index_copy_(0, active, values)

    def _scalars(
        self, slots: list[int], steps: list[int], group: dict[str, Any], rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[A, 1] each: what AdamW multiplies and divides a row by, in Python's numbers as torch computes it."""
        beta1, beta2 = group["betas"]
        factor = self.schedule or (lambda slot, step: 1.0)
        lrs = [group["lr"] * factor(slot, step - 1) for slot, step in zip(slots, steps, strict=True)]
        columns = (
            [1 - lr * group["weight_decay"] for lr in lrs],
            [lr / (1 - beta1**step) for lr, step in zip(lrs, steps, strict=True)],
            [(1 - beta2**step) ** 0.5 for step in steps],
        )
        return tuple(torch.tensor(c, dtype=rows.dtype, device=rows.device)[:, None] for c in columns)  # type: ignore[return-value]

    def _state_of(self, rows: nn.Parameter) -> dict[str, Any]:
        state = self.state[rows]
        if not state:
            state["step"] = torch.zeros(len(rows), dtype=torch.int64)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(rows), torch.zeros_like(rows)
        elif state["step"].device.type != "cpu":
            # A loaded state comes to the device of the rows as a whole.
            state["step"] = state["step"].cpu()
        return state


def active_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The slots [A] that have a gradient, in ascending order, and the gradient [A, size].

    Several backward passes are summed in their order.

    Raises:
        ValueError: the gradient is dense.
    """
    grad = rows.grad
    if grad is None or not grad.is_sparse:
        raise ValueError("rows: expected a sparse gradient, as ManyAdapters gives it, got a dense one")
    found, values = grad._indices()[0], grad._values()
    active, place = found.unique(return_inverse=True)
    if not torch.equal(active, found):
        # A fixed order of sums on every device, unlike index_add_.
        values = values.new_zeros(len(active), values.shape[1]).index_put_((place,), values, accumulate=True)
    return active, values
