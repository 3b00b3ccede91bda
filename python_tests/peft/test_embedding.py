"""Embeddings in models: tied output projections, checkpoints that hold R alone, mixed batches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loraxs_ext.layers import LoraXSEmbedding

from .models import CASES, Case, layers_of, logits, train

pytestmark = pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`", "ignore:Setting `save_embed")


def _tied() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=True, **sizes, **tokens))


@dataclasses.dataclass(frozen=True)
class TiedCase(Case):
    """A decoder whose output projection is its embedding, large enough to matter."""

    def base(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        model = super().base(seed)
        generator = torch.Generator().manual_seed(seed)
        weight = model.get_input_embeddings().weight
        with torch.no_grad():
            weight[1:] = 0.15 * torch.randn(weight.shape, generator=generator)[1:]
        assert model.get_output_embeddings().weight is weight
        return model.to(dtype)


TIED = TiedCase(_tied, ("embed_tokens",), "CAUSAL_LM")
TARGETS = [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]]


def expected(model: nn.Module, targets: list[str]) -> nn.Module:
    """The base model, untied, with W + ΔW where the adapter is."""
    base = TIED.base()
    weight = base.get_input_embeddings().weight.detach()
    base.get_output_embeddings().weight = nn.Parameter(weight.clone())
    for layer in layers_of(model):
        base.get_submodule(layer.key).weight.data += layer.get_delta_weight("default").detach()
    assert len(layers_of(model)) == len(targets)
    return base


@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
def test_tied_weights_are_adapted_where_they_are_targets(targets):
    model = TIED.model(target_modules=targets)
    found = logits(model, TIED.inputs())
    torch.testing.assert_close(found, logits(expected(model, targets), TIED.inputs()), rtol=1e-4, atol=1e-4)
    # One weight, one basis.
    assert len({layer.loraxs_A.data_ptr() for layer in layers_of(model)}) == 1
    plain = TIED.base()
    with model.disable_adapter():
        assert torch.equal(logits(model, TIED.inputs()), logits(plain, TIED.inputs()))
    # A merged weight is the layer's own: the other module keeps the one they shared.
    model.merge_adapter()
    torch.testing.assert_close(logits(model, TIED.inputs()), found, rtol=1e-4, atol=1e-4)
    llama = model.base_model.model
    for module in (llama.get_input_embeddings(), llama.get_output_embeddings()):
        if not hasattr(module, "base_layer"):
            assert torch.equal(module.weight, plain.get_input_embeddings().weight)
    model.unmerge_adapter()
    assert torch.equal(logits(model, TIED.inputs()), found)
    inner = [getattr(m, "base_layer", m) for m in (llama.get_input_embeddings(), llama.get_output_embeddings())]
    assert inner[0].weight is inner[1].weight


@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
def test_merged_model_is_saved_untied(targets, tmp_path):
    model = TIED.model(target_modules=targets)
    found = logits(model, TIED.inputs())
    with pytest.warns(UserWarning, match="no longer tied after merging"):
        merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, TIED.inputs()), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [*TARGETS, r".*(embed_tokens|lm_head)"], ids=str)
def test_checkpoint_holds_R_alone(targets, tmp_path):
    model = TIED.model(target_modules=targets)
    train(model, TIED)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in stored} == {"weight", "sketch"}
    assert all("loraxs_R" in key for key in stored)
    loaded = PeftModel.from_pretrained(TIED.base(), tmp_path)
    torch.testing.assert_close(logits(loaded, TIED.inputs()), logits(model, TIED.inputs()), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="another base model, revision or quantisation"):
        PeftModel.from_pretrained(TIED.base(seed=1), tmp_path)


@pytest.mark.parametrize("targets", [*TARGETS, r".*lm_head"], ids=str)
def test_ensured_tying_trains_one_R(targets, tmp_path):
    model = TIED.model(target_modules=targets, ensure_weight_tying=True)
    embedding, head = layers_of(model)
    assert embedding.core("default") is head.core("default")
    assert len([p for p in model.parameters() if p.requires_grad]) == 1
    train(model, TIED)
    found = logits(model, TIED.inputs())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(TIED.base(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, TIED.inputs()), found, rtol=1e-5, atol=1e-5)
    assert layers_of(loaded)[0].core("default") is layers_of(loaded)[1].core("default")
    model.merge_adapter()
    torch.testing.assert_close(logits(model, TIED.inputs()), found, rtol=1e-4, atol=1e-4)
    assert torch.equal(embedding.get_base_layer().weight, head.get_base_layer().weight)
    model.unmerge_adapter()
    assert torch.equal(logits(model, TIED.inputs()), found)


def test_mixed_batch_equals_each_row_alone():
    model = TIED.model(target_modules=["embed_tokens", "q_proj"])
    model.add_adapter("second", TIED.config(target_modules=["embed_tokens", "lm_head"], r=6, init_seed=1))
    names = ["default", "__base__", "second", "default"]
    mixed = logits(model, TIED.inputs(), adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            alone = logits(TIED.base(), TIED.inputs())
        else:
            model.set_adapter(name)
            alone = logits(model, TIED.inputs())
        torch.testing.assert_close(mixed[row], alone[row], rtol=1e-4, atol=1e-4)
    assert model.generate(**TIED.inputs(), adapter_names=names, num_beams=2, max_new_tokens=3).shape == (4, 9)


def test_gpt2_takes_all_its_kinds_of_layers():
    # Conv1D, two embeddings, and an output projection tied to one of them.
    case = CASES["gpt2"]
    model = case.model(target_modules=["c_attn", "c_fc", "wte", "wpe", "lm_head"])
    kinds = [type(layer) for layer in layers_of(model)]
    assert kinds.count(LoraXSEmbedding) == 2 and len(kinds) == 7
    found = logits(model, case.inputs())
    merged = case.model(target_modules=["c_attn", "c_fc", "wte", "wpe", "lm_head"]).merge_and_unload()
    torch.testing.assert_close(logits(merged, case.inputs()), found, rtol=1e-3, atol=1e-3)
    before = found
    train(model, case)
    assert not torch.allclose(logits(model, case.inputs()), before, atol=1e-3)


def test_position_embeddings_with_an_offset_are_refused():
    class Offset(nn.Embedding):
        def forward(self, mask: torch.Tensor) -> torch.Tensor:
            return super().forward(mask.cumsum(-1))

    model = TIED.base()
    model.model.embed_positions = Offset(10, 32)
    with pytest.raises(TypeError, match="model.embed_positions: expected torch.nn.Embedding, called with indices"):
        get_peft_model(model, TIED.config(target_modules=["embed_positions"]))


def test_what_is_no_longer_tied_cannot_share_R():
    base = TIED.base()
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match="expected lm_head to share the weight of model.embed_tokens"):
        get_peft_model(base, TIED.config(ensure_weight_tying=True))
