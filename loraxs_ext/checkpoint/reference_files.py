"""The files of the LoRA-XS and EDoRA code, read and checked, but not put into any model yet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraxs_ext.files import read_json
from loraxs_ext.peft.reconstruction import Reconstruction

CONFIG, TENSORS, PICKLED, RECONSTRUCTION = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "reconstr_config.json",
)
PREFIX = "base_model.model."
# PEFT strips ".default" from names, up to 0.17 also where it stands for no adapter.
_PARTS = {
    "R": re.compile(r"(?:\.default_|_)lora_latent_mapping\.weight"),
    "A": re.compile(r"\.lora_A(?:\.default)?\.weight"),
    "B": re.compile(r"\.lora_B(?:\.default)?\.weight"),
    "m": re.compile(r"\.lora_magnitude_vector(?:\.default)?(?:\.weight)?"),
}
_HEAD = re.compile(r"\.modules_to_save(?:\.default)?(?=\.)")


class ReferenceFiles(NamedTuple):
    """One checkpoint.

    Attributes:
        config: adapter_config.json, the fields of a LoraConfig.
        reconstruction: reconstr_config.json, or the reference's defaults.
        parts: by module name, "R" [r, r], and, where the file has them, "A" [r, K], "B" [N, r] and "m" [N]; the same
            parts for all modules.
        others: what was trained beside them, heads in particular, by its full name as PEFT writes it.
    """

    config: dict[str, Any]
    reconstruction: Reconstruction
    parts: dict[str, dict[str, Tensor]]
    others: dict[str, Tensor]

    @property
    def has_basis(self) -> bool:
        """Whether A and B are stored."""
        return all("A" in parts for parts in self.parts.values())


def read_reference(folder: str | Path) -> ReferenceFiles:
    """Read a checkpoint folder of the reference; reconstr_config.json may lie in it or in its parent.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError or TypeError: a file is not what it should be; the message names the file and the key.
    """
    folder = Path(folder)
    if not (folder / TENSORS).exists() and (folder / PICKLED).exists():
        raise ValueError(
            f"folder: expected {TENSORS}, got {PICKLED} in {folder}, and pickled files are not read. If you trust it: "
            f"safetensors.torch.save_file(torch.load({PICKLED!r}, weights_only=True), {TENSORS!r})"
        )
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG}: peft_type: expected 'LORA', got {config.get('peft_type')!r}")
    beside = [path for path in (folder / RECONSTRUCTION, folder.parent / RECONSTRUCTION) if path.exists()]
    reconstruction = Reconstruction.from_dict(read_json(beside[0]), str(beside[0])) if beside else Reconstruction()
    parts, others = _sort(_read_tensors(folder / TENSORS), str(folder / TENSORS))
    if not reconstruction.r_squared or not any("R" in found for found in parts.values()):
        raise ValueError(
            f"{folder / TENSORS}: expected an R in every adapted module, got none: an adapter trained with "
            f"r_squared=False is plain LoRA, which PeftModel.from_pretrained loads"
        )
    _check_parts(parts, bool(config.get("use_dora")), str(folder / TENSORS))
    return ReferenceFiles(config, reconstruction, parts, others)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"folder: expected {TENSORS}, got none at {path}")
    try:
        # The library compares the header with the size of the file before it allocates.
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file, not a dictionary
    except SafetensorError as reason:
        raise ValueError(f"{path}: expected a safetensors file, got {reason}") from None


def _sort(tensors: Mapping[str, Tensor], source: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith(PREFIX) or not tensor.is_floating_point():
            raise ValueError(f"{source}: expected floating-point tensors named {PREFIX}…, got {name} of {tensor.dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"{source}: {name}: expected finite numbers, got NaN or infinity")
        for part, pattern in _PARTS.items():
            found = pattern.search(name)
            if found is not None and found.end() == len(name):
                module = parts.setdefault(name[len(PREFIX) : found.start()], {})
                if part in module:
                    raise ValueError(f"{source}: expected one {part} in every module, got two, one of them {name}")
                module[part] = tensor
                break
        else:
            others[_HEAD.sub("", name)] = tensor
    return parts, others


def _check_parts(parts: Mapping[str, Mapping[str, Tensor]], has_magnitude: bool, source: str) -> None:
    """All modules with the same parts, and these of shapes that fit each other."""
    expected = {"R", *("m" if has_magnitude else ())}
    if any("A" in found or "B" in found for found in parts.values()):
        expected |= {"A", "B"}
    for module, found in parts.items():
        if set(found) != expected:
            raise ValueError(
                f"{source}: {module}: expected {sorted(expected)}, got {sorted(found)}: missing "
                f"{sorted(expected - set(found))}, unexpected {sorted(set(found) - expected)}"
            )
        r = found["R"].shape[0] if found["R"].dim() == 2 else -1
        fits = found["R"].shape == (r, r)
        if fits and "A" in expected:
            fits = found["A"].dim() == found["B"].dim() == 2 and found["A"].shape[0] == found["B"].shape[1] == r
        if not fits or r < 1:
            shapes = {part: list(tensor.shape) for part, tensor in found.items()}
            raise ValueError(f"{source}: {module}: expected R [r, r], A [r, K] and B [N, r], got {shapes}")
