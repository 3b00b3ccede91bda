"""A training step of EDoRA over one of LoRA-XS, and of PEFT's DoRA over one of its LoRA, on the CPU.

    python -m benchmarks.edora            every cell, about two minutes on two cores
    python -m benchmarks.edora --quick    one layer and the model, shorter

A step is forward, backward and AdamW, of one layer or of a whole model of MiniLM's size. EDoRA's layer is checked
against the dense formula in fp64 first; then the four methods alternate, and ratios are taken within a round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from benchmarks._measure import alternate, ratio, summary, write_results
from loraxs_ext.layers import LoraXSLayer, LoraXSLinear
from loraxs_ext.peft import LoraXSConfig

RANK = 16
METHODS = ("LoRA-XS", "EDoRA", "PEFT LoRA", "PEFT DoRA")
# (width, M) of a square layer.
CELLS = ((384, 64), (384, 512), (384, 2048), (1024, 64), (1024, 512), (4096, 64), (4096, 512))
QUICK = ((384, 512),)
# Rows and tokens of the model's batch.
BATCH = (8, 64)
TARGET = 1.15


class _RandomBasis:
    """A `layers.BasisPolicy` for timing: which basis it is changes no time."""

    def settle(self, layer: LoraXSLayer) -> None:
        a = torch.randn(RANK, layer.in_features) / layer.in_features**0.5
        layer.set_basis(a, torch.randn(RANK, layer.out_features) / RANK**0.5)
        for name in layer.loraxs_R:
            layer.core(name).settled = True
        layer.settle_magnitudes(layer.frozen_weight)


def make_layer(method: str, weight: Tensor, bias: Tensor) -> nn.Module:
    """A layer over one frozen weight [N, K], adapted by `method` so that its output changes."""
    base = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    base.weight, base.bias = (nn.Parameter(t, requires_grad=False) for t in (weight, bias))
    if method.startswith("PEFT"):
        from peft.tuners.lora import Linear

        config = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", use_dora=method.endswith("DoRA"))
        return Linear(base, "default", config=config, r=RANK, lora_alpha=RANK)
    magnitude: Any = "detached" if method == "EDoRA" else None
    layer = LoraXSLinear(
        base, "layer", "default", {}, r=RANK, lora_alpha=RANK, policy=_RandomBasis(), init_weights=False,
        magnitude=magnitude,
    )  # fmt: skip
    layer.settle("default")
    return layer


def make_model(method: str) -> nn.Module:
    """A Bert of MiniLM-L6's widths and depth with random weights, the same for every method."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    model = BertModel(BertConfig(vocab_size=1000, **sizes), add_pooling_layer=False)
    targets = {"r": RANK, "lora_alpha": RANK, "target_modules": ["query", "value", "dense"]}
    if method.startswith("PEFT"):
        return get_peft_model(model, LoraConfig(**targets, use_dora=method.endswith("DoRA")))
    return get_peft_model(model, LoraXSConfig(**targets, use_edora=method == "EDoRA"))


def stepper(module: nn.Module, loss_of: Callable[[nn.Module], Tensor]) -> Callable[[], None]:
    """One training step of what `module` trains."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        loss_of(module).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Exact(NamedTuple):
    """y, dx, dR and dm of a layer."""

    y: Tensor
    dx: Tensor
    dR: Tensor
    dm: Tensor


def dense(layer: LoraXSLinear, x: Tensor, dy: Tensor, dtype: torch.dtype) -> Exact:
    """EDoRA by its definition in `dtype`: the adapted weight is formed, and its norm is a constant of the backward."""
    a, b = (part.to(dtype) for part in layer.get_basis("default"))
    weight, bias = (p.detach().to(dtype) for p in layer.get_base_layer().parameters())
    x, core, m = (
        t.detach().to(dtype).requires_grad_()
        for t in (x, layer.get_R("default"), layer.loraxs_magnitude["default"].weight)
    )
    moved = weight + layer.scaling["default"] * b @ core @ a
    y = (m / moved.norm(dim=1).detach()) * F.linear(x, moved) + bias
    return Exact(y.detach(), *torch.autograd.grad(y, (x, core, m), dy.to(dtype)))


def check(layer: LoraXSLinear, x: Tensor, dy: Tensor) -> None:
    """AssertionError unless every error against fp64 is at most twice that of the dense formula in fp32."""
    y = layer(x)
    leaves = (x, layer.get_R("default"), layer.loraxs_magnitude["default"].weight)
    ours = Exact(y.detach(), *torch.autograd.grad(y, leaves, dy))
    exact, plain = dense(layer, x, dy, torch.float64), dense(layer, x, dy, torch.float32)
    for name in Exact._fields:
        truth = getattr(exact, name)
        errors = [float((getattr(found, name) - truth).norm() / truth.norm()) for found in (ours, plain)]
        assert errors[0] <= 2 * errors[1] + 1e-6, f"{name}: error {errors[0]:.1e}, dense formula {errors[1]:.1e}"


def measure_layer(width: int, M: int, seconds: float) -> dict[str, Any]:
    """One row: a step of every method on one square layer."""
    torch.manual_seed(0)
    weight, bias = torch.randn(width, width) / width**0.5, torch.randn(width)
    x, dy = torch.randn(M, width, requires_grad=True), torch.randn(M, width)
    layers = {method: make_layer(method, weight, bias) for method in METHODS}
    check(layers["EDoRA"], x, dy)  # type: ignore[arg-type]
    steps = {name: stepper(layer, lambda layer: (layer(x) * dy).sum()) for name, layer in layers.items()}
    return row({"what": "layer", "width": width, "M": M}, alternate(steps, seconds))


def measure_model(seconds: float) -> dict[str, Any]:
    """One row: a step of every method on a whole model."""
    ids = torch.randint(0, 1000, BATCH)

    def loss_of(model: nn.Module) -> Tensor:
        return model(input_ids=ids).last_hidden_state.square().mean()

    steps = {method: stepper(make_model(method), loss_of) for method in METHODS}
    return row({"what": "model of MiniLM-L6's size", "M": BATCH[0] * BATCH[1]}, alternate(steps, seconds))


def row(cell: dict[str, Any], samples: dict[str, list[float]]) -> dict[str, Any]:
    found = {
        **cell,
        "r": RANK,
        "dtype": "fp32",
        "times": {name: summary(values) for name, values in samples.items()},
        "edora_over_loraxs": ratio(samples, "EDoRA", "LoRA-XS"),
        "dora_over_lora": ratio(samples, "PEFT DoRA", "PEFT LoRA"),
    }
    name = f"{cell['what']} {cell.get('width', '')} M={cell['M']}"
    times = "  ".join(f"{m} {found['times'][m]['median_us'] / 1e3:.2f} ms" for m in METHODS)
    ratios = f"EDoRA/LoRA-XS {found['edora_over_loraxs']:.2f}  DoRA/LoRA {found['dora_over_lora']:.2f}"
    print(f"{name:34} {times}  {ratios}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one layer and the model; nothing is written")
    arguments = parser.parse_args()
    seconds = 2.0 if arguments.quick else 8.0
    rows = [measure_layer(width, M, seconds) for width, M in (QUICK if arguments.quick else CELLS)]
    rows.append(measure_model(3 * seconds))
    if not arguments.quick:
        worst = max(row["edora_over_loraxs"] for row in rows)
        path = write_results("edora-cpu", rows, target=TARGET, worst=worst, model=rows[-1]["edora_over_loraxs"])
        print(f"worst ratio {worst:.2f}, promised {TARGET} for a model's step; written to {path}")


if __name__ == "__main__":
    main()
