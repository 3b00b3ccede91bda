"""`python -m examples.demo`: fine-tune three LoRA-XS adapters on real text, serve them in one batch, write a report."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Everything comes from ordinary packages; a hub must not be asked, not even for a model card.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def main(argv: list[str] | None = None) -> int:
    """Run the demo; the exit status is 0 when every check holds, 1 when one does not, 3 when data can't be had."""
    arguments = _parse(argv)
    # Late, so that --help and a mistyped option are answered at once.
    from .fetch import FetchError
    from .run import run

    try:
        return run(arguments)
    except FetchError as error:
        print(f"The demo needs a package it could not get. {error}", file=sys.stderr)
        return 3


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for adapters and report")
    parser.add_argument("--seed", type=int, default=0, help="seed of training; the data split never changes")
    parser.add_argument("--rank", type=int, default=16, help="rank r of the adapters")
    parser.add_argument("--fresh", action="store_true", help="train again what an earlier run has trained")
    parser.add_argument("--compare", action="store_true", help="train plain LoRAs too: about three times as long")
    parser.add_argument("--quick", action="store_true", help="a few rows only: shows that it works, not how well")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
