"""Adapters and models in the formats of others: read, converted, exported, merged."""

from .exporting import export_lora, to_lora
from .merging import Merged, merge
from .projection import Projection, ProjectionError, from_lora, import_lora, residuals
from .reference import load_reference
from .tinylora import load_tinylora, save_tinylora

__all__ = [
    "Merged",
    "Projection",
    "ProjectionError",
    "export_lora",
    "from_lora",
    "import_lora",
    "load_reference",
    "load_tinylora",
    "merge",
    "residuals",
    "save_tinylora",
    "to_lora",
]
