"""Adapters in other shapes: merged into plain models, exported to LoRA, imported from it."""

from .exporting import export_lora, to_lora
from .merging import Merged, merge
from .projection import Projection, ProjectionError, from_lora, import_lora, residuals

__all__ = [
    "Merged",
    "Projection",
    "ProjectionError",
    "export_lora",
    "from_lora",
    "import_lora",
    "merge",
    "residuals",
    "to_lora",
]
