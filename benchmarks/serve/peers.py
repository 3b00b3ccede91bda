"""PEFT's LoRA with one adapter for each row of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from benchmarks.serve.loop import Run, timed_generate
from benchmarks.serve.workload import RANK, Batch, targets


class PeftLora:
    """A PeftModel with as many LoRA adapters as rows, on every module that LoRA-XS adapts.

    Args:
        model: the transformers model; it gets the layers.
        adapters: how many.
    """

    def __init__(self, model: PreTrainedModel, adapters: int) -> None:
        # Random A and B, small enough that the text stays a text.
        config = LoraConfig(r=RANK, lora_alpha=1, target_modules=list(targets(model)), init_lora_weights=False)
        self.names = [f"user-{i}" for i in range(adapters)]
        head = model.get_output_embeddings()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            peft: Any = get_peft_model(model, config, self.names[0], autocast_adapter_dtype=False)
            layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
            for name in self.names[1:]:
                # add_adapter() walks over all adapters of all modules for every new one: minutes for 64.
                peft.peft_config[name] = config
                for layer in layers:
                    layer.update_layer(name, RANK, lora_alpha=1, config=config)
        peft.eval().requires_grad_(False)
        # As in `workload.prepare`.
        head.requires_grad_(True)
        self.model = peft

    def generate(self, batch: Batch, new_tokens: int) -> Run:
        """Row i with the adapter i."""
        return timed_generate(self.model, batch, new_tokens, adapter_names=self.names)

    @contextmanager
    def alone(self, i: int) -> Iterator[None]:
        """The adapter i for whatever is computed inside."""
        self.model.set_adapter(self.names[i], inference_mode=True)
        yield
