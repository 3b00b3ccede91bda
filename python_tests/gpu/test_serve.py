"""The pool on a GPU: rows copied from pinned memory, graphs whose slots change, a compiled model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import loraxs_ext
from loraxs_ext.serve import AdapterPool

from ..peft.models import CASES, logits
from ..serve.scenes import NAMES, Scene
from .targets import Replay, same

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
LLAMA = CASES["llama"]


@pytest.fixture
def scene(tmp_path, monkeypatch) -> Iterator[Scene]:
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path / "bases"))
    with Scene(LLAMA) as scene:
        yield scene


@devices
def test_rows_are_served_as_on_the_cpu(scene: Scene, device):
    inputs = LLAMA.inputs(4)
    with loraxs_ext.adapters(scene.model, NAMES):
        expected = logits(scene.model, inputs)
        tokens = scene.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    model, moved = LLAMA.base().to(device), {key: value.to(device) for key, value in inputs.items()}
    with AdapterPool(model, scene.shelf, slots=3), loraxs_ext.adapters(model, NAMES):
        torch.testing.assert_close(logits(model, moved).cpu(), expected, rtol=1e-3, atol=1e-3)
        for cache in (None, "static"):
            found = model.generate(**moved, max_new_tokens=8, do_sample=False, cache_implementation=cache)
            assert torch.equal(found.cpu(), tokens)


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neighbours_change_no_bit(scene: Scene, device, dtype):
    model = LLAMA.base().to(device, dtype)
    inputs = {key: value.to(device) for key, value in LLAMA.inputs(4).items()}
    config = LLAMA.config(r=6, basis_tol=0.3)
    with AdapterPool(model, scene.shelf, slots=3, adapter_config=config):
        found = []
        for other in ("plain", "narrow", None):
            with loraxs_ext.adapters(model, [other, "wide", other, None]):
                found.append(logits(model, inputs))
    for again in found[1:]:
        assert torch.equal(found[0][1], again[1]) and torch.equal(found[0][3], again[3])


@devices
def test_a_slot_is_filled_again_while_the_device_still_computes(scene: Scene, device):
    """Two slots, many adapters, nothing that waits in between: each row must see its own adapter."""
    model = LLAMA.base().to(device)
    inputs = {key: value.to(device) for key, value in LLAMA.inputs(2).items()}
    row, names = scene.shelf.row("wide"), [f"user-{i}" for i in range(8)]
    for i, name in enumerate(names):
        scene.shelf.put(name, row._replace(numbers=row.numbers * (0.2 + 0.1 * i)))
    found = []
    with AdapterPool(model, scene.shelf, slots=2):
        for pair in zip(names, names[1:] + names[:1], strict=True):
            with loraxs_ext.adapters(model, list(pair)):
                found.append(logits(model, inputs))
        for pair, seen in zip(zip(names, names[1:] + names[:1], strict=True), found, strict=True):
            with loraxs_ext.adapters(model, list(pair)):
                again = logits(model, inputs)
            assert torch.equal(seen, again)
    assert len({tuple(seen.flatten().tolist()) for seen in found}) == len(names)


@devices
def test_replay_with_other_adapters_than_captured(scene: Scene, device):
    model = LLAMA.base().to(device)
    ids = LLAMA.inputs(4)["input_ids"][:, :1].to(device)
    with AdapterPool(model, scene.shelf, slots=3) as pool, pool.acquire(NAMES) as lease:
        slots = torch.tensor(lease.slots, dtype=torch.int32, device=device)
        buffer = pool.slot_buffer(4)
        with pool.token_slots(buffer):
            replay = Replay(lambda: (logits(model, {"input_ids": ids, "use_cache": False}),), device)
            for pattern in (slots, slots.flip(0), torch.full_like(slots, -1), slots[:1].expand(4)):
                buffer.copy_(pattern)
                found = replay()
                assert same(found, (logits(model, {"input_ids": ids, "use_cache": False}),))


@pytest.mark.gpu
def test_compiled_with_graphs(scene: Scene):
    torch._dynamo.reset()
    model = LLAMA.base().cuda()
    inputs = {"input_ids": LLAMA.inputs(4)["input_ids"][:, :1].cuda(), "use_cache": False}
    compiled = torch.compile(model, mode="reduce-overhead")
    with AdapterPool(model, scene.shelf, slots=3) as pool, pool.acquire(NAMES) as lease:
        buffer = pool.slot_buffer(4)
        with pool.token_slots(buffer):
            for _ in range(3):
                logits(compiled, inputs)
            with torch._dynamo.config.patch(error_on_recompile=True):
                for slots in (lease.slots, lease.slots[::-1], [-1] * 4):
                    buffer.copy_(torch.tensor(slots, dtype=torch.int32))
                    found = logits(compiled, inputs).clone()
                    torch.testing.assert_close(found, logits(model, inputs), rtol=1e-3, atol=1e-3)
