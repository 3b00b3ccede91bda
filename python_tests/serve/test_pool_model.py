"""A model with a pool that is saved, copied or converted, and contexts that are left in another order."""

from __future__ import annotations

import asyncio

import pytest
import torch
from safetensors.torch import load_file

import loraxs_ext
from loraxs_ext.serve import AdapterPool
from loraxs_ext.serve.pool import pool_of

from ..copies import COPIERS
from ..peft.models import CASES, logits
from .scenes import NAMES, Scene

INPUTS = CASES["llama"].inputs(len(NAMES))


def served(model, names=NAMES):
    with loraxs_ext.adapters(model, names):
        return logits(model, INPUTS)


def error(found, wanted) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def test_it_is_saved_as_if_it_had_no_pool(scene: Scene, tmp_path):
    """The same names and numbers, and they load into a model without a pool."""
    scene.model.save_pretrained(tmp_path / "pool")
    scene.base.save_pretrained(tmp_path / "base")
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("pool", "base"))
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert scene.model.state_dict().keys() == scene.base.state_dict().keys()
    again = type(scene.base).from_pretrained(tmp_path / "pool").eval()
    inputs = scene.case.inputs()
    assert torch.equal(logits(again, inputs), logits(scene.base, inputs))
    scene.pool.close()
    assert scene.model.state_dict().keys() == scene.base.state_dict().keys()


def test_a_peft_model_is_saved_without_its_pool(llama: Scene, tmp_path):
    before = llama.oracle.state_dict()
    with AdapterPool(llama.oracle, llama.shelf):
        assert llama.oracle.state_dict().keys() == before.keys()
        llama.oracle.save_pretrained(tmp_path)
        found = load_file(tmp_path / "wide" / "adapter_model.safetensors")
        assert found and not any("pool" in name for name in found)


@pytest.mark.parametrize("copier", COPIERS)
def test_a_copy_is_the_base_model(llama: Scene, copier):
    twin = copier(llama.model)
    assert torch.equal(logits(twin, INPUTS), logits(llama.base, INPUTS))
    assert pool_of(twin) is None and twin.state_dict().keys() == llama.base.state_dict().keys()
    with pytest.raises(ValueError, match="non-existing adapter"), loraxs_ext.adapters(twin, NAMES):
        pass
    assert torch.equal(served(llama.model), served(llama.model))


@pytest.mark.parametrize("copier", COPIERS)
def test_a_copy_from_inside_of_a_context_is_refused(llama: Scene, copier):
    """With a pool, and in a PEFT model without one."""
    for model in (llama.model, llama.oracle):
        with loraxs_ext.adapters(model, NAMES):
            with pytest.raises(RuntimeError, match="^model: expected to be copied or saved outside of adapters()"):
                copier(model)
        assert torch.equal(served(copier(llama.oracle)), served(llama.oracle))


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float16, 0.01), (torch.bfloat16, 0.05), (torch.float64, 1e-5)], ids=str
)
def test_another_precision(llama: Scene, dtype, bound):
    mixed = served(llama.model)
    llama.model.to(dtype)
    assert error(served(llama.model), mixed) < bound < 0.1 * error(logits(llama.base, INPUTS), mixed)


def test_disabled_adapters_are_not_mixed(llama: Scene):
    """disable_adapter() inside a context is the base model for its time; a context inside of it is refused."""
    base, message = logits(llama.base, INPUTS), "neither merged nor disabled|not disabled"
    for enter in (lambda: AdapterPool(llama.oracle, llama.shelf), lambda: torch.no_grad()):
        with enter():
            mixed = served(llama.oracle)
            with loraxs_ext.adapters(llama.oracle, NAMES):
                with llama.oracle.disable_adapter():
                    assert torch.equal(logits(llama.oracle, INPUTS), base)
                assert torch.equal(logits(llama.oracle, INPUTS), mixed)
            with llama.oracle.disable_adapter(), pytest.raises(ValueError, match=message):
                served(llama.oracle)


def check_free(scene: Scene) -> None:
    assert torch.equal(logits(scene.model, INPUTS), logits(scene.base, INPUTS))
    assert scene.pool.stats()["in_use"] == 0 and "generate" not in vars(scene.model)
    scene.pool.close()


def test_contexts_that_are_left_in_another_order(llama: Scene):
    """As by two generators that take turns: the inner one goes on as it was, and nothing stays behind."""
    other = ["wide"] * len(NAMES)
    expected = served(llama.model, other)

    def work(names):
        with loraxs_ext.adapters(llama.model, names):
            while True:
                yield logits(llama.model, INPUTS)

    outer, inner = work(NAMES), work(other)
    next(outer)
    next(inner)
    with pytest.raises(RuntimeError, match="expected the innermost context to be left first"):
        outer.close()
    assert torch.equal(next(inner), expected)
    llama.model.generate(INPUTS["input_ids"], max_new_tokens=2)
    inner.close()
    check_free(llama)


def test_two_tasks_of_one_thread(llama: Scene):
    """The second is refused, because each would be served with the adapters of the other."""
    mixed = served(llama.model)

    async def work(names):
        with loraxs_ext.adapters(llama.model, names):
            await asyncio.sleep(0)
            return logits(llama.model, INPUTS)

    async def both():
        return await asyncio.gather(work(NAMES), work(["wide"] * len(NAMES)), return_exceptions=True)

    first, second = asyncio.run(both())
    assert torch.equal(first, mixed)
    assert isinstance(second, RuntimeError) and "another task" in str(second)
    with loraxs_ext.adapters(llama.model, NAMES):
        # A loop that runs inside a context is nested in it.
        asyncio.run(work(["wide"] * len(NAMES)))
    check_free(llama)


def test_what_fails_in_the_model_ends_the_context(llama: Scene):
    with pytest.raises(IndexError), loraxs_ext.adapters(llama.model, NAMES):
        llama.model(input_ids=torch.full((len(NAMES), 3), 10**6))
    check_free(llama)
