"""AdapterPool: into a model and out again, on the right basis or not at all; slots, versions and threads."""

from __future__ import annotations

import copy
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn

import loraxs_ext
from loraxs_ext.layers import LoraXSLayer
from loraxs_ext.peft import LoraXSConfig
from loraxs_ext.serve import AdapterPool
from loraxs_ext.serve.placing import POOL

from ..peft.models import CASES, layers_of, logits
from .scenes import NAMES, Scene
from .sources import Shelf, row_of, shelf_of

LLAMA = CASES["llama"]


def serve(model, names, inputs):
    with loraxs_ext.adapters(model, names):
        return logits(model, inputs)


def close(found, wanted):
    # Bases that were computed for other ranks differ in their last digits.
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def expected(scene: Scene, names, inputs):
    return torch.cat(
        [logits(scene.alone(name), {"input_ids": inputs["input_ids"][i : i + 1]}) for i, name in enumerate(names)]
    )


def test_weights_are_shared_and_nothing_is_trainable():
    model = LLAMA.base()
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    scene = Scene(LLAMA)
    with AdapterPool(model, scene.shelf, slots=2) as pool:
        now = {name.replace(".base_layer", ""): (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
        assert before.items() <= now.items()
        assert not any(p.requires_grad for layer in pool.layers for p in layer.loraxs_R.parameters())
        assert [layer.key for layer in pool.layers] == [layer.key for layer in layers_of(model)]
        pages = pool.slab.pages(pool.layers[0].key)
        assert pages.untyped_storage().data_ptr() == pool.slab.rows.untyped_storage().data_ptr()
    assert {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()} == before
    assert str(model) == str(LLAMA.base()) and not any("loraxs" in name for name in vars(model))
    with pytest.raises(RuntimeError, match="detached"), pool.adapters(["wide"]):
        pass
    with pytest.raises(RuntimeError, match="closed"):
        pool.acquire(["wide"])


def test_a_copy_of_the_model_has_no_pool(llama: Scene):
    twin, inputs = copy.deepcopy(llama.model), LLAMA.inputs()
    assert torch.equal(logits(twin, inputs), logits(llama.base, inputs))
    with pytest.raises(ValueError, match="non-existing adapter"), loraxs_ext.adapters(twin, ["wide"]):
        pass


def test_one_pool_at_a_time(llama: Scene):
    with pytest.raises(ValueError, match="has a pool"):
        AdapterPool(llama.model, llama.shelf)
    llama.pool.close()
    with AdapterPool(llama.model, llama.shelf), pytest.raises(RuntimeError, match="call inside"):
        with loraxs_ext.adapters(llama.model, ["wide"]):
            loraxs_ext.serve.pool.pool_of(llama.model).detach()


def test_closing_an_old_pool_leaves_the_new_one_alone(llama: Scene):
    llama.pool.detach()
    with AdapterPool(llama.model, llama.shelf) as pool:
        llama.pool.close()
        assert loraxs_ext.serve.pool.pool_of(llama.model) is pool
    assert loraxs_ext.serve.pool.pool_of(llama.model) is None


def test_who_waited_for_a_pool_that_was_taken_out_is_not_served_with_the_base_model(llama: Scene):
    inside, told = threading.Event(), []

    def second() -> None:
        inside.set()
        try:
            with llama.pool.token_slots(timeout=30):
                told.append("served")
        except RuntimeError as error:
            told.append(str(error))

    thread = threading.Thread(target=second)
    with llama.pool._turn:
        thread.start()
        assert inside.wait(10)
        time.sleep(0.1)
        llama.pool.detach()
    thread.join(30)
    assert len(told) == 1 and "was detached" in told[0]


def test_inference_mode(llama: Scene):
    """It belongs to a thread: what one makes in it, others could not write into."""
    inputs = LLAMA.inputs(2)
    wanted = serve(llama.model, ["plain", "wide"], inputs)
    with torch.inference_mode():
        model = LLAMA.base()
        pool = AdapterPool(model, llama.shelf, slots=3)
        assert pool.prefetch(["plain", "wide"]) == 2
        found = serve(model, ["plain", "wide"], inputs)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(serve(model, ["narrow", "wide"], inputs)[1], wanted[1])
    pool.close()


@pytest.mark.parametrize("rank", [None, 9, 100], ids=["of the source", "wider", "cut"])
def test_ranks_are_padded(rank):
    with Scene(LLAMA, rank=rank) as scene:
        layer = scene.pool.layers[0]
        room = {None: 6, 9: 9, 100: min(layer.in_features, layer.out_features)}[rank]
        assert scene.pool.slab.pages(layer.key).shape[1:] == (room, room)
        inputs = LLAMA.inputs(4)
        close(serve(scene.model, NAMES, inputs), expected(scene, NAMES, inputs))


def test_a_smaller_rank_than_that_of_the_source():
    with Scene(LLAMA, rank=4) as scene:
        inputs, names = LLAMA.inputs(2), ["plain", "narrow"]
        close(serve(scene.model, names, inputs), expected(scene, names, inputs))
        with pytest.raises(RuntimeError, match="'wide'.*expected rank 4 or less, got 6"):
            serve(scene.model, ["plain", "wide"], inputs)
        assert scene.pool.stats()["in_use"] == 0


def test_half_precision():
    model = LLAMA.model(dtype=torch.bfloat16)
    shelf = shelf_of(model, ["default"])
    inputs = LLAMA.inputs(2)
    reference = LLAMA.model()
    for dtype in (None, torch.bfloat16):
        base = LLAMA.base(dtype=torch.bfloat16)
        with AdapterPool(base, shelf, dtype=dtype) as pool:
            assert pool.slab.dtype == (dtype or torch.float32)
            error = (serve(base, ["default", None], inputs).float() - logits(reference, inputs)).abs()[0].max()
        plain = (logits(model, inputs).float() - logits(reference, inputs)).abs()[0].max()
        assert error <= 2 * plain
    with pytest.raises(ValueError, match="dtype: expected torch.float32 or the dtype of the model"):
        AdapterPool(LLAMA.base(dtype=torch.bfloat16), shelf, dtype=torch.float16)


def test_another_base_is_refused_with_numbers(llama: Scene):
    other = LLAMA.base(seed=1)
    with pytest.raises(ValueError, match="trained on another base model.*error .*accepted up to"):
        AdapterPool(other, llama.shelf)
    assert str(other) == str(LLAMA.base()) and not layers_of(other)
    config = LLAMA.config(r=6, basis_check="ignore")
    AdapterPool(other, llama.shelf, adapter_config=config).close()


def test_rounded_weights_are_accepted_with_a_warning(llama: Scene, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path_factory.mktemp("elsewhere")))
    rounded = LLAMA.base(dtype=torch.bfloat16).float()
    with pytest.warns(UserWarning, match="base weights differ slightly"):
        pool = AdapterPool(rounded, llama.shelf, adapter_config=LLAMA.config(r=6, basis_tol=0.3))
    inputs = LLAMA.inputs(4)
    found, exact = serve(rounded, NAMES, inputs), expected(llama, NAMES, inputs)
    assert (found - exact).norm() / exact.norm() < 0.2
    pool.close()


def turned(shelf: Shelf, signs: dict[str, torch.Tensor]) -> Shelf:
    """The same adapters on a basis whose singular vectors have other signs."""
    sketches = {
        k: v * torch.cat([signs[k].expand(4, -1), torch.ones(1, v.shape[1])])
        for k, v in shelf.manifest.sketches.items()
    }
    other = Shelf(SimpleNamespace(**{**vars(shelf.manifest), "sketches": sketches}))
    for name, row in shelf.rows.items():
        parts = []
        for (key, r, _), offset in zip(row.layout.segments, row.layout.offsets, strict=True):
            d = signs[key][:r]
            parts.append((d[:, None] * d * row.numbers[offset : offset + r * r].view(r, r)).flatten())
        other.put(name, row._replace(numbers=torch.cat(parts)))
    return other


def test_signs_of_singular_vectors_are_followed(llama: Scene):
    signs = {key: torch.randint(2, (r,)) * 2.0 - 1 for key, r in llama.shelf.manifest.ranks.items()}
    shelf = turned(llama.shelf, signs)
    inputs = LLAMA.inputs(4)
    model = LLAMA.base()
    with AdapterPool(model, shelf, rank=8):
        found = serve(model, NAMES, inputs)
    close(found, serve(llama.model, NAMES, inputs))
    # Adapters that the model has already keep their basis, so there the others cannot follow.
    model = LLAMA.model()
    with pytest.raises(ValueError, match="signs of the stored adapters"):
        AdapterPool(model, shelf)
    assert all(list(layer.loraxs_R) == ["default"] for layer in layers_of(model))


def test_a_peft_model_keeps_its_layers_and_adapters(llama: Scene):
    model = get_peft_model(LLAMA.base(), LLAMA.config(target_modules=["q_proj", "down_proj", "o_proj"])).eval()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    inputs = LLAMA.inputs(4)
    before, layers = logits(model, inputs), layers_of(model)
    with AdapterPool(model, llama.shelf) as pool:
        assert set(layers) & set(pool.layers) and {id(m) for m in layers} - {id(m) for m in pool.layers}
        close(serve(model, NAMES, inputs), serve(llama.model, NAMES, inputs))
        torch.testing.assert_close(logits(model, inputs), before)
        now = {name.replace("v_proj.base_layer", "v_proj"): p.requires_grad for name, p in model.named_parameters()}
        assert flags.items() <= now.items()
        assert not any(flag for name, flag in now.items() if POOL in name)
        model.merge_adapter()
        with pytest.raises(ValueError, match="merged"), loraxs_ext.adapters(model, NAMES):
            pass
        model.unmerge_adapter()
        with model.disable_adapter(), pytest.raises(ValueError, match="disabled"), loraxs_ext.adapters(model, NAMES):
            pass
    assert layers_of(model) == layers and not any(POOL in layer.loraxs_R for layer in layers)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    torch.testing.assert_close(logits(model, inputs), before)


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj", "down_proj"], r".*\.(q|v|down)_proj", "all-linear", None], ids=str
)
def test_a_source_without_a_manifest(llama: Scene, targets):
    shelf = Shelf()
    names = NAMES[:3] if targets is not None else [None, "v"]
    if targets is None:
        small = LLAMA.model(target_modules=["v_proj"])
        shelf.put("v", row_of(small, "default"))
    for name in ("plain", "wide"):
        shelf.put(name, llama.shelf.row(name))
    model, inputs = LLAMA.base(), LLAMA.inputs(len(names))
    ranks = {"down_proj": 6, "q_proj": 6, "v_proj": 6}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with AdapterPool(model, shelf, adapter_config=LLAMA.config(r=3, target_modules=targets, rank_pattern=ranks)):
            found = serve(model, names, inputs)
    if targets is not None:
        close(found, expected(llama, names, inputs))
    with pytest.raises(ValueError, match="adapter_config: expected a LoraXSConfig"):
        AdapterPool(LLAMA.base(), shelf)


def test_the_adapters_of_a_peft_model_tell_the_basis_too(llama: Scene):
    shelf = Shelf()
    for name in ("plain", "wide"):
        shelf.put(name, llama.shelf.row(name))
    inputs = LLAMA.inputs(2)
    with AdapterPool(llama.oracle, shelf):
        found = serve(llama.oracle, ["plain", "wide"], inputs)
    close(found, expected(llama, ["plain", "wide"], inputs))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_edora": True}, "use_edora=True; load them into a PeftModel, whose"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters=.*set_adapter"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias='all'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_adapters_that_are_more_than_r_are_refused(llama: Scene, changes, message):
    with pytest.raises(ValueError, match=message):
        AdapterPool(LLAMA.base(), Shelf(), adapter_config=LLAMA.config(**changes))
    manifest = SimpleNamespace(**{**vars(llama.shelf.manifest), "config": changes})
    with pytest.raises(ValueError, match=message):
        AdapterPool(LLAMA.base(), Shelf(manifest))


def test_models_that_do_not_fit_are_refused(llama: Scene):
    small = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="expected the 6 modules that the adapters change.*without 6"):
        AdapterPool(small, llama.shelf)
    with pytest.raises(ValueError, match="rank: expected a positive integer, got 0"):
        AdapterPool(LLAMA.base(), llama.shelf, rank=0)
    with pytest.raises(ValueError, match="recipe of the source"):
        AdapterPool(LLAMA.base(), llama.shelf, adapter_config=LLAMA.config(sigma="B"))
    with pytest.raises(ValueError, match="and a layer has one basis"):
        AdapterPool(LLAMA.model(sigma="B"), llama.shelf)
    wrapped = get_peft_model(LLAMA.base(), LoraXSConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"]))
    with pytest.raises(TypeError, match="q_proj.weight: expected a module whose rows may have adapters of their own"):
        AdapterPool(wrapped, llama.shelf)
    with pytest.raises(ValueError, match="source: expected adapters of some modules"):
        AdapterPool(LLAMA.base(), Shelf(), adapter_config=LLAMA.config(target_modules=["nothing"]))
    bert = CASES["bert"].model()
    with pytest.raises(ValueError, match="modules_to_save"):
        AdapterPool(bert, Shelf())
    with pytest.raises(ValueError, match="slots"):
        AdapterPool(small := LLAMA.base(), llama.shelf, slots=0)
    assert not layers_of(small)


def test_a_replaced_adapter_stays_as_it_was_until_the_context_ends(llama: Scene):
    inputs = LLAMA.inputs(1)
    with loraxs_ext.adapters(llama.model, ["plain"]):
        before = logits(llama.model, inputs)
        llama.shelf.put("plain", llama.shelf.row("wide"))
        assert torch.equal(logits(llama.model, inputs), before)
        with loraxs_ext.adapters(llama.model, ["plain"]):
            replaced = logits(llama.model, inputs)
        assert torch.equal(logits(llama.model, inputs), before)
    torch.testing.assert_close(replaced, logits(llama.alone("wide"), inputs))
    assert not torch.allclose(replaced, before)


def test_slots_that_are_all_in_use_are_waited_for(llama: Scene):
    llama.shelf.put("fourth", llama.shelf.row("wide"))
    with llama.pool.acquire(["plain", "wide", "narrow"]):
        with pytest.raises(TimeoutError), loraxs_ext.adapters(llama.model, ["fourth"], timeout=0.01):
            pass
    with loraxs_ext.adapters(llama.model, ["fourth"], timeout=5):
        pass
    llama.pool.pin(["plain"])
    llama.pool.prefetch(["wide"])
    stats = llama.pool.stats()
    assert (stats["pinned"], stats["slots"], stats["in_use"] <= 1) == (1, 3, True)
    llama.pool.unpin(["plain"])


def test_the_wait_for_another_thread_is_part_of_the_timeout(llama: Scene, monkeypatch):
    clock, given = iter([100.0, 103.0]), []
    monkeypatch.setattr("loraxs_ext.serve.pool.time", SimpleNamespace(monotonic=lambda: next(clock)))
    acquire = llama.pool.acquire
    monkeypatch.setattr(llama.pool, "acquire", lambda names, timeout: (given.append(timeout), acquire(names, 0))[1])
    with loraxs_ext.adapters(llama.model, ["wide"], timeout=5):
        assert given == [2.0]


def test_a_second_thread_waits_for_the_first(llama: Scene):
    inside, may_leave, errors = threading.Event(), threading.Event(), []

    def first() -> None:
        with loraxs_ext.adapters(llama.model, ["plain"]):
            inside.set()
            may_leave.wait(10)

    def second() -> None:
        try:
            with loraxs_ext.adapters(llama.model, ["wide"], timeout=0.01):
                pass
        except TimeoutError as error:
            errors.append(str(error))

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(10)
    other = threading.Thread(target=second)
    other.start()
    other.join(10)
    with pytest.raises(RuntimeError, match="no thread inside"):
        llama.pool.detach()
    may_leave.set()
    thread.join(10)
    assert len(errors) == 1 and "another thread" in errors[0]
    inputs = LLAMA.inputs(1)
    torch.testing.assert_close(serve(llama.model, ["wide"], inputs), logits(llama.alone("wide"), inputs))


def test_many_threads_each_get_their_adapter(llama: Scene):
    inputs = LLAMA.inputs(1)
    wanted = {name: logits(llama.alone(name), inputs) for name in ("plain", "wide", "narrow", None)}
    wrong: list[str | None] = []

    def work(name: str | None) -> None:
        for _ in range(5):
            if not torch.allclose(serve(llama.model, [name], inputs), wanted[name], rtol=1e-4, atol=1e-4):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_an_embedding():
    case = CASES["llama"]
    targets = ["embed_tokens", "q_proj"]
    oracle = case.model(target_modules=targets)
    oracle.add_adapter("other", case.config(target_modules=targets, r=6, init_seed=1))
    oracle.eval()
    model, inputs = case.base(), case.inputs(3)
    with AdapterPool(model, shelf_of(oracle, ["default", "other"]), slots=5):
        assert isinstance(model.model.embed_tokens, LoraXSLayer)
        found = serve(model, ["other", None, "default"], inputs)
    close(found, logits(oracle, inputs, adapter_names=["other", "__base__", "default"]))
    assert model.get_input_embeddings() is model.model.embed_tokens and type(model.model.embed_tokens) is nn.Embedding
