"""Who is compared: every method's configuration, size and learning rates, and how its model is built and reloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TinyLoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.demo.model import TARGETS
from loraxs_ext import LoraXSConfig

QUERY_VALUE = ["query", "value"]
HEAD = ["head"]
WEIGHTS = "adapter_model.safetensors"
# Every method gets this many learning rates, this factor apart, around its usual one.
STEP = 3.0
HEAD_RATE = 1e-2


@dataclass(frozen=True)
class Method:
    """One row of the table.

    name: as shown.
    config: seed -> configuration of the adapter; None for the head alone. Whatever a method draws at random and
        freezes follows the seed too.
    trains: what the names of its trainable parameters contain, one entry per kind.
    parameters: trainable numbers of the adapter on the MiniLM encoder, without the head.
    rate: the usual learning rate, of the adapter (of the head for the head alone).
    why: where that rate comes from.
    """

    name: str
    config: Callable[[int], PeftConfig] | None
    trains: tuple[str, ...]
    parameters: int
    rate: float
    why: str

    @property
    def rates(self) -> tuple[float, float, float]:
        """The learning rates that are tried on the dev rows."""
        return (float(f"{self.rate / STEP:.2g}"), self.rate, float(f"{self.rate * STEP:.2g}"))

    def build(self, base: nn.Module, seed: int) -> nn.Module:
        """Put the untrained method on a frozen model; the same seed gives the same model."""
        torch.manual_seed(seed)
        return HeadOnly(base) if self.config is None else get_peft_model(base, self.config(seed))

    def reload(self, base: nn.Module, folder: Path) -> nn.Module:
        """Put what `save_pretrained` wrote into `folder` on a fresh frozen model."""
        if self.config is not None:
            return PeftModel.from_pretrained(base, str(folder))
        model = HeadOnly(base)
        model.load_state_dict(load_file(folder / WEIGHTS), strict=False)
        return model


class HeadOnly(nn.Module):
    """The frozen model and its trainable head, with the calls of a PEFT model that are used here."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.model.head.requires_grad_(True)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """What the model gives."""
        return self.model(**batch)

    def save_pretrained(self, folder: str) -> None:
        """Write the head as `adapter_model.safetensors`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        head = {name: tensor for name, tensor in self.state_dict().items() if ".head." in name}
        save_file(head, Path(folder) / WEIGHTS)


def _loraxs(seed: int, **more: Any) -> PeftConfig:
    return LoraXSConfig(r=16, lora_alpha=16, init_seed=seed, target_modules=TARGETS, modules_to_save=HEAD, **more)


# The same function of v as PEFT's TinyLoRA. Module i draws its projections from projection_seed + i: the seeds lie
# further apart than there are modules.
def _tinylora(seed: int) -> PeftConfig:
    return _loraxs(seed, use_tinylora=True, sigma="sqrt", u=64, projection_seed=42 + 1000 * seed)


def _lora(rank: int, targets: list[str], **more: Any) -> Callable[[int], PeftConfig]:
    return lambda seed: LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, modules_to_save=HEAD, **more)


# save_projection=False: the smallest files that the peers can write, from which they reload through a seed.
def _vera(seed: int) -> PeftConfig:
    return VeraConfig(
        r=384, projection_prng_key=seed, save_projection=False, target_modules=QUERY_VALUE, modules_to_save=HEAD
    )


def _peft_tinylora(seed: int) -> PeftConfig:
    return TinyLoraConfig(
        r=16,
        u=64,
        projection_seed=42 + 1000 * seed,
        save_projection=False,
        target_modules=TARGETS,
        modules_to_save=HEAD,
    )


ANCHOR = "LoRA-XS r = 16"
_LIST = (
    Method("head only", None, (".head.",), 0, HEAD_RATE, "the head's rate in every other row"),
    Method(ANCHOR, _loraxs, ("loraxs_R",), 9_216, 5e-3, "the demo's"),
    Method(
        "EDoRA r = 16",
        lambda seed: _loraxs(seed, use_edora=True),
        ("loraxs_R", "loraxs_magnitude"),
        29_952,
        5e-3,
        "LoRA-XS's",
    ),
    Method("TinyLoRA r = 16, u = 64", _tinylora, ("loraxs_R",), 2_304, 5e-3, "LoRA-XS's"),
    Method("LoRA r = 1 on query, value", _lora(1, QUERY_VALUE), ("lora_A", "lora_B"), 9_216, 5e-3, "the demo's"),
    Method("LoRA r = 8", _lora(8, TARGETS), ("lora_A", "lora_B"), 331_776, 1e-3, "the demo's"),
    Method(
        "DoRA r = 8",
        _lora(8, TARGETS, use_dora=True),
        ("lora_A", "lora_B", "lora_magnitude_vector"),
        352_512,
        1e-3,
        "LoRA's of that rank",
    ),
    Method(
        "VeRA r = 384 on query, value",
        _vera,
        ("vera_lambda_b", "vera_lambda_d"),
        9_216,
        1e-2,
        "the middle of its paper's for GLUE",
    ),
    Method("PEFT TinyLoRA r = 16, u = 64", _peft_tinylora, ("tinylora_v",), 2_304, 5e-3, "LoRA-XS's"),
)
METHODS: Mapping[str, Method] = {method.name: method for method in _LIST}
