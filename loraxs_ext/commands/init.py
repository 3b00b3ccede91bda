"""`loraxs init MODEL`: prepare the bases of a model folder before anyone trains or serves on it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

from loraxs_ext.basis import Factors, Recipe, decompose, write_basis_file
from loraxs_ext.basis.cache import cache_directory
from loraxs_ext.basis.distributed import broadcast_factors, is_running, raise_together, split_by_cost
from loraxs_ext.checkpoint.model_folder import Target, WeightStream, find_targets
from loraxs_ext.peft import LoraXSConfig

from .folders import DTYPES
from .summary import ModuleBasis, as_text, needs_matplotlib, plot

HELP = "prepare and cache the bases of a model"
DESCRIPTION = """
Compute the bases A and B of every targeted linear layer of a transformers model folder, stream its safetensors shard by
shard, and keep the results in the cache ($LORAXS_CACHE, by default ~/.cache/loraxs_ext). get_peft_model with the same
recipe then takes them from there. What is cached is not computed again, so an interrupted run goes on where it was.
Under torchrun every process computes its share. Exit status: 0 done, 1 failed (the reason is on stderr), 2 wrong usage.
"""
_DTYPES = {**DTYPES, "fp64": torch.float64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `loraxs init` takes."""
    parser.description = DESCRIPTION
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder with config.json and safetensors")
    what = parser.add_argument_group("what is decomposed (as in LoraXSConfig)")
    what.add_argument("--rank", type=int, default=LoraXSConfig.r, help="rank r of every module (default %(default)s)")
    what.add_argument(
        "--rank-pattern", action="append", type=_rank_of, metavar="NAME=R", default=[],
        help="another rank for modules of this name or regular expression; may be repeated",
    )  # fmt: skip
    what.add_argument(
        "--target-modules", nargs="+", metavar="NAME", default=["all-linear"],
        help="names of modules, or one regular expression (default: all linear layers but the head)",
    )  # fmt: skip
    what.add_argument("--exclude-modules", nargs="+", metavar="NAME", help="names of modules to leave out")
    how = parser.add_argument_group("the recipe (as in loraxs_ext.Recipe)")
    how.add_argument("--sigma", default="A", help='where Σ sits: "A" (the reference), "sqrt" or "B"')
    how.add_argument("--vectors", default="top", help='"top", "middle", "bottom" or "random"')
    how.add_argument("--svd", default="converged", help='"converged", "exact" or "reference"')
    how.add_argument("--sklearn-signs", default="rows of A", help='of "reference": "rows of A" or "columns of B"')
    how.add_argument("--sklearn-n-iter", type=int, default=Recipe.sklearn_n_iter, help='of "reference": iterations')
    how.add_argument("--sklearn-random-state", type=int, default=Recipe.sklearn_random_state, help="its seed")
    how.add_argument("--tol", type=float, default=Recipe.tol, help="bound on the subspace error (default %(default)s)")
    how.add_argument("--max-iter", type=int, default=Recipe.max_iter, help="Lanczos steps (default %(default)s)")
    how.add_argument("--n-oversamples", type=int, default=Recipe.n_oversamples, help="default %(default)s")
    how.add_argument("--seed", type=int, default=Recipe.seed, help="of the starting block (default %(default)s)")
    where = parser.add_argument_group("where and how it runs")
    where.add_argument("--device", default="cpu", help="torch device to decompose on (default %(default)s)")
    where.add_argument(
        "--dtype", choices=_DTYPES, help="precision the model will be loaded in (default: as stored)"
    )  # fmt: skip
    out = parser.add_argument_group("what is written")
    out.add_argument(
        "--output", type=Path, metavar="FILE", help="all bases in one file, for LoraXSConfig(basis_file=…)"
    )
    out.add_argument("--anchors", type=Path, metavar="FILE", help="only what finds the same bases again: kilobytes")
    out.add_argument("--plot", type=Path, metavar="FILE.png", help="plot of the spectra; needs matplotlib")
    out.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments say; the exit status."""
    try:
        if arguments.plot and (hint := needs_matplotlib()):
            raise ValueError(hint)
        for path in (arguments.output, arguments.anchors, arguments.plot):
            if path is not None and path.is_dir():
                raise ValueError(f"a file to write to must be named, got the folder {path}")
        with _processes() as first:
            text = prepare(arguments)
    except (ValueError, TypeError, OSError, RuntimeError, SafetensorError) as reason:
        print(f"loraxs init: {reason}", file=sys.stderr)
        return 1
    if first:
        print(text)
    return 0


@contextlib.contextmanager
def _processes() -> Iterator[bool]:
    """Join the processes that torchrun started, if it did; whether this is the first, or the only one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    # Factors and errors are exchanged on the CPU, whatever computes.
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def prepare(arguments: argparse.Namespace) -> str:
    """Compute, cache and write; the report, as text or JSON.

    Raises:
        ValueError, TypeError, OSError, RuntimeError, SafetensorError: with a message for the user.
    """
    started = time.perf_counter()
    config, recipe = _config(arguments), _recipe(arguments)
    targets = find_targets(arguments.model, config)
    factors, facts = _decompose(targets, recipe, arguments)
    modules = [ModuleBasis(t.key, t.shape, t.rank, *facts[t.key], tuple(factors[t.key].s.tolist())) for t in targets]
    address = None
    if not is_running() or dist.get_rank() == 0:
        for path, anchors_only in ((arguments.output, False), (arguments.anchors, True)):
            if path is not None:
                address = write_basis_file(path, recipe, factors, anchors_only=anchors_only)
        if arguments.plot:
            plot(modules, arguments.plot, f"{arguments.model.resolve().name}: singular values, rank {arguments.rank}")
    seconds = time.perf_counter() - started
    written = {name: str(path) for name in ("output", "anchors", "plot") if (path := getattr(arguments, name))}
    cache = str(cache_directory("default"))
    if not arguments.json:
        total = f"{len(modules)} modules in {seconds:.1f} s; cached in {cache}"
        return "\n".join([as_text(modules, recipe.tol), total, *(f"{name}: {path}" for name, path in written.items())])
    report = {
        "model": str(arguments.model),
        "recipe": recipe.to_dict(),
        "modules": [module.to_dict() for module in modules],
        "seconds": seconds,
        "cache": cache,
        "address": address,
        **written,
    }
    return json.dumps(report, indent=2)


def _decompose(
    targets: Sequence[Target], recipe: Recipe, arguments: argparse.Namespace
) -> tuple[dict[str, Factors], dict[str, tuple[float, float, float]]]:
    """Factors by module key, and for each energy, subspace error and seconds; on every process."""
    device = torch.device(arguments.device)
    if device.type != "cpu" and device.index is None:
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
    me, world = (dist.get_rank(), dist.get_world_size()) if is_running() else (0, 1)
    shapes, ranks = {t.key: t.shape for t in targets}, {t.key: t.rank for t in targets}
    shares = split_by_cost(shapes, ranks, world)
    mine = [t for t in targets if t.key in set(shares[me])]
    stream = WeightStream(_DTYPES.get(arguments.dtype))
    found: dict[str, Factors] = {}
    facts = torch.zeros(len(targets), 3, dtype=torch.float64)
    place = {t.key: i for i, t in enumerate(targets)}
    failure: Exception | None = None
    with tqdm(total=len(mine), desc="basis", unit="matrix", disable=None if me == 0 else True) as bar:
        try:
            for batch in _batches(mine, device):
                started = time.perf_counter()
                weights = {t.key: partial(stream.read, t) for t in batch}
                with warnings.catch_warnings():
                    # The table marks what missed the tolerance.
                    warnings.filterwarnings("ignore", ".* miss the subspace tolerance", RuntimeWarning)
                    done = decompose(weights, ranks, recipe, cache_dir="default", progress=False, compute_device=device)
                share = (time.perf_counter() - started) / len(batch)
                for key, factors in done.items():
                    energy = float(factors.s.double().square().sum()) / (stream.energies[key] or 1.0)
                    facts[place[key]] = torch.tensor([energy, factors.subspace_error, share])
                found |= done
                bar.update(len(batch))
        except Exception as error:
            if world == 1:
                raise
            failure = error
        finally:
            stream.close()
    if world > 1:
        raise_together(failure, None)
        dist.all_reduce(facts)
        owners = {key: i for i, share in enumerate(shares) for key in share}
        found = broadcast_factors(found, owners, shapes, None)
    rows = facts.tolist()
    return found, {key: (rows[i][0], rows[i][1], rows[i][2]) for key, i in place.items()}


def _batches(targets: Sequence[Target], device: torch.device) -> list[list[Target]]:
    """What is decomposed in one call: a shard, for an accelerator wants many at once; on a CPU a single weight."""
    if device.type == "cpu":
        return [[target] for target in targets]
    shards: dict[Path, list[Target]] = {}
    for target in targets:
        shards.setdefault(target.shard, []).append(target)
    return list(shards.values())


def _config(arguments: argparse.Namespace) -> LoraXSConfig:
    names = arguments.target_modules
    one = len(names) == 1 and (names[0] == "all-linear" or any(sign in names[0] for sign in "*+?()[]|\\^$"))
    return LoraXSConfig(
        r=arguments.rank,
        rank_pattern=dict(arguments.rank_pattern),
        target_modules=names[0] if one else names,
        exclude_modules=arguments.exclude_modules,
    )


def _recipe(arguments: argparse.Namespace) -> Recipe:
    sklearn = ("sklearn_signs", "sklearn_n_iter", "sklearn_random_state")
    fields = ("sigma", "vectors", "svd", *sklearn, "tol", "max_iter", "n_oversamples", "seed")
    return Recipe(**{name: getattr(arguments, name) for name in fields})


def _rank_of(text: str) -> tuple[str, int]:
    name, _, rank = text.rpartition("=")
    if not name or not rank.isdigit():
        raise argparse.ArgumentTypeError(f"expected NAME=R with a whole number R, got {text!r}")
    return name, int(rank)
