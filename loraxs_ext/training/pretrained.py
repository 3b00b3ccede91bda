"""The frozen model and its tokenizer, loaded so that nothing of it is random without being noticed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from .settings import ModelSettings

# What PEFT trains and saves completely in every sequence classifier.
HEADS = ("classifier", "score")


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The model's tokenizer; one without a padding token pads with its end of sequence."""
    tokenizer = AutoTokenizer.from_pretrained(settings.name)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"model.name: expected a tokenizer with a padding or end token, got {settings.name}")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    labels: list[str] | None,
    trained: Collection[str],
    seed: int,
) -> PreTrainedModel:
    """A sequence classifier with a new head.

    Args:
        settings: which model, in which precision.
        tokenizer: gives the padding token.
        labels: class names; None for regression.
        trained: names of further modules that the adapter trains and saves, and that may be new too.
        seed: of the head.

    Raises:
        ValueError: the model lacks weights that would stay random and frozen.
    """
    set_seed(seed)
    kind: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if labels is not None:
        names = dict(enumerate(labels))
        kind = {"id2label": names, "label2id": {v: k for k, v in names.items()}}
        kind |= {"num_labels": len(labels), "problem_type": "single_label_classification"}
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        settings.name, dtype=settings.dtype, ignore_mismatched_sizes=True, output_loading_info=True, **kind
    )
    new = [name for name in loading["missing_keys"] if not {*HEADS, *trained} & set(name.split("."))]
    if new:
        raise ValueError(
            f"model.name: {settings.name} has no weights for {', '.join(sorted(new))}: they would stay random and "
            f"frozen; name their module in adapter.modules_to_save"
        )
    _float_heads(model, {*HEADS, *trained})
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def load_causal(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A causal language model.

    Raises:
        ValueError: the model lacks weights.
    """
    loader = cast(Any, AutoModelForCausalLM)
    model, loading = loader.from_pretrained(settings.name, dtype=settings.dtype, output_loading_info=True)
    if loading["missing_keys"]:
        raise ValueError(f"model.name: {settings.name} has no weights for {', '.join(sorted(loading['missing_keys']))}")
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def device_for(cpu: bool) -> torch.device:
    """The accelerator, if there is one and `cpu` does not forbid it."""
    accelerator = None if cpu else torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def _float_heads(model: nn.Module, names: Collection[str]) -> None:
    """Trained modules learn in float32, whatever the precision of the frozen ones."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names:
            module.float()
            if any(p.dtype != torch.float32 for p in model.parameters()):
                module.register_forward_pre_hook(_as_float)


def _as_float(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
