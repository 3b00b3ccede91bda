"""LoRA-XS as a PEFT method. Importing this module registers it, so `PeftModel.from_pretrained` finds it."""

from .config import LoraXSConfig
from .find_and_initialize import find_and_initialize
from .gathering import gather_adapter
from .model import LoraXSModel
from .register import PEFT_TYPE, register

register(LoraXSConfig, LoraXSModel)

__all__ = ["PEFT_TYPE", "LoraXSConfig", "LoraXSModel", "find_and_initialize", "gather_adapter"]
