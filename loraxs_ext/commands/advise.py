"""`loraxs advise MODEL --data FILE --budget N`: which rank each module should get, from one backward pass."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from loraxs_ext.advisor import RANK_MAX, advise, explain, fit_head, load, read_texts, table, to_dict
from loraxs_ext.files import atomic_file
from loraxs_ext.peft import LoraXSConfig

from .advice_plot import plot
from .summary import needs_matplotlib

HELP = "advise ranks for a budget of parameters"
DESCRIPTION = """
Run one backward pass over calibration text and say how a budget of parameters (the sum of r² over all modules) is best
spent: a table, an explanation, and a configuration ready to use. It costs about as much as one epoch over the rows.
Exit status: 0 done, 1 failed (the reason is on stderr), 2 wrong usage.
"""
EPILOG = """
examples:
  loraxs advise ./model --data reviews.csv --task classification --budget 9216
  loraxs advise ./model --data prompts.jsonl --text-field prompt --task causal --budget 57344 --output advice.json

use:
  config = LoraXSConfig(task_type="SEQ_CLS", **json.load(open("advice.json"))["config"])
"""
_YAML = (".yaml", ".yml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `loraxs advise` takes."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder with config.json, safetensors and tokeniser")
    parser.add_argument(
        "--budget", type=int, required=True, metavar="N", help="parameters that all R may have together"
    )
    data = parser.add_argument_group("calibration data")
    data.add_argument("--data", type=Path, required=True, metavar="FILE", help=".jsonl, .csv or .txt, in UTF-8")
    data.add_argument("--task", choices=("causal", "classification"), required=True, help="what the loss is")
    data.add_argument("--text-field", default="text", metavar="NAME", help="column of the text (default %(default)s)")
    data.add_argument(
        "--label-field", default="label", metavar="NAME", help="column of the class (default %(default)s)"
    )
    data.add_argument("--rows", type=int, default=256, help="rows drawn from the file (default %(default)s)")
    data.add_argument("--batch", type=int, default=8, help="rows a batch (default %(default)s)")
    data.add_argument("--max-tokens", type=int, default=128, help="longer rows are cut (default %(default)s)")
    data.add_argument("--seed", type=int, default=0, help="of the draw and of a new head (default %(default)s)")
    what = parser.add_argument_group("what is adapted (as in LoraXSConfig)")
    what.add_argument(
        "--target-modules", nargs="+", metavar="NAME", default=["all-linear"],
        help="names of modules, or one regular expression (default: all linear layers but the head)",
    )  # fmt: skip
    what.add_argument("--exclude-modules", nargs="+", metavar="NAME", help="names of modules to leave out")
    what.add_argument("--rank-max", type=int, default=RANK_MAX, help="largest rank of a module (default %(default)s)")
    what.add_argument("--scaling", type=float, default=1.0, help="alpha / r in every module (default %(default)s)")
    how = parser.add_argument_group("how it runs")
    how.add_argument("--device", default="cpu", help="torch device (default %(default)s)")
    how.add_argument(
        "--gradient-memory", type=float, default=2.0, metavar="GIB",
        help="for the full gradients that captured energy is a share of: models that need more take several passes; "
        "0 leaves these shares out (default %(default)s)",
    )  # fmt: skip
    out = parser.add_argument_group("what is written")
    out.add_argument(
        "--ranks", choices=("recommended", "uniform", "advised"), default="recommended",
        help='which ranks "config" of the output holds (default %(default)s)',
    )  # fmt: skip
    out.add_argument("--output", type=Path, metavar="FILE", help="everything as .json, or .yaml (needs PyYAML)")
    out.add_argument("--plot", type=Path, metavar="FILE.png", help="figure of energies and ranks; needs matplotlib")
    out.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments say; the exit status."""
    try:
        _check(arguments)
        text = _advise(arguments)
    except (ValueError, TypeError, OSError, RuntimeError, SafetensorError) as reason:
        print(f"loraxs advise: {reason}", file=sys.stderr)
        return 1
    print(text)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """What can be known to be wrong before the model is loaded."""
    for name in ("budget", "rows", "batch", "max_tokens", "rank_max"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(arguments, name)}")
    if not arguments.scaling > 0:
        raise ValueError(f"--scaling: expected a positive number, got {arguments.scaling}")
    if not arguments.gradient_memory >= 0:
        raise ValueError(f"--gradient-memory: expected at least 0 GiB, got {arguments.gradient_memory}")
    if arguments.plot and (hint := needs_matplotlib()):
        raise ValueError(hint)
    for path in (arguments.output, arguments.plot):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"expected a file in a folder that exists, got {path}")
    if arguments.output is not None:
        if arguments.output.suffix not in (".json", *_YAML):
            raise ValueError(f"--output: expected a .json or .yaml file, got {arguments.output.name!r}")
        if arguments.output.suffix in _YAML and importlib.util.find_spec("yaml") is None:
            raise ValueError('--output: .yaml needs PyYAML: pip install "loraxs-ext[train]"')


def _advise(arguments: argparse.Namespace) -> str:
    classifies = arguments.task == "classification"
    data = read_texts(
        arguments.data, arguments.rows, text=arguments.text_field,
        label=arguments.label_field if classifies else None, seed=arguments.seed,
    )  # fmt: skip
    subject = load(
        arguments.model, arguments.task, data, batch=arguments.batch, max_tokens=arguments.max_tokens,
        device=arguments.device, seed=arguments.seed,
    )  # fmt: skip
    progress = sys.stderr.isatty()
    fit_head(subject.model, subject.batches, subject.new, progress=progress)
    advice = advise(
        subject.model, subject.batches, arguments.budget, _config(arguments), rank_max=arguments.rank_max,
        gradient_memory=int(arguments.gradient_memory * 2**30), progress=progress,
    )  # fmt: skip
    choice = advice.recommended if arguments.ranks == "recommended" else arguments.ranks
    report = {
        "model": str(arguments.model), "task": arguments.task, "data": str(arguments.data), "rows": len(data.texts),
        "new_head": bool(subject.new), **to_dict(advice, choice),
    }  # fmt: skip
    if arguments.output:
        _write(arguments.output, report)
    if arguments.plot:
        plot(advice, arguments.plot, f"{arguments.model.resolve().name}: {arguments.budget:,} parameters")
    if arguments.json:
        return json.dumps(report, indent=2)
    head = "The model had no head for these classes: one was fitted to the calibration rows.\n" if subject.new else ""
    config = json.dumps(report["config"], indent=2)
    return f"{table(advice)}\n\n{head}{explain(advice)}\n\nLoraXSConfig arguments ({choice} ranks):\n{config}"


def _config(arguments: argparse.Namespace) -> LoraXSConfig:
    names = arguments.target_modules
    one = len(names) == 1 and (names[0] == "all-linear" or any(sign in names[0] for sign in "*+?()[]|\\^$"))
    return LoraXSConfig(
        lora_alpha=arguments.scaling * LoraXSConfig.r,
        target_modules=names[0] if one else names,
        exclude_modules=arguments.exclude_modules,
        task_type="SEQ_CLS" if arguments.task == "classification" else "CAUSAL_LM",
    )


def _write(path: Path, report: dict[str, Any]) -> None:
    """The report as JSON or YAML, complete or not at all."""
    text = json.dumps(report, indent=2) + "\n"
    if path.suffix in _YAML:
        import yaml

        text = yaml.safe_dump(report, sort_keys=False, allow_unicode=True)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
