"""A slot for every token: what servers that pack requests into one row use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs

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
            with pytest.raises(ValueError, match=f"got {tokens} for an input of shape"):
                logits(llama.model, inputs)


@pytest.mark.parametrize("slots", [torch.zeros(3), torch.zeros(1, 3, dtype=torch.int32)], ids=["dtype", "shape"])
def test_other_tensors_are_refused(llama: Scene, slots):
    with pytest.raises(ValueError, match="slots: expected torch.int32"), llama.pool.token_slots(slots):
        pass
    with llama.pool.token_slots() as assign, pytest.raises(ValueError, match="slots: expected torch.int32"):
        assign(slots)


@pytest.mark.parametrize("slot", [-2, "S", 2**31 - 1, -(2**31)])
def test_slots_that_there_are_not_are_refused(llama: Scene, slot):
    number = llama.pool.slab.slots if slot == "S" else slot
    wrong = torch.tensor([0, number, -1], dtype=torch.int32)
    message = rf"slots: expected -1 \(the base model\) to {llama.pool.slab.slots - 1}, got {number}"
    with pytest.raises(ValueError, match=message), llama.pool.token_slots(wrong):
        pass
    with llama.pool.token_slots() as assign:
        with pytest.raises(ValueError, match=message):
            assign(wrong)
        for right in ([-1, llama.pool.slab.slots - 1], []):
            assign(torch.tensor(right, dtype=torch.int32))


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


def test_continuous_batching(llama: Scene, monkeypatch):
    """transformers calls the model with [1, tokens], prompts and single tokens side by side, in a thread of its own."""
    prompts = {
        f"request-{name}": ids.tolist() for name, ids in zip(NAMES, llama.ids(1, 14)[0].split(LENGTHS), strict=True)
    }
    prepare = ContinuousBatchingIOs.prepare_batch_tensors

    def prepare_with_slots(self, requests_in_batch, *args, **kwargs):
        tokens = [slot_of[r.state.request_id] for r in requests_in_batch for _ in range(r.query_length)]
        prepare(self, requests_in_batch, *args, **kwargs)
        assign(torch.tensor(tokens, dtype=torch.int32))

    monkeypatch.setattr(ContinuousBatchingIOs, "prepare_batch_tensors", prepare_with_slots)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    config = ContinuousBatchingConfig(allow_block_sharing=False, num_blocks=16, max_batch_tokens=8)
    found = {}
    with llama.pool.acquire(NAMES) as lease, llama.pool.token_slots() as assign:
        slot_of = dict(zip(prompts, lease.slots, strict=True))
        with llama.model.continuous_batching_context_manager(
            GenerationConfig(**options), continuous_batching_config=config, warmup=False, timeout=10
        ) as manager:
            for request, prompt in prompts.items():
                manager.add_request(prompt, request_id=request)
            while len(found) < len(prompts):
                result = manager.get_result(timeout=30)
                assert result is not None
                if result.is_finished():
                    found[result.request_id] = result.generated_tokens
    for name, (request, prompt) in zip(NAMES, prompts.items(), strict=True):
        expected = llama.alone(name).generate(input_ids=torch.tensor([prompt]), **options)[0, len(prompt) :]
        assert found[request] == expected.tolist()
