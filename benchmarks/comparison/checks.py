"""What a method has to show before any of its figures count."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .methods import WEIGHTS, Method
from .training import optimiser, step, trainable

# LoRA-XS starts from R ~ N(0, 1e-10); the others differ from the frozen model by rounding at most.
START_TOLERANCE = 1e-3
RELOAD_TOLERANCE = 1e-5


class CheckFailed(RuntimeError):
    """A method does not do what its row of the table would claim."""


def check(
    method: Method, base: Callable[[], nn.Module], batch: Mapping[str, Tensor], parameters: int | None = None
) -> dict[str, Any]:
    """Hold a method to its claims on one batch, and measure what it stores.

    At the start its embeddings are the frozen model's; exactly its own parameters train, as many as claimed; three
    steps move all of them and nothing else; saved and put on a fresh model it gives the same logits.

    Args:
        method: who is checked.
        base: makes the frozen model, the same one each time.
        batch: input_ids, attention_mask and labels.
        parameters: trainable numbers to expect in the adapter; the method's own claim by default.

    Returns:
        parameters: trainable numbers of the adapter. head: those of the head. bytes: of the saved file without the
        tensors of the head. file_bytes: of the whole file.

    Raises:
        CheckFailed: with the method, what was expected and what came.
    """
    expected = _run(base().eval(), batch, "embedding")
    model = method.build(base(), seed=0)
    model.eval()
    _close(method, "embeddings at the start", _run(model, batch, "embedding"), expected, START_TOLERANCE)
    counted = _check_names(method, model, method.parameters if parameters is None else parameters)
    _check_steps(method, model, batch)
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reloaded = method.reload(base(), Path(folder)).eval()
        trained = _run(model, batch, "logits")
        _close(method, "logits after saving and loading", _run(reloaded, batch, "logits"), trained, RELOAD_TOLERANCE)
        if torch.equal(trained, torch.zeros_like(trained)):
            raise CheckFailed(f"{method.name}: logits after three steps: expected a trained head, got zeros")
        return {**counted, **stored_bytes(Path(folder))}


def stored_bytes(folder: Path) -> dict[str, int]:
    """Bytes of the saved file, and without the tensors of the head."""
    path = folder / WEIGHTS
    with safe_open(path, "pt") as file:
        head = sum(t.numel() * t.element_size() for n in file.keys() if "head." in n for t in [file.get_tensor(n)])
    return {"bytes": path.stat().st_size - head, "file_bytes": path.stat().st_size}


def _check_names(method: Method, model: nn.Module, parameters: int) -> dict[str, int]:
    """Exactly the claimed kinds of parameters train, in the claimed number."""
    kinds = {*method.trains, ".head."}
    found = trainable(model)
    strange = [name for name in found if not any(kind in name for kind in kinds)]
    missing = [kind for kind in kinds if not any(kind in name for name in found)]
    if strange or missing:
        raise CheckFailed(f"{method.name}: trainable: expected {sorted(kinds)}, got also {strange}, without {missing}")
    head = sum(p.numel() for name, p in found.items() if ".head." in name)
    adapter = sum(p.numel() for p in found.values()) - head
    if adapter != parameters:
        raise CheckFailed(f"{method.name}: trainable numbers: expected {parameters:,}, got {adapter:,}")
    return {"parameters": adapter, "head": head}


def _check_steps(method: Method, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Three steps (the head starts at zero, and so may one factor of the adapter) move what trains and nothing else."""
    names = trainable(model).keys()
    before = {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}
    optimizer = optimiser(model, method, method.rate)
    model.train()
    for _ in range(3):
        step(model, optimizer, batch)
    moved = {name for name, tensor in _tensors(model).items() if not torch.equal(tensor, before[name])}
    if moved != set(names):
        raise CheckFailed(
            f"{method.name}: tensors that three steps move: expected those that train, got also "
            f"{sorted(moved - set(names))}, without {sorted(set(names) - moved)}"
        )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def _run(model: nn.Module, batch: Mapping[str, Tensor], output: str) -> Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[output]


def _close(method: Method, what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not error <= tolerance:
        raise CheckFailed(f"{method.name}: {what}: expected a relative error of at most {tolerance:g}, got {error:.2g}")
