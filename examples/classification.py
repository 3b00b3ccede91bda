"""Fine-tune a text classifier with LoRA-XS, then score it on test rows: what `loraxs train` and `loraxs eval` do.

python examples/classification.py --model roberta-large --train train.csv --test test.csv --output runs/sst2
"""

from __future__ import annotations

import argparse
import json

from loraxs_ext.training import make_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a transformers model, or its name")
    parser.add_argument("--train", required=True, help=".csv, .tsv or .jsonl file, or a `datasets` folder of one split")
    parser.add_argument("--dev", help="the same; without it a part of train")
    parser.add_argument("--test", help="the same; labels may be absent")
    parser.add_argument("--text", nargs="+", default=["sentence"], help="one or two text columns")
    parser.add_argument("--label", default="label", help="label column")
    parser.add_argument("--regression", action="store_true", help="predict a number")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", nargs="+", default="all-linear", help="modules to adapt")
    parser.add_argument("--lr", type=float, default=4e-3, help="learning rate of R")
    parser.add_argument("--head-lr", type=float, default=1e-2, help="learning rate of the head")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-from", help="adapter of another task, such as MNLI, to go on from")
    parser.add_argument("--output", required=True, help="the same command goes on here after an interruption")
    given = parser.parse_args()

    run = make_run(
        {
            "task": "classification",
            "output": given.output,
            "start_from": given.start_from,
            "model": {"name": given.model},
            "adapter": {"r": given.rank, "lora_alpha": given.rank, "target_modules": given.targets},
            "data": {name: getattr(given, name) for name in ("train", "dev", "test", "text", "label", "regression")},
            "training": {name: getattr(given, name) for name in ("lr", "head_lr", "epochs", "seed")},
        }
    )
    # The Trainer takes seconds to import, --help should not.
    from loraxs_ext.training.evaluate import evaluate
    from loraxs_ext.training.train import train

    print(json.dumps(train(run), indent=2))
    if given.test:
        print(json.dumps(evaluate(run), indent=2))


if __name__ == "__main__":
    main()
