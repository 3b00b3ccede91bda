"""Batches that mix adapters, and the loss of one."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from loraxs_ext.training.many import AdapterBatches, SlotCollator, adapter_loss

# 7 rows of a, 3 of b, 2 of c, 1 of d.
ADAPTERS = [*"abacabadaabca"]


def owners(batch: list[int]) -> Counter[str]:
    return Counter(ADAPTERS[row] for row in batch)


def test_every_row_comes_once_and_batches_are_full():
    batches = AdapterBatches(ADAPTERS, rows_per_adapter=2, adapters_per_batch=2)
    epoch = list(batches)
    assert sorted(row for batch in epoch for row in batch) == list(range(len(ADAPTERS)))
    assert len(epoch) == len(batches) == 4
    assert all(len(owners(batch)) == 2 and max(owners(batch).values()) <= 2 for batch in epoch)
    batches.set_epoch(1)
    again = list(batches)
    assert again != epoch and [owners(b) for b in again] == [owners(b) for b in epoch]
    batches.set_epoch(0)
    assert list(batches) == epoch


def test_all_adapters_take_the_same_number_of_rows():
    batches = AdapterBatches(ADAPTERS, rows_per_adapter=2, adapters_per_batch=3, rows_per_epoch=5)
    epoch = list(batches)
    assert sum((owners(batch) for batch in epoch), Counter()) == dict.fromkeys("abcd", 5)
    rows = Counter(row for batch in epoch for row in batch)
    assert rows[ADAPTERS.index("d")] == 5
    # Around the data: no row comes again before all have come.
    assert {rows[row] for row, name in enumerate(ADAPTERS) if name == "b"} == {1, 2}


def test_what_an_adapter_meets_does_not_depend_on_the_others():
    def of_a(adapters: list[str], per_batch: int) -> list[list[int]]:
        own = [i for i, name in enumerate(adapters) if name == "a"]
        batches = AdapterBatches(adapters, 2, per_batch, seed=3)
        batches.set_epoch(4)
        return [part for part in ([own.index(row) for row in b if adapters[row] == "a"] for b in batches) if part]

    alone = of_a(["a"] * ADAPTERS.count("a"), 1)
    assert alone == of_a(ADAPTERS, 2) == of_a(ADAPTERS, 4) and len(alone) == 4


def test_own_steps_are_counted_ahead():
    batches = AdapterBatches(ADAPTERS, rows_per_adapter=1, adapters_per_batch=2)
    for accumulate in (1, 2, 3):
        made: Counter[str] = Counter()
        steps = 0
        for epoch in range(2):
            batches.set_epoch(epoch)
            epoch_batches = list(batches)
            for start in range(0, len(epoch_batches), accumulate):
                made.update({ADAPTERS[row] for batch in epoch_batches[start : start + accumulate] for row in batch})
                steps += 1
                assert batches.own_steps(steps, accumulate) == {name: made[name] for name in "abcd"}


def test_a_batch_has_a_slot_for_every_row():
    collate = SlotCollator({"a": 0, "b": 1}, lambda rows: {"x": torch.tensor([row["x"] for row in rows])}, column="who")
    batch = collate([{"x": 3, "who": "b"}, {"x": 4, "who": 0}])
    assert batch["slots"].tolist() == [1, 0] and batch["x"].tolist() == [3, 4] and batch.keys() == {"x", "slots"}
    for unknown in ("c", 2, -1):
        with pytest.raises(ValueError, match=f"who: expected one of 2 adapters or its slot, got {unknown!r}"):
            collate([{"x": 1, "who": unknown}])


def test_numbers_that_do_not_fit_are_refused():
    for options, message in (
        ({"rows_per_adapter": 0}, "rows_per_adapter"),
        ({"adapters_per_batch": -1}, "adapters_per_batch"),
        ({"rows_per_epoch": -1}, "rows_per_epoch"),
    ):
        with pytest.raises(ValueError, match=f"{message}: expected a positive"):
            AdapterBatches(ADAPTERS, **{"rows_per_adapter": 1, "adapters_per_batch": 1, **options})
    with pytest.raises(ValueError, match="at least one row"):
        AdapterBatches([], 1, 1)


@pytest.mark.parametrize("kind", ["tokens", "classes", "values"])
def test_the_loss_is_the_sum_of_the_means(kind):
    torch.manual_seed(0)
    slots = torch.tensor([4, 0, -1, 4, 2, 0])
    logits = torch.randn(6, 5, 3) if kind == "tokens" else torch.randn(6, 3 if kind == "classes" else 1)
    labels = torch.randint(3, logits.shape[:-1])
    if kind == "tokens":
        labels[:, :2] = labels[3, 2:4] = -100
    if kind == "values":
        labels = torch.randn(6)

    def mean(rows: list[int]) -> torch.Tensor:
        if kind == "values":
            return F.mse_loss(logits[rows, 0], labels[rows])
        if kind == "classes":
            return F.cross_entropy(logits[rows], labels[rows])
        return F.cross_entropy(logits[rows, :-1].flatten(0, 1), labels[rows, 1:].flatten())

    loss = adapter_loss(logits, labels, slots, shift=kind == "tokens")
    expected = mean([0, 3]) + mean([1, 5]) + mean([4])
    torch.testing.assert_close(loss.total, expected)
    assert loss.items.tolist() == ([3, 3, 3, 1, 3, 3] if kind == "tokens" else [1] * 6)
    # In two parts, whose gradients are accumulated.
    items = torch.tensor([2, 0, 1, 0, 2]) if kind != "tokens" else torch.tensor([6, 0, 3, 0, 4])
    parts = [
        adapter_loss(logits[part], labels[part], slots[part], shift=kind == "tokens", items=items).total
        for part in (slice(0, 3), slice(3, 6))
    ]
    torch.testing.assert_close(sum(parts), expected)


def test_rows_of_nobody_get_no_gradient():
    logits = torch.randn(3, 2, requires_grad=True)
    adapter_loss(logits, torch.tensor([0, 1, 1]), torch.tensor([0, -1, 0])).total.backward()
    assert logits.grad is not None and logits.grad.any(1).tolist() == [True, False, True]
