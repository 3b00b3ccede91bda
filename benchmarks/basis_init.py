"""Time and accuracy of initialising a RoBERTa-large-shaped model, against the reference's scikit-learn call.

96 matrices: 24 layers of query, value and attention.output.dense (1024 × 1024) and output.dense (1024 × 4096), with
synthetic spectra: a slow power law with irregular gaps, and decaying spikes on top. Both sides see the same matrices in
turn, layer by layer; the reference is TruncatedSVD(n_components=r, n_iter=10, random_state=42) on fp32.

    python -m benchmarks.basis_init            all 24 layers, ranks 4 and 25
    python -m benchmarks.basis_init --quick    3 layers, nothing is written
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import sklearn
import torch
from sklearn.decomposition import TruncatedSVD
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks._measure import write_results
from loraxs_ext.basis import Recipe, decompose

SHAPES = {
    "query": (1024, 1024),
    "value": (1024, 1024),
    "attention.output.dense": (1024, 1024),
    "output.dense": (1024, 4096),
}
LAYERS, RANKS = 24, (4, 25)


def frame(n: int, k: int, generator: torch.Generator) -> Tensor:
    """[n, k] orthonormal columns."""
    return torch.linalg.qr(torch.randn(n, k, generator=generator)).Q


def spectrum(count: int, generator: torch.Generator) -> Tensor:
    """(i + jitter)^−α with α in [0.2, 0.4], raised at the top by decaying spikes: relative gaps of about 1e-2 at 25."""
    alpha, height = (torch.rand(2, generator=generator) * torch.tensor([0.2, 4.0]) + torch.tensor([0.2, 1.0])).tolist()
    index = torch.arange(1, count + 1) + (torch.rand(count, generator=generator) - 0.5) * 0.9
    return (index**-alpha * (1 + height * torch.exp(-index / 3))).sort(descending=True).values


def layers(count: int) -> list[dict[str, Tensor]]:
    """Weights by name, layer by layer; rows and signs of a few frames are shuffled, which is cheaper than new ones."""
    generator = torch.Generator().manual_seed(0)
    square, tall = frame(1024, 1024, generator), frame(4096, 1024, generator)

    def shuffled(columns: Tensor) -> Tensor:
        n, k = columns.shape
        signs = torch.randint(0, 2, (k,), generator=generator) * 2.0 - 1
        return columns[torch.randperm(n, generator=generator)] * signs

    def weight(N: int, K: int) -> Tensor:
        right = shuffled(square if K == 1024 else tall)
        return (shuffled(square) * spectrum(min(N, K), generator)) @ right.mT

    return [
        {f"encoder.layer.{layer}.{name}": weight(*shape) for name, shape in SHAPES.items()} for layer in range(count)
    ]


def reference(weights: Mapping[str, Tensor], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The reference's a and bt: its decoder (components) and encoder (transformed rows, normalised)."""
    found = {}
    for name, W in weights.items():
        svd = TruncatedSVD(n_components=rank, n_iter=10, random_state=42)
        encoded = svd.fit_transform(W.numpy())
        left = encoded / svd.singular_values_
        found[name] = (torch.from_numpy(svd.components_ * svd.singular_values_[:, None]), torch.from_numpy(left.T))
    return found


def ours(weights: Mapping[str, Tensor], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    found = decompose(weights, rank, Recipe(), progress=False)
    return {name: (factors.a, factors.bt) for name, factors in found.items()}


class Clock(NamedTuple):
    """Wall and processor seconds; the latter tell more on a machine that others use, at one thread."""

    wall: float
    cpu: float


def timed(call: Callable[[], Any]) -> tuple[Clock, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return Clock(time.perf_counter() - wall, time.process_time() - cpu), result


def sine(rows: Tensor, basis: Tensor) -> float:
    """Sine of the largest angle between the span of `rows` [r, N] and the orthonormal columns `basis` [N, r]."""
    Q = torch.linalg.qr(rows.double().mT).Q
    return float(torch.linalg.matrix_norm(Q - basis @ (basis.mT @ Q), 2))


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "worst": max(values)}


def compare(model: list[dict[str, Tensor]], rank: int, exact: Mapping[str, Tensor]) -> dict[str, Any]:
    """Time both sides in turn over all layers; accuracy of both on the matrices whose exact vectors are given."""
    clocks: dict[str, list[Clock]] = {"ours": [], "reference": []}
    apart, true_ours, true_reference = [], [], []
    sides = {"ours": ours, "reference": reference}
    for side in sides.values():
        side(model[0], rank)
    for number, weights in enumerate(model):
        found = {}
        for name in list(sides)[:: 1 if number % 2 else -1]:
            clock, found[name] = timed(lambda name=name, weights=weights: sides[name](weights, rank))
            clocks[name].append(clock)
        for name, W in weights.items():
            a, bt = found["ours"][name]
            residual = float((a - bt @ W).norm() / a.norm())
            if residual > 1e-6:
                raise SystemExit(f"{name}: a = bt·W is off by {residual:.1e}; no timing of a wrong result")
            apart.append(sine(found["reference"][name][1], torch.linalg.qr(bt.double().mT).Q))
            if name in exact:
                true_ours.append(sine(bt, exact[name][:, :rank]))
                true_reference.append(sine(found["reference"][name][1], exact[name][:, :rank]))
    if max(true_ours) > Recipe().tol:
        raise SystemExit(f"subspace error {max(true_ours):.1e} exceeds the tolerance; no timing of a wrong result")
    wall = {name: sum(clock.wall for clock in own) for name, own in clocks.items()}
    cpu = {name: sum(clock.cpu for clock in own) for name, own in clocks.items()}
    return {
        "rank": rank,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "speedup_wall": wall["reference"] / wall["ours"],
        "speedup_cpu": cpu["reference"] / cpu["ours"],
        "speedup_wall_by_layer": sorted(r.wall / o.wall for o, r in zip(*clocks.values(), strict=True)),
        "true_error_ours": spread(true_ours),
        "true_error_reference": spread(true_reference),
        "angle_between_the_two": spread(apart),
    }


def cached(model: list[dict[str, Tensor]], rank: int) -> dict[str, Any]:
    """Time for the whole model with an empty and with a filled cache, hashing included."""
    weights = {name: W for layer in model for name, W in layer.items()}
    with tempfile.TemporaryDirectory() as directory:
        cold, warm = (timed(lambda: decompose(weights, rank, cache_dir=directory, progress=False))[0] for _ in range(2))
    return {"rank": rank, "cache_cold": cold._asdict(), "cache_warm": warm._asdict()}


def show(row: Mapping[str, Any]) -> None:
    """One line of a row, numbers to three digits."""
    print(json.dumps(json.loads(json.dumps(row), parse_float=lambda text: float(f"{float(text):.3g}"))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 of the 24 layers")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1], help="of both sides")
    arguments = parser.parse_args()
    model = layers(3 if arguments.quick else LAYERS)
    judged = [name for layer in model[:3] for name in layer]
    everything = {name: W for layer in model for name, W in layer.items()}
    exact = {
        name: torch.linalg.eigh(everything[name].double() @ everything[name].double().mT)[1].flip(-1)[:, : max(RANKS)]
        for name in judged
    }
    rows = []
    for threads in sorted(set(arguments.threads)):
        torch.set_num_threads(threads)
        with threadpool_limits(threads):
            for rank in RANKS:
                rows.append({"threads": threads, **compare(model, rank, exact)})
                show(rows[-1])
            rows.append({"threads": threads, **cached(model, max(RANKS))})
            show(rows[-1])
    if not arguments.quick:
        path = write_results(
            "basis_init",
            rows,
            matrices=len(everything),
            matrices_judged_by_exact_svd=len(judged),
            scikit_learn=sklearn.__version__,
            cores=os.cpu_count(),
            load_average_at_the_end=os.getloadavg()[0],
        )
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
