"""The bases of whole models on a GPU, against torch's own decompositions; every basis checked before it is timed.

python -m benchmarks.gpu.basis              prints the rows
python -m benchmarks.gpu.basis --dry-run    walks the same code on a CPU with tiny shapes; no figures
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import eigenproblems
from benchmarks.gpu.clock import timed
from benchmarks.gpu.cusolver import NotAvailable, Xgesvdr
from loraxs_ext.basis import Factors, Recipe, decompose
from loraxs_ext.basis.chebyshev import subspace_width

TOL = 1e-3
ROUNDS = 5
# Distinct matrices of a shape; the others are copies of them at another address, so that nothing stays in a cache.
DISTINCT = 3


class Model(NamedTuple):
    """Linear layers of a model, [N, K] and how many, the rank asked for, and the promised time."""

    name: str
    shapes: Mapping[tuple[int, int], int]
    rank: int
    dtype: torch.dtype
    limit_seconds: float | None


MODELS = (
    Model("RoBERTa-large", {(1024, 1024): 72, (1024, 4096): 24}, 25, torch.float32, 0.060),
    Model(
        "Llama-3-8B",
        {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32},
        64,
        torch.bfloat16,
        0.5,
    ),
)
TINY = (Model("tiny", {(320, 320): 3, (320, 400): 2}, 4, torch.float32, None),)


def measure(
    device: torch.device, *, dry: bool = False, bandwidth: float | None = None, flops: float | None = None
) -> list[dict[str, Any]]:
    """One row a model: seconds of every provider, its error, and the share of the limit; then the eigenproblems alone.

    Args:
        device: where to decompose.
        dry: tiny shapes; the rows hold no times.
        bandwidth, flops: bytes and fp32 operations per second that the device reaches; None leaves out the share.

    Raises:
        RuntimeError: a basis misses the tolerance, or A = BᵀW does not hold.
    """
    rows = [_measure(model, device, bandwidth, flops) for model in (TINY if dry else MODELS)]
    if dry:
        for row in rows:
            for figure in ("seconds", "spread_seconds", "speedup", "met", "share_of_limit"):
                row.pop(figure, None)
    return rows + eigenproblems.measure(device, dry=dry)


def _measure(model: Model, device: torch.device, bandwidth: float | None, flops: float | None) -> dict[str, Any]:
    weights = _weights(model, device)
    samples: list[float] = []
    found: dict[str, Factors] = {}
    for _ in range(ROUNDS + 1):
        found.clear()
        seconds, made = timed(lambda: decompose(weights, model.rank, Recipe(tol=TOL), progress=False), device)
        found.update(made)
        samples.append(seconds)
    judged = _one_of_each(weights)
    exact = {name: _left_vectors(weights[name], model.rank) for name in judged.values()}
    errors = [_check(name, weights[name], found[name], truth) for name, truth in exact.items()]
    # The first round compiles kernels and makes the handles of libraries.
    ours = statistics.median(samples[1:])
    peers, peer_errors, not_available = _peers(model, weights, exact)
    row: dict[str, Any] = {
        "kind": "basis",
        "model": model.name,
        "shapes": {f"{N}x{K}": count for (N, K), count in model.shapes.items()},
        "rank": model.rank,
        "dtype": str(model.dtype).removeprefix("torch."),
        "seconds": {"ours": ours, **peers},
        "spread_seconds": [min(samples[1:]), max(samples[1:])],
        "worst_error": {"ours": max(errors), **peer_errors},
        "speedup": {name: seconds / ours for name, seconds in peers.items()},
        "not_available": not_available,
        "limit_seconds": model.limit_seconds,
        "met": None if model.limit_seconds is None else ours <= model.limit_seconds,
    }
    if bandwidth is not None and flops is not None:
        row["share_of_limit"] = _limit(model, bandwidth, flops) / ours
    return row


def _weights(model: Model, device: torch.device) -> dict[str, Tensor]:
    """Noise under decaying spikes, as in trained language models."""
    generator = torch.Generator(device).manual_seed(0)
    weights = {}
    for (N, K), count in model.shapes.items():
        spikes = max(2 * model.rank // 3, 1)
        heights = 3 * (1 + (min(N, K) / max(N, K)) ** 0.5) * torch.arange(1, spikes + 1, device=device) ** -0.5
        distinct = []
        for _ in range(min(DISTINCT, count)):
            left, right = (torch.randn(n, spikes, device=device, generator=generator) / n**0.5 for n in (N, K))
            noise = torch.randn(N, K, device=device, generator=generator) / max(N, K) ** 0.5
            distinct.append((noise + (left * heights) @ right.mT).to(model.dtype))
        for i in range(count):
            weights[f"{N}x{K}.{i}"] = distinct[i % len(distinct)].clone()
    return weights


def _one_of_each(weights: Mapping[str, Tensor]) -> dict[tuple[int, ...], str]:
    """The name of one weight of each shape."""
    return {tuple(W.shape): name for name, W in reversed(weights.items())}


def _left_vectors(W: Tensor, rank: int) -> Tensor:
    """[N, rank] top left singular vectors in fp64, from the Gram matrix of the shorter side."""
    wide = W.double()
    if W.shape[0] <= W.shape[1]:
        return torch.linalg.eigh(wide @ wide.mT)[1][:, -rank:]
    return torch.linalg.qr(wide @ torch.linalg.eigh(wide.mT @ wide)[1][:, -rank:])[0]


def _sine(left: Tensor, exact: Tensor) -> float:
    """Sine of the largest angle between the spans of `left` [N, r] and of the orthonormal `exact` [N, r]."""
    Q = torch.linalg.qr(left.double())[0]
    return float(torch.linalg.matrix_norm(Q - exact @ (exact.mT @ Q), 2))


def _check(name: str, W: Tensor, found: Factors, exact: Tensor) -> float:
    """The true error of a basis; there is no figure for a wrong one."""
    residual = float((found.a - found.bt.double() @ W.double()).norm() / found.a.double().norm())
    error = _sine(found.bt.mT, exact)
    if residual > 1e-6 or error > TOL:
        raise RuntimeError(f"{name}: a = bt·W is off by {residual:.1e}, the subspace by {error:.1e}")
    return error


def _peers(
    model: Model, weights: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """Seconds for the model, from one matrix of each shape times their number, the worst error, and who is missing."""
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "torch.svd_lowrank": lambda W: torch.svd_lowrank(W.float(), model.rank, niter=2)[0],
        "torch.linalg.svd": lambda W: torch.linalg.svd(W.float(), full_matrices=False)[0][:, : model.rank],
    }
    not_available = {}
    try:
        xgesvdr = Xgesvdr(next(iter(weights.values())).device)
        for niter in (2, 10):
            calls[_xgesvdr(niter)] = lambda W, niter=niter: xgesvdr(W, model.rank, Recipe().n_oversamples, niter)
    except NotAvailable as reason:
        not_available = {_xgesvdr(niter): f"not available: {reason}" for niter in (2, 10)}
    seconds, errors = dict.fromkeys(calls, 0.0), dict.fromkeys(calls, 0.0)
    for shape, name in _one_of_each(weights).items():
        W = weights[name]
        for peer, call in list(calls.items()):
            try:
                # A complete decomposition takes seconds: a corner of the matrix is enough to make the handles.
                call(W[:256, :256])
                once, left = timed(lambda call=call, W=W: call(W), W.device)
            except NotAvailable as reason:
                not_available[peer] = f"not available: {reason}"
                del calls[peer], seconds[peer], errors[peer]
                continue
            seconds[peer] += once * model.shapes[shape[0], shape[1]]
            errors[peer] = max(errors[peer], _sine(left, exact[name]))
    return seconds, errors, not_available


def _xgesvdr(niter: int) -> str:
    return f"cuSOLVER Xgesvdr, niters={niter}"


def _limit(model: Model, bandwidth: float, flops: float) -> float:
    """Seconds below which no decomposition of the model can be: every weight read once, and once multiplied by l."""
    width = subspace_width(model.rank, Recipe().n_oversamples)
    size = sum(N * K * count for (N, K), count in model.shapes.items())
    return max(size * model.dtype.itemsize / bandwidth, 2.0 * size * width / flops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny shapes, no figures")
    arguments = parser.parse_args()
    for row in measure(torch.device("cpu" if arguments.dry_run else "cuda"), dry=arguments.dry_run):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
