"""Time and accuracy of the bases of a RoBERTa-large-shaped model, against scikit-learn and torch, on this CPU.

96 matrices: 24 layers of query, value and attention.output.dense (1024 × 1024) and output.dense (1024 × 4096). A few
matrices of each shape and kind of spectrum are timed, all providers in turn, and the sum for 96 is extrapolated from
them; ours gets those of a shape in one call, as when it decomposes a model, the others one after the other. Spectra:
"flat", a slow power law with irregular gaps; "spiked", a flat bulk under decaying spikes, as in trained language
models. Every error is the sine of the largest angle to the subspace of a complete fp64 decomposition.

    python -m benchmarks.basis_init            ranks 4, 16, 25 and 64, on one thread and on all: about ten minutes
    python -m benchmarks.basis_init --quick    one matrix of each kind on one thread, nothing is written
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

# Shape of a weight and how many of them the model has.
SHAPES = {(1024, 1024): 72, (1024, 4096): 24}
RANKS = (4, 16, 25, 64)
TOL = 1e-3
# scikit-learn's power iteration is stopped here even where it has not reached the tolerance.
MAX_ITER = 200
# What takes longer than this is timed once.
LONG_SECONDS = 1.0
# The threads of a BLAS go on spinning for a while after its last product, on the cores of whoever is timed next.
REST_SECONDS = 0.15


def frame(n: int, k: int, generator: torch.Generator) -> Tensor:
    """[n, k] orthonormal columns."""
    return torch.linalg.qr(torch.randn(n, k, generator=generator)).Q


def flat(N: int, K: int, generator: torch.Generator) -> Tensor:
    """σ_i = (i + jitter)^−α with α in [0.2, 0.4]: relative gaps of about 1e-2 at i = 25."""
    count = min(N, K)
    alpha = 0.2 + 0.2 * float(torch.rand((), generator=generator))
    index = torch.arange(1, count + 1) + (torch.rand(count, generator=generator) - 0.5) * 0.9
    sigma = (index**-alpha).sort(descending=True).values
    return (frame(N, count, generator) * sigma) @ frame(K, count, generator).mT


def spiked(N: int, K: int, generator: torch.Generator) -> Tensor:
    """Gaussian noise with 20 to 40 directions above it, the largest three times as long as the edge of the noise."""
    noise = torch.randn(N, K, generator=generator) / max(N, K) ** 0.5
    count = 20 + int(torch.randint(0, 21, (), generator=generator))
    edge = 1 + (min(N, K) / max(N, K)) ** 0.5
    heights = 3 * edge * torch.arange(1, count + 1) ** -(0.5 + 0.2 * float(torch.rand((), generator=generator)))
    return noise + (frame(N, count, generator) * heights) @ frame(K, count, generator).mT


SPECTRA: Mapping[str, Callable[[int, int, torch.Generator], Tensor]] = {"flat": flat, "spiked": spiked}


class Case(NamedTuple):
    """A weight, the left singular vectors of a complete decomposition, and what power iteration needs on it."""

    W: Tensor
    exact: Tensor
    needed: Mapping[int, int]


def make_case(spectrum: str, shape: tuple[int, int], seed: int) -> Case:
    W = SPECTRA[spectrum](*shape, torch.Generator().manual_seed(seed))
    wide = W.double()
    exact = torch.linalg.eigh(wide @ wide.mT)[1].flip(-1)[:, : max(RANKS)].clone()
    return Case(W, exact, {rank: iterations_needed(W, exact, rank) for rank in RANKS})


def sine(columns: Tensor, exact: Tensor) -> float:
    """Sine of the largest angle between the span of `columns` [N, r] and that of the orthonormal `exact` [N, r]."""
    Q = torch.linalg.qr(columns.double()).Q
    return float(torch.linalg.matrix_norm(Q - exact @ (exact.mT @ Q), 2))


def iterations_needed(W: Tensor, exact: Tensor, rank: int) -> int:
    """Power iterations after which r + 10 vectors hold the subspace of r to `TOL`; `MAX_ITER` if that is not enough."""
    rows = torch.randn(rank + 10, W.shape[1], generator=torch.Generator().manual_seed(1)) @ W.mT
    for iteration in range(MAX_ITER):
        rows = torch.linalg.qr(rows.mT).Q.mT
        image = rows @ W
        if iteration % 2 == 0 or iteration < 12:
            rotation = torch.linalg.eigh(image.double() @ image.double().mT)[1].flip(-1)[:, :rank]
            if sine(rows.double().mT @ rotation, exact[:, :rank]) <= TOL:
                return max(iteration, 1)
        rows = image @ W.mT
    return MAX_ITER


def scikit_learn(W: Tensor, rank: int, n_iter: int) -> Tensor:
    """B of the LoRA-XS code, with its number of iterations or another one."""
    svd = TruncatedSVD(n_components=rank, n_iter=n_iter, random_state=42)
    # fit_transform also makes what becomes A.
    svd.fit_transform(W.numpy().T)
    return torch.from_numpy(svd.components_).mT


def ours(weights: list[Tensor], rank: int, recipe: Recipe) -> list[Tensor]:
    found = decompose({str(i): W for i, W in enumerate(weights)}, rank, recipe, progress=False)
    return [factors.bt.mT for factors in found.values()]


# What is asked for, and who answers; ratios are taken of the first two and of the next two.
OURS, SKLEARN = "ours to 1e-3", "scikit-learn to 1e-3"
OURS_LOOSE, SKLEARN_CALL = "ours to the accuracy of the reference call", "scikit-learn, reference call"
OURS_REFERENCE, LOWRANK, COMPLETE = "ours, svd='reference'", "torch.svd_lowrank", "torch.linalg.svd"


def providers(cases: list[Case], rank: int) -> dict[str, Callable[[], list[Tensor]]]:
    """Who competes on the matrices of one shape."""
    weights = [case.W for case in cases]
    reached = min(sine(scikit_learn(case.W, rank, 10), case.exact[:, :rank]) for case in cases)
    loose = Recipe(tol=min(max(reached, TOL), 0.5))
    return {
        OURS: lambda: ours(weights, rank, Recipe(tol=TOL)),
        SKLEARN: lambda: [scikit_learn(case.W, rank, case.needed[rank]) for case in cases],
        OURS_LOOSE: lambda: ours(weights, rank, loose),
        SKLEARN_CALL: lambda: [scikit_learn(W, rank, 10) for W in weights],
        OURS_REFERENCE: lambda: ours(weights, rank, Recipe(svd="reference")),
        LOWRANK: lambda: [torch.svd_lowrank(W, rank, niter=2)[0] for W in weights],
    }


def measure(
    calls: Mapping[str, Callable[[], list[Tensor]]], exact: list[Tensor], rounds: int
) -> dict[str, dict[str, float]]:
    """Median seconds on the wall and of the processor, and the worst error, of every provider; the first round warms
    up."""
    found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": [], "error": []} for name in calls}
    for number in range(rounds + 1):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            seen = found[name]
            if seen["wall"] and seen["wall"][0] > LONG_SECONDS:
                continue
            if torch.get_num_threads() > 1:
                time.sleep(REST_SECONDS)
            wall, cpu = time.perf_counter(), time.process_time()
            bases = calls[name]()
            seen["wall"].append(time.perf_counter() - wall)
            seen["cpu"].append(time.process_time() - cpu)
            seen["error"].append(max(sine(columns, truth) for columns, truth in zip(bases, exact, strict=True)))
    return {
        name: {key: statistics.median(values[1:] or values) for key, values in seen.items()}
        for name, seen in found.items()
    }


def check(case: Case, rank: int, name: str) -> None:
    """Stop unless the basis is right: there is no timing of a wrong result."""
    found = decompose({"w": case.W}, rank, Recipe(tol=TOL), progress=False)["w"]
    residual = float((found.a - found.bt @ case.W).norm() / found.a.norm())
    error = sine(found.bt.mT, case.exact[:, :rank])
    if residual > 1e-6 or error > TOL:
        raise SystemExit(f"{name}, rank {rank}: a = bt·W is off by {residual:.1e}, the subspace by {error:.1e}")


def compare(cases: Mapping[tuple[int, int], list[Case]], rank: int, rounds: int) -> dict[str, Any]:
    """One rank of one kind of spectrum: every provider's time for the whole model, and its worst error."""
    wall: dict[str, float] = {}
    cpu: dict[str, float] = {}
    error: dict[str, float] = {}
    for shape, own in cases.items():
        for number, case in enumerate(own):
            check(case, rank, f"matrix {number} of {shape}")
        for name, seen in measure(providers(own, rank), [case.exact[:, :rank] for case in own], rounds).items():
            wall[name] = wall.get(name, 0.0) + seen["wall"] * SHAPES[shape] / len(own)
            cpu[name] = cpu.get(name, 0.0) + seen["cpu"] * SHAPES[shape] / len(own)
            error[name] = max(error.get(name, 0.0), seen["error"])
    return {
        "rank": rank,
        "seconds_for_96": wall,
        "processor_seconds_for_96": cpu,
        "worst_error": error,
        "iterations_scikit_learn_needs": {str(s): [case.needed[rank] for case in own] for s, own in cases.items()},
        "speedup_to_1e-3": wall[SKLEARN] / wall[OURS],
        "speedup_at_reference_accuracy": wall[SKLEARN_CALL] / wall[OURS_LOOSE],
        "speedup_of_the_reference_basis": wall[SKLEARN_CALL] / wall[OURS_REFERENCE],
    }


def complete(cases: Mapping[tuple[int, int], list[Case]]) -> float:
    """Seconds that torch.linalg.svd would take for the model, whatever the rank; one matrix of each shape is timed."""
    total = 0.0
    for shape, own in cases.items():
        start = time.perf_counter()
        torch.linalg.svd(own[0].W, full_matrices=False)
        total += (time.perf_counter() - start) * SHAPES[shape]
    return total


def cached(cases: Mapping[tuple[int, int], list[Case]], rank: int) -> dict[str, Any]:
    """Seconds for a few matrices with an empty and with a filled cache, hashing included."""
    weights = {f"{shape}-{i}": case.W for shape, own in cases.items() for i, case in enumerate(own)}
    seconds = []
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(2):
            start = time.perf_counter()
            decompose(weights, rank, cache_dir=directory, progress=False)
            seconds.append(time.perf_counter() - start)
    return {"rank": rank, "matrices": len(weights), "cache_cold_seconds": seconds[0], "cache_warm_seconds": seconds[1]}


def judge(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """What was promised of these figures: true where every row keeps it."""
    compared = [row for row in rows if "speedup_to_1e-3" in row]
    return {
        "to 1e-3: 2 times faster than scikit-learn everywhere": all(r["speedup_to_1e-3"] >= 2 for r in compared),
        "to 1e-3: 3 times faster on spiked spectra": all(
            r["speedup_to_1e-3"] >= 3 for r in compared if r["spectrum"] == "spiked"
        ),
        "at the reference's accuracy: not slower than its call": all(
            r["speedup_at_reference_accuracy"] >= 1 for r in compared
        ),
    }


def show(row: Mapping[str, Any]) -> None:
    """One line of a row, numbers to three digits."""
    print(json.dumps(json.loads(json.dumps(row), parse_float=lambda text: float(f"{float(text):.3g}"))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one matrix of each kind on one thread")
    parser.add_argument("--threads", type=int, nargs="+", help="of all providers; default 1 and all")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, choices=RANKS)
    parser.add_argument("--matrices", type=int, default=4, help="of each shape and spectrum that are timed")
    parser.add_argument("--rounds", type=int, default=3, help="of timing each")
    arguments = parser.parse_args()
    count = 1 if arguments.quick else arguments.matrices
    threads = arguments.threads or ([1] if arguments.quick else sorted({1, os.cpu_count() or 1}))
    cases = {
        spectrum: {shape: [make_case(spectrum, shape, seed) for seed in range(count)] for shape in SHAPES}
        for spectrum in SPECTRA
    }
    rows: list[dict[str, Any]] = []
    for number in threads:
        torch.set_num_threads(number)
        with threadpool_limits(number):
            for spectrum, own in cases.items():
                for rank in arguments.ranks:
                    found = compare(own, rank, arguments.rounds)
                    rows.append({"threads": number, "spectrum": spectrum, **found})
                    show(rows[-1])
            rows.append({"threads": number, COMPLETE: {"seconds_for_96": complete(cases["flat"])}})
            show(rows[-1])
            rows.append({"threads": number, **cached(cases["flat"], max(arguments.ranks))})
            show(rows[-1])
    targets = judge(rows)
    show(targets)
    if not arguments.quick:
        path = write_results(
            "basis_init",
            rows,
            targets=targets,
            matrices=sum(SHAPES.values()),
            matrices_timed_of_each_shape_and_spectrum=count,
            scikit_learn=sklearn.__version__,
            cores=os.cpu_count(),
            load_average_at_the_end=os.getloadavg()[0],
        )
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
