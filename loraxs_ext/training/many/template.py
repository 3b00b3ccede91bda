"""The template of many adapters: one plain LoRA-XS adapter, and rows that pass through it from and to folders."""

from __future__ import annotations

from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper

from loraxs_ext.layers import CoreMatrix, LoraXSLayer
from loraxs_ext.peft import LoraXSConfig

TEMPLATE = "default"


def check_template(model: PeftModel) -> list[LoraXSLayer]:
    """The layers of the template.

    Raises:
        ValueError: the model has other adapters, or the template trains more than one R [r, r] in each layer.
    """
    if list(model.peft_config) != [TEMPLATE]:
        raise ValueError(f"model: expected one adapter named {TEMPLATE!r}, got {sorted(model.peft_config)}")
    config = model.peft_config[TEMPLATE]
    if not isinstance(config, LoraXSConfig):
        raise ValueError(f"model: expected a LoRA-XS adapter, got {config.peft_type}")
    refused = {
        "use_edora": "the magnitudes of EDoRA",
        "use_tinylora": "TinyLoRA's vectors",
        "target_parameters": "stacks of experts",
        "modules_to_save": "heads; keep them frozen, and the same for all adapters",
        "trainable_token_indices": "rows of the embedding",
        "ensure_weight_tying": "tied R matrices",
    }
    for field, what in refused.items():
        if value := getattr(config, field):
            expected = False if value is True else None
            raise ValueError(f"model: {field}: expected {expected}, because a row holds R matrices and not {what}")
    if config.bias != "none":
        raise ValueError(f"model: bias: expected 'none', got {config.bias!r}")
    layers = [module for module in model.modules() if isinstance(module, LoraXSLayer)]
    if any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules()):
        raise ValueError("model: task_type: expected one without a head that is trained, such as CAUSAL_LM or None")
    if any(layer.merged for layer in layers):
        raise ValueError("model: expected an adapter that is not merged; call unmerge_adapter first")
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            "model: expected no gradient checkpointing yet; enable it on ManyAdapters, which knows the routes"
        )
    for layer in layers:
        layer.settle(TEMPLATE)
        assert isinstance(layer.core(TEMPLATE), CoreMatrix)
    return layers
