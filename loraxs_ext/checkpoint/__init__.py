"""Adapters and models in the formats of others: read, converted, exported, merged."""

from .exporting import export_lora, to_lora
from .merging import Merged, merge
from .packing import find_adapters, manifest_of, pack, row_of, unpack
from .projection import Projection, ProjectionError, from_lora, import_lora, residuals
from .reference import load_reference
from .tinylora import load_tinylora, save_tinylora

__all__ = [
    "Merged",
    "Projection",
    "ProjectionError",
    "export_lora",
    "find_adapters",
    "from_lora",
    "import_lora",
    "load_reference",
    "load_tinylora",
    "manifest_of",
    "merge",
    "pack",
    "residuals",
    "row_of",
    "save_tinylora",
    "to_lora",
    "unpack",
]
