"""SlotAdamW is torch's AdamW for every row, and rests where there is no gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loraxs_ext.training.many import SlotAdamW

S, SIZE = 7, 53


def sparse(slots: list[int], values: torch.Tensor) -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([slots]), values, (S, SIZE), check_invariants=True)


def gradients(steps: int, seed: int = 0):
    """(slots, values) of some of the rows in each step, of very different lengths."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        slots = torch.randperm(S, generator=draw)[: int(torch.randint(1, S, (), generator=draw))].sort().values.tolist()
        size = 10.0 ** torch.randint(-6, 3, (len(slots), 1), generator=draw)
        yield slots, size * torch.randn(len(slots), SIZE, generator=draw)


def linear(total: int):
    return lambda slot, step: max(0.0, 1.0 - step / (total + slot))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_every_row_is_torchs_adamw_bit_for_bit(foreach, dtype, weight_decay):
    options = {"lr": 3e-3, "betas": (0.85, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    table = nn.Parameter(torch.randn(S, SIZE, generator=torch.Generator().manual_seed(1), dtype=dtype))
    alone = [nn.Parameter(table[i].detach().clone()) for i in range(S)]
    ours = SlotAdamW([table], schedule=linear(30), **options)
    theirs = [torch.optim.AdamW([row], foreach=foreach, **options) for row in alone]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, slot=slot: linear(30)(slot, step))
        for slot, optimizer in enumerate(theirs)
    ]
    for slots, values in gradients(40):
        table.grad = sparse(slots, values.to(dtype))
        ours.step()
        for slot, value in zip(slots, values.to(dtype), strict=True):
            alone[slot].grad = value
            theirs[slot].step()
            schedules[slot].step()
        assert torch.equal(table, torch.stack(list(alone)))
    assert ours.own_steps(table).tolist() == [int(theirs[i].state[alone[i]]["step"]) for i in range(S)]


def test_rows_without_a_gradient_rest():
    table = nn.Parameter(torch.ones(S, SIZE))
    optimizer = SlotAdamW([table], weight_decay=0.5)
    for slots in ([1, 3], [3]):
        table.grad = sparse(slots, torch.ones(len(slots), SIZE))
        optimizer.step()
    moved = (table != 1).any(1).tolist()
    assert moved == [False, True, False, True, False, False, False]
    state = optimizer.state[table]
    assert state["exp_avg"].any(1).tolist() == state["exp_avg_sq"].any(1).tolist() == moved
    assert state["step"].tolist() == [0, 1, 0, 2, 0, 0, 0]
    table.grad = None
    optimizer.step()
    table.grad = sparse([], torch.zeros(0, SIZE))
    optimizer.step()
    assert state["step"].tolist() == [0, 1, 0, 2, 0, 0, 0]


def test_accumulated_gradients_are_summed_in_their_order():
    table, summed = (nn.Parameter(torch.zeros(S, SIZE)) for _ in range(2))
    values = torch.randn(3, 2, SIZE) * torch.tensor([1.0, 1e6, 1e-3])[:, None, None]
    table.grad = sparse([1, 4], values[0]) + sparse([4, 5], values[1]) + sparse([0, 4], values[2])
    fourth = (values[0, 1] + values[1, 0]) + values[2, 1]
    summed.grad = sparse([0, 1, 4, 5], torch.stack([values[2, 0], values[0, 0], fourth, values[1, 1]]))
    for rows in (table, summed):
        SlotAdamW([rows]).step()
    assert torch.equal(table, summed) and table[4].any()


def test_each_row_is_clipped_by_itself():
    clipped, free = (nn.Parameter(torch.zeros(S, SIZE)) for _ in range(2))
    values = torch.randn(3, SIZE)
    values *= torch.tensor([[0.5], [2.0], [100.0]]) / values.norm(dim=1, keepdim=True)
    optimizers = SlotAdamW([clipped], max_grad_norm=1.0), SlotAdamW([free])
    clipped.grad, free.grad = sparse([0, 2, 6], values), sparse([0, 2, 6], values)
    for optimizer in optimizers:
        optimizer.step()
    first, second = (o.state[p]["exp_avg"][[0, 2, 6]].norm(dim=1) for o, p in zip(optimizers, (clipped, free)))  # noqa: B905
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[1:] / second[1:], torch.tensor([0.5, 0.01]), rtol=1e-4, atol=0)
    row = nn.Parameter(torch.zeros(SIZE))
    row.grad = values[2].clone()
    torch.nn.utils.clip_grad_norm_([row], 1.0)
    torch.testing.assert_close(optimizers[0].state[clipped]["exp_avg"][6], 0.1 * row.grad)


def test_the_state_is_saved_and_goes_on(tmp_path):
    tables = [nn.Parameter(torch.ones(S, SIZE)) for _ in range(2)]
    whole = SlotAdamW([tables[0]], lr=1e-2)
    broken = SlotAdamW([tables[1]], lr=1e-2)
    for count, (slots, values) in enumerate(gradients(10)):
        if count == 5:
            torch.save(broken.state_dict(), tmp_path / "optimizer.pt")
            broken = SlotAdamW([tables[1]], lr=1.0)
            broken.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
        for table, optimizer in zip(tables, (whole, broken), strict=True):
            table.grad = sparse(slots, values)
            optimizer.step()
    assert torch.equal(*tables) and torch.equal(whole.own_steps(tables[0]), broken.own_steps(tables[1]))


def test_what_does_not_fit_is_refused():
    table = nn.Parameter(torch.ones(S, SIZE))
    table.grad = torch.ones(S, SIZE)
    with pytest.raises(ValueError, match="expected a sparse gradient"):
        SlotAdamW([table]).step()
    for options, message in (
        ({"lr": -1.0}, "lr: expected"),
        ({"betas": (0.9, 1.0)}, "betas: expected"),
        ({"weight_decay": -0.1}, "weight_decay: expected"),
        ({"max_grad_norm": 0.0}, "max_grad_norm: expected a positive"),
    ):
        with pytest.raises(ValueError, match=message):
            SlotAdamW([table], **options)
