"""Many adapters trained in one batch on a GPU: each is the one trained alone, and a run repeats itself."""

from __future__ import annotations

import pytest
import torch

from loraxs_ext.training.many import ManyAdapters, SlotAdamW, adapter_loss
from python_tests.training.test_many import LR, NAMES, STEPS, batch, many_adapters
from python_tests.training.tiny import save_llama

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


def trained(folder: str, names: tuple[str, ...]) -> ManyAdapters:
    many = many_adapters(folder, names).cuda()
    optimizer = SlotAdamW([many.rows], lr=LR, max_grad_norm=1.0)
    for step, owners in enumerate(STEPS):
        if not {*owners} & {*names}:
            continue
        ids, labels = (part.cuda() for part in batch(step))
        slots = many.slots([owner if owner in names else None for owner in owners]).cuda()
        adapter_loss(many(slots, input_ids=ids).logits, labels, slots, shift=True).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return many


def test_together_is_alone(llama):
    together = trained(llama, NAMES)
    for slot, name in enumerate(NAMES):
        alone = trained(llama, (name,))
        torch.testing.assert_close(together.rows[slot], alone.rows[0], rtol=0, atol=1e-4 * LR * len(STEPS))


def test_a_run_repeats_itself(llama):
    assert torch.equal(trained(llama, NAMES).rows, trained(llama, NAMES).rows)


def test_the_state_stays_where_it_belongs(llama):
    many = trained(llama, NAMES)
    ours = SlotAdamW([many.rows])
    many.rows.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, many.layout.size), many.rows.shape, device="cuda")
    ours.step()
    again = SlotAdamW([many.rows])
    again.load_state_dict(ours.state_dict())
    again.step()
    assert again.own_steps(many.rows).tolist() == [0, 2, 0, 0, 0]
    assert again.state[many.rows]["exp_avg"].is_cuda and not again.own_steps(many.rows).is_cuda
