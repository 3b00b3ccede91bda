"""The demo's model: a frozen MiniLM encoder, mean pooling and one linear head, and the adapters put on it."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftConfig
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from loraxs_ext import LoraXSConfig

# Every linear layer of a BERT block: query, key, value, attention output, and both layers of the MLP.
TARGETS = ["query", "key", "value", "dense"]
MAX_TOKENS = 64


class TextClassifier(nn.Module):
    """Mean-pooled sentence embedding and a linear head of ``width`` classes.

    encoder: a transformers encoder; its pooler is not used.
    width: number of logits, the same for all tasks, so that one batch can mix tasks. Unused ones learn to stay low.
    """

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.head = nn.Linear(encoder.config.hidden_size, width)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Give ``logits`` [rows, width], ``embedding`` [rows, hidden] and, with labels [rows], the mean ``loss``."""
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
        embedding = (tokens * mask).sum(1) / mask.sum(1)
        logits = self.head(embedding)
        result = {"logits": logits, "embedding": embedding}
        if labels is not None:
            result = {"loss": nn.functional.cross_entropy(logits, labels), **result}
        return result


def load_encoder(folder: Path) -> nn.Module:
    """Load the pretrained encoder without its pooler and without dropout, which costs time and helps little here."""
    return AutoModel.from_pretrained(
        folder,
        add_pooling_layer=False,
        local_files_only=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the encoder's tokenizer."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def target_weights(encoder: nn.Module) -> dict[str, Tensor]:
    """The weight matrices [d_out, d_in] that the adapters are put on, by module name."""
    return {
        name: module.weight.detach()
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in TARGETS
    }


def loraxs_config(rank: int) -> PeftConfig:
    """LoRA-XS of ``rank`` on every linear layer, with a head of its own."""
    return LoraXSConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, modules_to_save=["head"])


def lora_config(rank: int, targets: list[str]) -> PeftConfig:
    """Plain LoRA of ``rank`` on ``targets``, with a head of its own: what LoRA-XS is compared with."""
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, modules_to_save=["head"])


def count_trainable(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters of a PEFT model: (in the adapter, in the head)."""
    head = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".head." in n)
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return total - head, head
