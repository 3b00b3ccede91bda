"""Train 64 users' adapters in one pass over their texts, each user with a taste of their own.

    python -m examples.train_many                    MiniLM and rated sentences; some minutes on two cores
    python -m examples.train_many --users 16 --check 3

Every user likes two of four sources of text: tweets, product reviews, editorials, movie reviews. Over all users every
sentence is liked as often as not, so one model for all would be right half of the time. A batch holds rows of several
users; the encoder runs once, and every row trains the adapter of its user.
`--check N` trains N of them alone as well, and compares. The same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainingArguments

from examples.demo import fetch
from examples.demo.model import TARGETS, load_encoder, load_tokenizer
from examples.tastes import Liking, User, make_model, make_users, pad
from loraxs_ext import LoraXSConfig
from loraxs_ext.files import read_json, write_json
from loraxs_ext.store import AdapterStore
from loraxs_ext.training.folder import RunFolder
from loraxs_ext.training.many import ManyAdapters, SlotCollator
from loraxs_ext.training.many.catalogue import load_from_store, save_to_store
from loraxs_ext.training.many.files import load_folder, save_folders
from loraxs_ext.training.many.trainer import ManyAdaptersTrainer
from loraxs_ext.training.trainer import Keeper

# Rows of one user in a batch, and users in a batch.
ROWS, TOGETHER = 4, 16


def make_adapters(base: Liking, names: Sequence[str], rank: int) -> ManyAdapters:
    """An adapter for every name on all linear layers of the encoder."""
    config = LoraXSConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
    return ManyAdapters(get_peft_model(base, config), names)


def train(many: ManyAdapters, users: Sequence[User], given: argparse.Namespace, folder: RunFolder | None) -> int:
    """Train the adapters of `users`; returns the seconds that took in all sessions, 0 without a folder.

    folder: where to keep checkpoints and go on from them; None for neither.
    """
    arguments = TrainingArguments(
        str(folder.path) if folder else str(given.output),
        learning_rate=given.lr,
        weight_decay=0.0,
        lr_scheduler_type="linear",
        num_train_epochs=given.epochs,
        seed=given.seed,
        save_strategy="epoch" if folder else "no",
        logging_strategy="epoch",
        remove_unused_columns=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to=[],
    )
    checkpoint = folder.last_checkpoint() if folder else None
    before = float(RunFolder.facts_of(checkpoint)["seconds"]) if checkpoint else 0.0
    keeper = Keeper(folder, before) if folder else None
    trainer = ManyAdaptersTrainer(
        many,
        arguments,
        pad,
        [row for user in users for row in user.train],
        rows_per_adapter=ROWS,
        adapters_per_batch=TOGETHER,
        callbacks=[keeper] if keeper else [],
    )
    # The log of every adapter is for files, not for the terminal.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress())
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return round(keeper.seconds) if keeper else 0


class Progress(transformers.TrainerCallback):
    """A bar with the loss, the mean over users."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="batch", desc="training", leave=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


@torch.inference_mode()
def predict(many: ManyAdapters, users: Sequence[User]) -> dict[str, Tensor]:
    """Logits [rows, 2] of each user's test rows, users mixed in every batch."""
    many.eval()
    collate = SlotCollator(many.slot_of, pad)
    rows = sorted((row for user in users for row in user.test), key=lambda row: len(row["input_ids"]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(rows), 64):
        batch = collate(rows[start : start + 64])
        del batch["labels"]
        found |= {id(row): logits for row, logits in zip(rows[start:], many(**batch)["logits"], strict=False)}
    return {user.name: torch.stack([found[id(row)] for row in user.test]) for user in users}


def accuracy(user: User, logits: Tensor) -> float:
    """Share of the user's test rows that are guessed rightly."""
    return (logits.argmax(1) == torch.tensor([row["labels"] for row in user.test])).double().mean().item()


def reload(fresh: ManyAdapters, kept: Path) -> ManyAdapters:
    """Load the adapters of `fresh` from where `save` put them."""
    if (kept / "data.mdb").exists():
        with AdapterStore(kept, readonly=True) as store:
            load_from_store(fresh, store)
    else:
        for name in fresh.names:
            load_folder(fresh, name, kept / name)
    return fresh


def save(many: ManyAdapters, output: Path) -> Path:
    """Put all adapters into a store, or into folders where there is no lmdb."""
    if importlib.util.find_spec("lmdb") is None:
        save_folders(many, output / "adapters")
        return output / "adapters"
    save_to_store(many, output / "store")
    return output / "store"


def check(
    users: Sequence[User], together: dict[str, Tensor], base: Callable[[], Liking], given: argparse.Namespace
) -> bool:
    """Train some users alone, on the same rows in the same order, and print both; whether they agree.

    Batches of other shapes round differently, and training goes on with the difference: a guess near the border may
    come out the other way.
    """
    print(f"\n{'alone':<8}{'accuracy':>10}{'together':>10}{'guesses that differ':>21}")
    differ = rows = 0
    for user in users[:: max(1, len(users) // given.check)][: given.check]:
        many = make_adapters(base(), [user.name], given.rank)
        train(many, [user], given, None)
        alone = predict(many, [user])[user.name]
        other = int((alone.argmax(1) != together[user.name].argmax(1)).sum())
        differ, rows = differ + other, rows + len(alone)
        scores = f"{accuracy(user, alone):>10.3f}{accuracy(user, together[user.name]):>10.3f}"
        print(f"{user.name:<8}{scores}{f'{other} of {len(alone)}':>21}")
    return differ <= 0.05 * rows


def report(users: Sequence[User], before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """Print a line for each user; returns the means."""
    scores = [(accuracy(user, before[user.name]), accuracy(user, after[user.name])) for user in users]
    print(f"{'user':<8}{'untrained':>11}{'trained':>9}   likes")
    for user, (untrained, trained) in zip(users, scores, strict=True):
        print(f"{user.name:<8}{untrained:>11.3f}{trained:>9.3f}   {', '.join(user.likes)}")
    means = [sum(column) / len(users) for column in zip(*scores, strict=True)]
    print(f"{'mean':<8}{means[0]:>11.3f}{means[1]:>9.3f}   (an answer without a look is right half of the time)")
    return dict(zip(("untrained", "trained"), means, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--rows", type=int, default=96, help="to train on, of each user")
    parser.add_argument("--test-rows", type=int, default=48, help="to be scored on, of each user")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=int, default=0, metavar="N", help="train N users alone too, and compare")
    parser.add_argument("--smoke", action="store_true", help="few users, few rows, one epoch, one check")
    parser.add_argument("--output", type=Path, default=Path("many-adapters"), help="new, or to go on in")
    given = parser.parse_args(arguments)
    if given.smoke:
        given.users, given.rows, given.test_rows, given.epochs, given.check = 7, 12, 8, 1, 1
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        encoder, sentences = fetch.fetch(fetch.ENCODER), fetch.fetch(fetch.SENTENCES)
    except fetch.FetchError as error:
        print(error, file=sys.stderr)
        return 3
    tokenizer = load_tokenizer(encoder)
    users = make_users(given.users, (given.rows, given.test_rows), sentences, tokenizer, given.seed)
    folder = RunFolder(given.output)
    settings = {k: v for k, v in vars(given).items() if k not in ("output", "check", "smoke")}
    folder.claim(settings, {})

    def base() -> Liking:
        return make_model(load_encoder(encoder), tokenizer)

    names = [user.name for user in users]
    many = make_adapters(base(), names, given.rank)
    rows = f"{len(users) * given.rows:,} rows, {given.epochs} epochs"
    print(f"{len(users)} adapters of {many.layout.size:,} numbers, {rows}")
    before = predict(many, users)
    if folder.result.exists():
        kept, seconds = Path(read_json(folder.result)["adapters"]), read_json(folder.result)["seconds"]
    else:
        seconds = train(many, users, given, folder)
        kept = save(many, folder.path)
    # What counts is what comes back from disk.
    after = predict(reload(make_adapters(base(), names, given.rank), kept), users)
    means = report(users, before, after)
    print(f"trained in {seconds} s; all {len(users)} adapters are in {kept}")
    write_json(folder.result, {"adapters": str(kept), "seconds": seconds, "accuracy": means})
    folder.remove_checkpoints()
    agree = check(users, after, base, given) if given.check else True
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
