"""Which kind of adapter a folder holds, and how each kind becomes a LoRA-XS adapter in a folder of its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from safetensors import safe_open
from torch import nn

from loraxs_ext.files import atomic_folder

from .streaming import ADAPTER_WEIGHTS, empty_base, read_adapter_config

Load = Callable[[nn.Module, str], PeftModel]


class Kind(NamedTuple):
    """A kind of adapter.

    Attributes:
        recognises: whether a folder with these fields of adapter_config.json and these names of tensors holds one.
        loader: module and function that load such a folder into a model; None for LoRA, which `import_lora` projects.
    """

    recognises: Callable[[Mapping[str, Any], Collection[str]], bool]
    loader: tuple[str, str] | None = None


# In the order in which they are tried: the reference's files call themselves LORA too.
KINDS = {
    "reference": Kind(
        lambda fields, names: any("lora_latent_mapping" in name for name in names),
        ("loraxs_ext.checkpoint.reference", "load_reference"),
    ),
    "tinylora": Kind(
        lambda fields, names: fields.get("peft_type") == "TINYLORA",
        ("loraxs_ext.checkpoint.tinylora", "load_tinylora"),
    ),
    "lora": Kind(lambda fields, names: fields.get("peft_type") == "LORA"),
}


def detect(folder: Path) -> str:
    """The name in `KINDS` of what `folder` holds.

    Raises:
        ValueError: it holds none of these.
    """
    fields = read_adapter_config(folder)
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        names = list(file.keys())
    found = next((kind for kind, about in KINDS.items() if about.recognises(fields, names)), None)
    if found is None:
        raise ValueError(f"{folder} must hold one of {', '.join(KINDS)}, got peft_type {fields.get('peft_type')!r}")
    return found


def import_loaded(base: Path, folder: Path, output: Path, kind: str, *, overwrite: bool = False) -> None:
    """Load an adapter of `kind` into its base model, which lies in memory as a whole, and save it as LoRA-XS.

    Args:
        base: folder of the model.
        folder: of the adapter.
        output: folder to be made; it appears whole or not at all.
        kind: one of `KINDS` that has a loader.
        overwrite: replace an adapter that is there.

    Raises:
        ValueError: the folders are not what they should be.
        FileExistsError: `output` exists.
    """
    loader = KINDS[kind].loader
    if loader is None:
        raise ValueError(f"kind: expected one that is loaded, got {kind!r}, which is projected")
    with atomic_folder(output, overwrite=overwrite) as temporary:
        load: Load = getattr(importlib.import_module(loader[0]), loader[1])
        empty: Any = empty_base(base, folder)
        model = type(empty).from_pretrained(base, config=empty.config)
        load(model, str(folder)).save_pretrained(str(temporary))
