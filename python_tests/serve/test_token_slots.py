"""A slot for every token: what servers that pack requests into one row use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ..peft.models import logits
from .scenes import NAMES, Scene

LENGTHS = (5, 3, 4, 2)


def packed(scene: Scene) -> dict[str, Tensor]:
    """Prompts of these lengths one after the other in one row, which don't see each other."""
    lengths = torch.tensor(LENGTHS)
    which = torch.repeat_interleave(torch.arange(len(LENGTHS)), lengths)
    places = torch.cat([torch.arange(n) for n in LENGTHS])
    seen = (which[:, None] == which) & (places[:, None] >= places)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return {
        "input_ids": scene.ids(1, int(lengths.sum())),
        "position_ids": places[None],
        "attention_mask": mask[None, None],
    }


def per_token(slots: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.tensor(slots, dtype=torch.int32), torch.tensor(LENGTHS))


def test_packed_requests(llama: Scene):
    inputs = packed(llama)
    parts = inputs["input_ids"].split(LENGTHS, dim=1)
    expected = torch.cat(
        [logits(llama.alone(name), {"input_ids": part}) for name, part in zip(NAMES, parts, strict=True)], dim=1
    )
    with llama.pool.acquire(NAMES) as lease, llama.pool.token_slots(per_token(lease.slots)):
        found = logits(llama.model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_tensor_may_be_replaced_or_overwritten(llama: Scene):
    inputs = packed(llama)
    with llama.pool.acquire(NAMES) as lease, llama.pool.token_slots() as assign:
        tokens = per_token(lease.slots)
        buffer = llama.pool.slot_buffer(len(tokens))
        assert buffer.tolist() == [-1] * len(tokens) and buffer.dtype == torch.int32
        assign(tokens)
        expected = logits(llama.model, inputs)
        assign(buffer)
        base = logits(llama.model, inputs)
        torch.testing.assert_close(base, logits(llama.base, inputs), rtol=1e-5, atol=1e-5)
        buffer.copy_(tokens)
        assert torch.equal(logits(llama.model, inputs), expected)
    assert torch.equal(logits(llama.model, inputs), logits(llama.base, inputs))


def test_another_number_of_tokens_is_refused(llama: Scene):
    inputs = packed(llama)
    for tokens in (1, 7, 13, 28):
        with llama.pool.token_slots(llama.pool.slot_buffer(tokens)):
            if tokens == 1:
                logits(llama.model, inputs)  # one slot for the one row
                continue
            with pytest.raises(ValueError, match=f"got {tokens} names for an input of shape"):
                logits(llama.model, inputs)


@pytest.mark.parametrize("slots", [torch.zeros(3), torch.zeros(1, 3, dtype=torch.int32)], ids=["dtype", "shape"])
def test_other_tensors_are_refused(llama: Scene, slots):
    with pytest.raises(ValueError, match="slots: expected torch.int32"), llama.pool.token_slots(slots):
        pass
    with llama.pool.token_slots() as assign, pytest.raises(ValueError, match="slots: expected torch.int32"):
        assign(slots)


def test_a_compiled_step_sees_what_is_written_into_the_buffer(llama: Scene):
    torch._dynamo.reset()
    inputs = packed(llama)
    compiled = torch.compile(llama.model, backend="eager", fullgraph=True)
    buffer = llama.pool.slot_buffer(sum(LENGTHS))
    with llama.pool.acquire(NAMES) as lease, llama.pool.token_slots(buffer):
        base = logits(compiled, inputs)
        buffer.copy_(per_token(lease.slots))
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = logits(compiled, inputs)
        torch.testing.assert_close(found, logits(llama.model, inputs))
        assert not torch.allclose(found[:, : LENGTHS[0]], base[:, : LENGTHS[0]])
