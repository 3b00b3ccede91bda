"""Many adapters on the Hugging Face Trainer: its loop, its logs, its checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM, TrainerCallback, TrainingArguments

from loraxs_ext import LoraXSConfig
from loraxs_ext.store import AdapterStore
from loraxs_ext.training.folder import RunFolder
from loraxs_ext.training.instruction import Pad
from loraxs_ext.training.many.trainer import ManyAdaptersTrainer
from loraxs_ext.training.trainer import Keeper

from .test_many import many_adapters
from .tiny import sums

ROOT = Path(__file__).parents[2]
USERS = ("even", "odd", "seven")


@pytest.fixture(scope="module")
def rows(llama) -> list[dict]:
    """11, 8 and 5 sums; one adapter's answers are always seven."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    found = []
    for i, (name, count) in enumerate(zip(USERS, (11, 8, 5), strict=True)):
        for row in sums(count, seed=i):
            answer = "7" if name == "seven" else row["answer"]
            prompt = tokenizer(f"{row['prompt']} =")["input_ids"]
            ids = prompt + tokenizer(f"{answer} </s>", add_special_tokens=False)["input_ids"]
            found.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :], "adapter": name})
    return found


def make_trainer(llama, output, rows, names=USERS, callbacks=(), dropout=0.1, **options) -> ManyAdaptersTrainer:
    arguments = {
        "learning_rate": 2e-2, "num_train_epochs": 3, "warmup_steps": 2, "lr_scheduler_type": "linear",
        "logging_steps": 2, "save_strategy": "no", "per_device_eval_batch_size": 4, "use_cpu": True,
        "disable_tqdm": True, "report_to": [], "remove_unused_columns": False, "seed": 5,
    }  # fmt: skip
    batches = {key: options.pop(key) for key in ("rows_per_epoch", "adapters_per_batch") if key in options}
    return ManyAdaptersTrainer(
        many_adapters(llama, names, loraxs_dropout=dropout),
        TrainingArguments(str(output), **{**arguments, **options}),
        Pad(0),
        rows,
        rows and rows[::2],
        rows_per_adapter=2,
        callbacks=list(callbacks),
        **{"adapters_per_batch": 2, **batches},
    )


def losses(trainer: ManyAdaptersTrainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_every_adapter_learns_and_is_logged(llama, tmp_path, rows):
    trainer = make_trainer(llama, tmp_path, rows, num_train_epochs=20, logging_steps=7, warmup_steps=0)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in USERS:
        assert after[f"eval_loss/{name}"] < 0.7 * before[f"eval_loss/{name}"]
        assert losses(trainer)[-1][f"loss/{name}"] < losses(trainer)[0][f"loss/{name}"]
    assert after["eval_loss"] == pytest.approx(sum(after[f"eval_loss/{name}"] for name in USERS) / 3)
    assert losses(trainer)[0]["loss"] < 10 and after["eval_loss/seven"] < after["eval_loss/odd"]
    # 6, 4 and 3 turns an epoch, each a step of its own.
    assert trainer.optimizer.optimizer.own_steps(trainer.many.rows).tolist() == [120, 80, 60]


def test_each_is_trained_as_if_it_were_alone(llama, tmp_path, rows):
    """With its own number of steps in its schedule, and rows in the same order."""
    together = make_trainer(llama, tmp_path, rows, dropout=0.0)
    together.train()
    for slot, name in enumerate(USERS):
        own = [row for row in rows if row["adapter"] == name]
        alone = make_trainer(llama, tmp_path, own, [name], dropout=0.0)
        alone.train()
        begun = many_adapters(llama, [name]).rows[0]
        moved = (alone.many.rows[0] - begun).norm()
        assert (together.many.rows[slot] - alone.many.rows[0]).norm() < 2e-4 * moved


def test_gradients_are_accumulated_over_batches(llama, tmp_path, rows):
    """Three batches of one adapter each are one step; so is one batch of three adapters."""
    options = {"rows_per_epoch": 4, "dropout": 0.0}
    split = make_trainer(llama, tmp_path, rows, adapters_per_batch=1, gradient_accumulation_steps=3, **options)
    whole = make_trainer(llama, tmp_path, rows, adapters_per_batch=3, **options)
    for trainer in (split, whole):
        trainer.train()
        assert trainer.state.global_step == 6
    torch.testing.assert_close(split.many.rows, whole.many.rows, rtol=0, atol=1e-4)
    assert [e["loss"] for e in losses(split)] == pytest.approx([e["loss"] for e in losses(whole)], rel=1e-4)


class Killed(BaseException):
    pass


class Kill(TrainerCallback):
    """At step 8, one after a checkpoint: nothing that the process holds is kept."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 8:
            raise Killed


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "recomputed"])
def test_a_killed_run_goes_on_bit_for_bit(llama, tmp_path, rows, checkpointing):
    options = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    if checkpointing:
        options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    whole = make_trainer(llama, tmp_path / "whole", rows, **options)
    whole.train()
    folder = RunFolder(tmp_path / "killed")
    folder.path.mkdir()
    with pytest.raises(Killed):
        make_trainer(llama, folder.path, rows, callbacks=[Keeper(folder, 0.0), Kill()], **options).train()
    (folder.path / "checkpoint-8").mkdir()  # A kill in the middle of writing one.
    checkpoint = folder.last_checkpoint()
    assert checkpoint is not None and checkpoint.name == "checkpoint-6"
    again = make_trainer(llama, folder.path, rows, callbacks=[Keeper(folder, 0.0)], **options)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.global_step == whole.state.global_step == 21
    assert torch.equal(again.many.rows, whole.many.rows)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        states = [t.optimizer.optimizer.state[t.many.rows][name] for t in (again, whole)]
        assert torch.equal(*states)
    evals = [[e for e in t.state.log_history if "eval_loss" in e] for t in (again, whole)]
    assert [e["eval_loss"] for e in evals[0]] == [e["eval_loss"] for e in evals[1]] and len(evals[0]) == 7
    files = {path.name for path in folder.path.glob("checkpoint-21/*")}
    # No copy of the base model.
    assert "adapters.safetensors" in files and not {"model.safetensors", "pytorch_model.bin"} & files


def test_the_best_checkpoint_is_loaded(llama, tmp_path, rows):
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    # A step this large makes things worse.
    trainer = make_trainer(llama, tmp_path, rows, learning_rate=3.0, **options)
    trainer.train()
    best = min(e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e)
    assert trainer.evaluate()["eval_loss"] == best


def test_arguments_that_do_not_fit_are_refused(llama, tmp_path, rows):
    for options, message in (
        ({"remove_unused_columns": True}, "remove_unused_columns: expected False"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: expected 0.0, got 0.1"),
        ({"optim": "adafactor"}, "optim: expected 'adamw_torch'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(llama, tmp_path, rows, **options)
    with pytest.raises(ValueError, match="adapter: expected one of 2 adapters or its slot, got 'seven'"):
        make_trainer(llama, tmp_path, rows, USERS[:2])
    with pytest.raises(ValueError, match="lr_scheduler_type: expected a function of the step"):
        make_trainer(
            llama, tmp_path, rows, lr_scheduler_type="reduce_lr_on_plateau", warmup_steps=0, eval_strategy="epoch"
        ).train()
    with pytest.raises(ValueError, match="train_dataset: expected rows"):
        make_trainer(llama, tmp_path, None).train()


def test_the_guide_runs_as_printed(llama, tmp_path, rows, monkeypatch):
    pytest.importorskip("lmdb")
    monkeypatch.chdir(tmp_path)
    guide = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    section = guide.partition("## Many adapters at once")[2].partition("\n## ")[0]
    names = dict(zip(USERS, ("ann", "bob", "cat"), strict=True))
    named = [{**row, "adapter": names[row["adapter"]]} for row in rows]
    batch = Pad(0)(rows[:3])
    scope = {
        "get_peft_model": get_peft_model, "LoraXSConfig": LoraXSConfig, "TrainingArguments": TrainingArguments,
        "model": LlamaForCausalLM.from_pretrained(llama), "collate": Pad(0), "rows": named, "dev_rows": named[:4],
        "ids": batch["input_ids"], "mask": batch["attention_mask"], "labels": batch["labels"],
    }  # fmt: skip
    loop, trainer, files = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for block in (loop, trainer, files):
        exec(block, scope)
        assert scope["many"].rows.isfinite().all()
    assert {path.name for path in (tmp_path / "adapters").iterdir()} == {"ann", "bob", "cat"}
    with AdapterStore(tmp_path / "adapters.store", readonly=True) as store:
        assert len(store) == 3
