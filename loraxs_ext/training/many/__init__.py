"""Many adapters of one model trained in one batch: every row of the batch trains the adapter it belongs to.

`ManyAdaptersTrainer`, in `loraxs_ext.training.many.trainer`, puts the parts together on the Hugging Face Trainer, which
takes seconds to import; this package does not.
"""

from __future__ import annotations

from .batches import AdapterBatches, SlotCollator
from .loss import AdapterLoss, adapter_loss, row_losses
from .model import ManyAdapters
from .optimizer import SlotAdamW

__all__ = [
    "AdapterBatches",
    "AdapterLoss",
    "ManyAdapters",
    "SlotAdamW",
    "SlotCollator",
    "adapter_loss",
    "row_losses",
]
