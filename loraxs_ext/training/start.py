"""Starting from the adapter of another task, as the paper starts MRPC, RTE and STS-B from MNLI."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from loraxs_ext.peft import LoraXSConfig

WEIGHTS = "adapter_model.safetensors"
# Under other values of these the same R means another ΔW, or the file holds other tensors.
_SAME = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "save_basis")


def continue_from(
    model: PeftModel, folder: str, keep_head: Literal["matching", "all", "none"], *, argument: str = "start_from"
) -> list[str]:
    """Load R, and what is to be kept of the head, from a saved adapter into the new adapter of `model`.

    Args:
        model: with a fresh LoRA-XS adapter named "default".
        folder: of the saved adapter; its basis is verified as whenever an adapter is loaded.
        keep_head: "matching" keeps the tensors whose shapes fit, "all" wants all of them to, "none" keeps none.
        argument: what messages call the folder.

    Returns:
        A line for every tensor of the head that starts afresh.

    Raises:
        FileNotFoundError: there is no adapter in `folder`.
        ValueError: the adapters differ in rank, scaling, basis or targets, or the head does not fit with "all".
    """
    place = Path(folder)
    if not (place / WEIGHTS).is_file():
        raise FileNotFoundError(f"{argument}: expected a folder with {WEIGHTS}, got {folder}")
    _check_configs(PeftConfig.from_pretrained(folder), model.peft_config["default"], folder, argument)
    stored = load_file(place / WEIGHTS)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    foreign = sorted(name for name in own.keys() ^ stored.keys() if "loraxs_" in name)
    if foreign:
        side = "here" if foreign[0] in own else "there"
        raise ValueError(
            f"{argument}: expected the same target modules, got {folder} and {len(foreign)} tensors that are only on "
            f"one side, such as {foreign[0]}, only {side}"
        )
    notes = []
    for name, fresh in own.items():
        old = stored.get(name)
        if "loraxs_" in name:
            own[name] = stored[name]
        elif keep_head != "none" and old is not None and old.shape == fresh.shape:
            own[name] = old
        else:
            there = "not there" if old is None else f"{list(old.shape)} there"
            notes.append(f"{name} starts afresh: {list(fresh.shape)} here, {there}")
    if notes and keep_head == "all":
        raise ValueError(
            "keep_head: expected a head that fits (keep_head: matching keeps what does):\n  " + "\n  ".join(notes)
        )
    set_peft_model_state_dict(model, own)
    return notes


def _check_configs(old: PeftConfig, new: PeftConfig, folder: str, argument: str) -> None:
    if not isinstance(old, LoraXSConfig):
        raise ValueError(f"{argument}: expected a LoRA-XS adapter, got {old.peft_type} in {folder}")
    new = cast(LoraXSConfig, new)
    for name in _SAME:
        if getattr(old, name) != getattr(new, name):
            raise ValueError(
                f"adapter.{name}: expected {getattr(old, name)!r}, as in {argument} ({folder}), got "
                f"{getattr(new, name)!r}"
            )
    if old.recipe() != new.recipe():
        raise ValueError(f"adapter: expected the basis of {argument} ({folder}), {old.recipe()}, got {new.recipe()}")
