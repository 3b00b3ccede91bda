"""Checkpoints as the reference code writes them, and what its models compute, in plain torch."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

TARGETS = ["query", "value", "attention.output.dense", "output.dense"]
VOCABULARY = 50
# adapter_config.json of PEFT 0.10, which the reference pins; newer ones say more.
CONFIG = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "roberta-large",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": TARGETS,
    "task_type": "SEQ_CLS",
    "use_dora": False,
    "use_rslora": False,
}
RECONSTRUCTION = {
    "reconstruction_type": "svd",
    "reconstr_mode": "separated",
    "half_init_dec": False,
    "replacement_module_random_init": False,
    "r_squared": True,
    "svd": {"n_iter": 10, "random_state": 42, "rank": 4},
}


def roberta(labels: int = 2, seed: int = 0) -> RobertaForSequenceClassification:
    """A tiny random RoBERTa; its body is the same for every number of labels."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=20, num_labels=labels, **sizes, **dropout)
    with torch.random.fork_rng(), torch.no_grad():
        model = RobertaForSequenceClassification(config)
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "classifier" not in name:
                parameter.normal_(std=0.15)
            elif "embed" in name:
                parameter.normal_()
        torch.manual_seed(seed)
        for parameter in model.classifier.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def inputs() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(5))}


@dataclass(frozen=True)
class Trained:
    """What a run of the reference leaves: A, B, R and perhaps m by module, and a head."""

    parts: dict[str, dict[str, Tensor]]
    head: dict[str, Tensor]

    def drawn(self) -> Trained:
        """The same run from a basis drawn at random (replacement_module_random_init)."""
        generator = torch.Generator().manual_seed(11)
        parts = {}
        for key, found in self.parts.items():
            r, (N, K) = len(found["A"]), (len(found["B"]), found["A"].shape[1])
            a, b = (torch.rand(shape, generator=generator) * 2 - 1 for shape in ((r, K), (N, r)))
            parts[key] = {**found, "A": a / r**0.5, "B": b / N**0.5}
        return replace(self, parts=parts)

    def with_magnitudes(self, base: nn.Module) -> Trained:
        """The same run by the EDoRA code."""
        generator = torch.Generator().manual_seed(12)
        parts = {}
        for key, found in self.parts.items():
            lengths = base.get_submodule(key).weight.norm(dim=1)
            parts[key] = {**found, "m": lengths * (0.5 + torch.rand(lengths.shape, generator=generator))}
        return replace(self, parts=parts)


def train(base: nn.Module, rank: int = 4) -> Trained:
    """A, B as scikit-learn makes them, R far from its start, and another head."""
    from sklearn.decomposition import TruncatedSVD

    generator = torch.Generator().manual_seed(3)
    parts = {}
    for key, module in base.named_modules():
        if any(key.endswith(f".{target}") for target in TARGETS):
            columns = module.weight.detach().T.numpy()
            svd = TruncatedSVD(n_components=rank, n_iter=10, random_state=42).fit(columns)
            a, b = torch.from_numpy(svd.transform(columns).T), torch.from_numpy(svd.components_.T)
            parts[key] = {"A": a, "B": b, "R": torch.randn(rank, rank, generator=generator)}
    head = {name: 2 * p.detach() for name, p in base.named_parameters() if name.startswith("classifier")}
    return Trained(parts, head)


def forward(base: nn.Module, trained: Trained, scale: float = 2.0) -> Tensor:
    """Logits of the adapted model: every targeted layer's output plus s·B R A x, or EDoRA's, and the trained head."""
    model = copy.deepcopy(base)
    model.load_state_dict(trained.head, strict=False)
    for key, found in trained.parts.items():
        module, delta = model.get_submodule(key), scale * found["B"] @ found["R"] @ found["A"]
        with torch.no_grad():
            module.weight += delta
            if "m" in found:
                module.weight *= (found["m"] / module.weight.norm(dim=1))[:, None]
    with torch.no_grad():
        return model(**inputs()).logits


def write(
    folder: Path, trained: Trained, *, spelling: str = "peft 0.18", basis: bool = True, rename=None,
    reconstruction: dict | None = None, where: str = "parent", **config,
) -> Path:  # fmt: skip
    """The folder of a checkpoint: `folder`/checkpoint, with reconstr_config.json beside or in it.

    Args:
        folder: an empty one.
        trained: what to write.
        spelling: of R: "peft 0.18" and later, or "peft 0.17" and earlier.
        basis: write A and B.
        rename: a function of every tensor's name; None leaves a tensor out.
        reconstruction: changes of reconstr_config.json, or None for no such file.
        where: "parent" or "beside".
        config: changes of adapter_config.json.
    """
    core = ".default_lora_latent_mapping" if spelling == "peft 0.18" else "_lora_latent_mapping"
    names = {"A": ".lora_A.weight", "B": ".lora_B.weight", "R": f"{core}.weight", "m": ".lora_magnitude_vector"}
    tensors = {f"base_model.model.{name}": tensor for name, tensor in trained.head.items()}
    for key, found in trained.parts.items():
        for part, tensor in found.items():
            if basis or part not in "AB":
                tensors[f"base_model.model.{key}{names[part]}"] = tensor.contiguous()
    if rename is not None:
        tensors = {rename(name): tensor for name, tensor in tensors.items() if rename(name) is not None}
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(parents=True)
    save_file(tensors, checkpoint / "adapter_model.safetensors")
    (checkpoint / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    if reconstruction is not None:
        beside = folder if where == "parent" else checkpoint
        (beside / "reconstr_config.json").write_text(json.dumps({**RECONSTRUCTION, **reconstruction}))
    return checkpoint
