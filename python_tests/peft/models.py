"""Tiny random models of the four architectures that differ for a tuner, with targets and inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from loraxs_ext.layers import LoraXSLayer
from loraxs_ext.peft import LoraXSConfig

VOCABULARY = 50


def _bert() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **sizes, **dropout))


def _llama() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, intermediate_size=48, **sizes, **tokens))


def _gpt2() -> nn.Module:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, **dropout, **tokens)
    )


def _t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    tokens = {"pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, dropout_rate=0.0, **sizes, **tokens))


@dataclass(frozen=True)
class Case:
    """An architecture: how to build it, what to adapt, whether it generates."""

    build: Callable[[], nn.Module]
    targets: tuple[str, ...]
    task: str
    generates: bool = True

    def base(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The same random model for the same seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.build()
            # Initial weights of standard deviation 0.02 hardly leave a trace of an adapter in the logits.
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.ndim == 2 and "embed" not in name and "wte" not in name and "shared" not in name:
                        parameter.normal_(std=0.15)
        return model.eval().to(dtype)

    def config(self, **changes) -> LoraXSConfig:
        """An adapter that clearly changes the model."""
        options = {"r": 4, "target_modules": list(self.targets), "task_type": self.task, "init_weights": False}
        return LoraXSConfig(**{**options, **changes})

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
        """PeftModel over `base`."""
        return get_peft_model(self.base(seed, dtype), self.config(**changes)).eval()

    def inputs(self, rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
        """Token ids, without padding."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, VOCABULARY, (rows, 6), generator=generator)
        if self.task == "SEQ_2_SEQ_LM":
            return {"input_ids": ids, "decoder_input_ids": ids[:, :3].contiguous()}
        return {"input_ids": ids}

    def labels(self, rows: int = 4) -> Tensor:
        """Something to train on."""
        if self.task == "SEQ_CLS":
            return torch.arange(rows) % 2
        return self.inputs(rows)["decoder_input_ids" if self.task == "SEQ_2_SEQ_LM" else "input_ids"]


CASES = {
    "bert": Case(_bert, ("query", "value", "dense"), "SEQ_CLS", generates=False),
    "llama": Case(_llama, ("q_proj", "v_proj", "down_proj"), "CAUSAL_LM"),
    "gpt2": Case(_gpt2, ("c_attn", "c_proj"), "CAUSAL_LM"),
    "t5": Case(_t5, ("q", "v", "wo"), "SEQ_2_SEQ_LM"),
}


def logits(model: nn.Module, inputs: dict[str, Tensor], **kwargs) -> Tensor:
    """Output without gradient."""
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def alone(model: PeftModel, name: str, call: Callable[[], Tensor]) -> Tensor:
    """What `call` returns with this adapter only, or with none for "__base__"."""
    if name == "__base__":
        with model.disable_adapter():
            return call()
    model.set_adapter(name)
    try:
        return call()
    finally:
        model.set_adapter("default")


def assert_rows_as_alone(model: PeftModel, case: Case, names: list[str], tolerance: float = 1e-4) -> None:
    """A mixed batch of a decoder gives every row what it gets with its adapter alone, nearly; generate() takes it."""
    inputs = case.inputs(len(names))
    mixed = logits(model, inputs, adapter_names=names)
    for row, name in enumerate(names):
        expected = alone(model, name, lambda: logits(model, inputs))
        torch.testing.assert_close(mixed[row], expected[row], rtol=tolerance, atol=tolerance)
    tokens = model.generate(**inputs, adapter_names=names, max_new_tokens=3, do_sample=False)
    assert tokens.shape == (len(names), inputs["input_ids"].shape[1] + 3)


def layers_of(model: nn.Module) -> list[LoraXSLayer]:
    """The LoRA-XS layers of a model."""
    return [module for module in model.modules() if isinstance(module, LoraXSLayer)]


def train(model: nn.Module, case: Case, steps: int = 3, lr: float = 0.05) -> None:
    """A few steps of SGD on the trainable parameters."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**case.inputs(), labels=case.labels()).loss.backward()
        optimizer.step()
    model.eval()
