"""Advised ranks against one rank for all at equal size, and the choice of singular vectors, on three real text tasks.

Every run trains a LoRA-XS adapter and a head on a MiniLM encoder (the model, data and loop of the demo) and is one row
of benchmarks/results/advice.json; a run that is there is not repeated, so an interrupted benchmark goes on where it
was. Every arm tries the same learning rates with seed 0 and keeps the one of least dev loss for all seeds; the test
rows decide nothing.

    python -m benchmarks.advice                    all runs, on one thread: about an hour
    python -m benchmarks.advice --report           tables of the runs there are, and with --plots FOLDER figures

Arms: "uniform" and "advised" ranks at 2,304 and 9,216 parameters on every task; the top, middle, bottom or random
singular vectors at r = 8 on one task, with their own gain, and with A rescaled so that every direction has the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks._advice_report import draw, tables
from benchmarks._measure import RESULTS, environment, write_json
from examples.demo import fetch
from examples.demo.data import Task, load_tasks
from examples.demo.model import TARGETS, TextClassifier, count_trainable, load_encoder, load_tokenizer
from examples.demo.train import Settings, collate, correct, labels_of, predict, tokenise_task, train_adapter
from loraxs_ext import LoraXSConfig
from loraxs_ext.advisor import Advice, ModuleGradient, decide, fit_head, measure
from loraxs_ext.layers import LoraXSLayer

TASKS = ("movie", "product", "source")
BUDGETS = (2304, 9216)
ABLATED = "source"
VECTORS = ("top", "middle", "bottom", "random")
SEEDS = (0, 1, 2)
RATES = (4e-3, 1.2e-2)


@dataclass(frozen=True)
class Scale:
    """How much data a run sees, and how the advice is made; results of different scales do not mix."""

    rows: tuple[int, int, int] = (480, 200, 600)
    epochs: int = 2
    max_tokens: int = 24
    calibration: int = 256
    rank_max: int = 48


@dataclass(frozen=True)
class Arm:
    """What is compared: `budget` parameters for a task, shared out by `ranks`, in the directions `vectors`.

    ranks: "uniform" or "advised".
    gain: "own", or "equal" for an A rescaled to give every direction the same.
    """

    task: str
    budget: int
    ranks: str = "uniform"
    vectors: str = "top"
    gain: str = "own"


@dataclass(frozen=True)
class Run:
    """One training."""

    arm: Arm
    lr: float
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        """The fields of its row that tell it from all others."""
        return {**asdict(self.arm), "lr": self.lr, "seed": self.seed}


def arms() -> list[Arm]:
    """All arms, the most telling first. The top vectors of the ablation are the uniform arm of its task and budget."""
    both = ("uniform", "advised")
    return [
        *(Arm(task, BUDGETS[0], ranks) for task in TASKS for ranks in both),
        *(Arm(ABLATED, BUDGETS[0], vectors=vectors) for vectors in VECTORS if vectors != "top"),
        *(Arm(task, BUDGETS[1], ranks) for task in TASKS for ranks in both),
        *(Arm(ABLATED, BUDGETS[0], vectors=vectors, gain="equal") for vectors in VECTORS),
    ]


class Bench:
    """The encoder, the tokenised tasks, and the advice for each of them."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.encoder = fetch.fetch(fetch.ENCODER)
        tasks = load_tasks(fetch.fetch(fetch.SENTENCES), scale.rows)
        tokenizer = load_tokenizer(self.encoder)
        self.tasks: dict[str, Task] = {task.name: task for task in tasks}
        # Cut before the tokeniser's own limit: a row costs as many tokens as the longest of its batch.
        self.parts = {
            task.name: {
                part: _shortened(rows, scale.max_tokens) for part, rows in tokenise_task(tokenizer, task).items()
            }
            for task in tasks
        }
        self.width = max(len(task.classes) for task in tasks)
        self.gradients: dict[str, list[ModuleGradient]] = {}
        self.calibrated: dict[str, tuple[TextClassifier, list[dict[str, Tensor]]]] = {}

    def base(self) -> TextClassifier:
        """The frozen encoder with a head of zeros."""
        return TextClassifier(load_encoder(self.encoder), self.width)

    def advice(self, task: str, budget: int) -> Advice:
        """From the first training rows, behind a head fitted to them."""
        if task not in self.gradients:
            model, batches = self.calibration(task)
            self.gradients[task] = measure(model, batches, loraxs_config(), self.scale.rank_max, progress=False)
        return decide(self.gradients[task], budget, loraxs_config())

    def calibration(self, task: str) -> tuple[TextClassifier, list[dict[str, Tensor]]]:
        """A model whose head is fitted to the calibration rows, and these in batches."""
        if task in self.calibrated:
            return self.calibrated[task]
        rows = self.parts[task]["train"][: self.scale.calibration]
        batches = [collate(rows[start : start + 16]) for start in range(0, len(rows), 16)]
        model = self.base()
        fit_head(model, batches, list(model.head.parameters()), epochs=5, progress=False)
        self.calibrated[task] = model, batches
        return model, batches

    def config(self, arm: Arm) -> LoraXSConfig:
        """The adapter of an arm."""
        if arm.ranks == "advised":
            return self.advice(arm.task, arm.budget).advised_config
        rank = round((arm.budget / len(self.layer_names())) ** 0.5)
        return replace(loraxs_config(), r=rank, lora_alpha=rank, vectors=arm.vectors)

    def layer_names(self) -> list[str]:
        """The modules that can be adapted."""
        return [name for name, _ in _targets(self.base())]

    def train(self, run: Run, scratch: Path) -> dict[str, Any]:
        """Train, and measure on dev and test."""
        parts = self.parts[run.arm.task]
        config = replace(self.config(run.arm), init_seed=run.seed)
        torch.manual_seed(run.seed)
        model = get_peft_model(self.base(), config)
        if run.arm.gain == "equal":
            equalise_gain(model)
        settings = Settings(epochs=self.scale.epochs, adapter_lr=run.lr, seed=run.seed)
        # The loop looks at its dev rows after every epoch; here they are needed once.
        watched = {**parts, "dev": parts["dev"][:32]}
        _, seconds = train_adapter(model, watched, settings, scratch, run.arm.task)
        found: dict[str, Any] = {**run.key, "parameters": count_trainable(model)[0], "seconds": round(seconds, 1)}
        for part in ("dev", "test"):
            logits, labels = predict(model, parts[part]), labels_of(parts[part])
            found[f"{part}_accuracy"] = correct(logits, parts[part]).double().mean().item()
            found[f"{part}_loss"] = nn.functional.cross_entropy(logits, labels).item()
        return found


def loraxs_config() -> LoraXSConfig:
    """All linear layers of the encoder, scaling 1; ranks are still to come."""
    return LoraXSConfig(target_modules=TARGETS, modules_to_save=["head"])


def _shortened(rows: Sequence[dict], tokens: int) -> list[dict]:
    """The same rows with at most `tokens` token ids; the last one stays, which closes a text."""
    cut = [[*row["input_ids"][: tokens - 1], row["input_ids"][-1]][: len(row["input_ids"])] for row in rows]
    return [{**row, "input_ids": ids} for row, ids in zip(rows, cut, strict=True)]


def _targets(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in TARGETS:
            yield name, module


def equalise_gain(model: PeftModel) -> None:
    """Rescale the rows of A to the root mean square of all singular values of W: only directions are left to differ."""
    for layer in (module for module in model.modules() if isinstance(module, LoraXSLayer)):
        a, bt = layer.basis_rows(layer.basis_rank)
        gain = layer.frozen_weight().norm() / min(layer.in_features, layer.out_features) ** 0.5
        layer.set_basis(nn.functional.normalize(a, dim=1) * gain, bt)


def check(bench: Bench) -> dict[str, float]:
    """What must hold before a figure counts; the errors found.

    Raises:
        AssertionError: the measured energies are not those of a dense gradient, or an arm is larger than its budget.
    """
    model, batches = bench.calibration(TASKS[0])
    advice = bench.advice(TASKS[0], BUDGETS[0])
    name, module = list(_targets(model))[-1]
    module.weight.requires_grad_(True)
    for batch in batches:
        model(**batch)["loss"].backward()
    assert module.weight.grad is not None
    G = module.weight.grad.double()
    U, _, Vh = torch.linalg.svd(module.weight.detach().double(), full_matrices=False)
    measured = {m.name: m for m in advice.modules}[name].captured()
    assert measured is not None
    errors = []
    for rank in (1, 8, bench.scale.rank_max):
        dense = ((U[:, :rank].mT @ G @ Vh[:rank].mT).square().sum() / G.square().sum()).item()
        errors.append(abs(measured[rank - 1] / dense - 1))
    assert max(errors) < 1e-2, f"captured energy differs from a dense gradient's by {max(errors):.1e}"
    for task in TASKS:
        for budget in BUDGETS:
            found = bench.advice(task, budget)
            spent = sum(rank**2 for rank in found.advised.values())
            assert spent <= budget, f"{task}: {spent} parameters advised for a budget of {budget}"
    return {"largest relative error of a captured energy": max(errors)}


def pending(arm: Arm, rows: Sequence[Mapping[str, Any]]) -> list[Run]:
    """What is left to train of an arm: first every learning rate with the first seed, then the best with the others."""

    def row(run: Run) -> Mapping[str, Any] | None:
        return next((row for row in rows if all(row[k] == v for k, v in run.key.items())), None)

    tuning = [Run(arm, lr, SEEDS[0]) for lr in RATES]
    left = [run for run in tuning if row(run) is None]
    if left:
        return left
    best = best_rate(arm, rows)
    return [run for seed in SEEDS[1:] if row(run := Run(arm, best, seed)) is None]


def best_rate(arm: Arm, rows: Sequence[Mapping[str, Any]]) -> float:
    """The learning rate of least dev loss with the first seed."""
    tried = [row for row in rows if all(row[k] == v for k, v in asdict(arm).items()) and row["seed"] == SEEDS[0]]
    return min(tried, key=lambda row: row["dev_loss"])["lr"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="train nothing, report the runs there are")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw figures; needs matplotlib")
    parser.add_argument("--results", type=Path, default=RESULTS / "advice.json", help="default %(default)s")
    arguments = parser.parse_args(argv)
    if not arguments.report:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        benchmark(arguments.results, Scale())
    result = json.loads(arguments.results.read_text(encoding="utf-8"))
    print(tables(result))
    if arguments.plots:
        for path in draw(result, arguments.plots):
            print(path)
    return 0


def benchmark(path: Path, scale: Scale, plan: Sequence[Arm] | None = None) -> None:
    """Train what `path` lacks, and add it run by run.

    Args:
        path: of the results; made if it does not exist.
        scale: of every run.
        plan: arms; all of them if None.

    Raises:
        ValueError: the results are of another scale.
    """
    # One thread, as small products gain little from a second, and for figures that do not depend on the machine's.
    torch.set_num_threads(1)
    here = environment()
    bench = Bench(scale)
    wanted = json.loads(json.dumps(asdict(scale)))
    found: dict[str, Any] = {"scale": wanted, "rows": []}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["scale"] != wanted:
            raise ValueError(f"results: expected runs of {wanted}, got {found['scale']} in {path}")
    rows = found["rows"]
    checks = check(bench)
    advice = {f"{task}, {budget}": summary(bench.advice(task, budget)) for task in TASKS for budget in BUDGETS}
    plan = arms() if plan is None else plan
    total = sum(len(RATES) + len(SEEDS) - 1 for _ in plan)
    with tqdm(total=total, desc="runs", unit="run", disable=None) as bar, tempfile.TemporaryDirectory() as scratch:
        for arm in plan:
            while left := pending(arm, rows):
                bar.update(len(rows) - bar.n)
                rows.append(bench.train(left[0], Path(scratch)))
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(
                    path,
                    {"environment": here, "scale": wanted, "checks": checks, "advice": advice, "rows": rows},
                )


def summary(advice: Advice) -> dict[str, Any]:
    """What the tool said."""
    return {
        "uniform": max(advice.uniform.values()),
        "advised": advice.advised,
        "promise": advice.promise,
        "stands_out": advice.stands_out,
    }


if __name__ == "__main__":
    sys.exit(main())
