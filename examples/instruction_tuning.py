"""Tune a language model on prompts and responses with LoRA-XS, and check its answers before and after.

    python examples/instruction_tuning.py --model HuggingFaceTB/SmolLM2-135M-Instruct --template chat \\
        --train train.jsonl --test test.jsonl --answer answer --output runs/math

A test row is right if the number behind "The answer is" or "####" equals that of its reference.
"""

from __future__ import annotations

import argparse
import json

from loraxs_ext.training import make_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a transformers model, or its name")
    parser.add_argument("--train", required=True, help=".jsonl or .csv file, or a `datasets` folder of one split")
    parser.add_argument("--test", required=True, help="the same")
    parser.add_argument("--prompt", default="prompt", help="column of the prompt")
    parser.add_argument("--response", default="response", help="column of the response")
    parser.add_argument("--answer", help="column of the reference answer in test (default: the response)")
    parser.add_argument("--template", default="alpaca", help="alpaca, chat, plain, or a text with {prompt}")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--grader", default="number", help="number, last_number, choice or exact")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True, help="the same command goes on here after an interruption")
    given = parser.parse_args()

    run = make_run(
        {
            "task": "instruction",
            "output": given.output,
            "model": {"name": given.model},
            "adapter": {"r": given.rank, "lora_alpha": given.rank, "target_modules": "all-linear"},
            "data": {
                name: getattr(given, name) for name in ("train", "test", "prompt", "response", "answer", "template")
            },
            "training": {name: getattr(given, name) for name in ("lr", "epochs", "batch", "seed")},
            "generation": {"grader": given.grader, "max_new_tokens": given.max_new_tokens},
        }
    )
    # The Trainer takes seconds to import, --help should not.
    from loraxs_ext.training.evaluate import evaluate
    from loraxs_ext.training.train import train

    before = evaluate(run, base=True)
    print(json.dumps(train(run), indent=2))
    after = evaluate(run)
    for name, outcome in {"base model": before, "with the adapter": after}.items():
        print(f"{name:<18}{outcome['correct']} of {outcome['rows']} right ({outcome['exact_match']:.1%})")


if __name__ == "__main__":
    main()
