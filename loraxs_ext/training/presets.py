"""The hyper-parameters of the reference implementations, by name, each with where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Choice:
    """A value, and its source."""

    value: Any
    source: str


@dataclass(frozen=True)
class Preset:
    """A named starting point: what it is for, and its values by dotted name."""

    about: str
    choices: Mapping[str, Choice]


def _from(source: str, **values: Any) -> dict[str, Choice]:
    """Choices of one source; a double underscore stands for the dot."""
    return {name.replace("__", "."): Choice(value, source) for name, value in values.items()}


_GLUE_TARGETS = ["query", "value", "attention.output.dense", "output.dense"]
_DECODER_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

_GLUE_CODE = {
    **_from("LoRA-XS main_glue.py", adapter__target_modules=_GLUE_TARGETS),
    **_from("LoRA-XS utils/initialization_utils.py", adapter__init_std=1e-5),
    **_from("LoRA-XS main_glue.py: torch's AdamW with its default", training__weight_decay=0.01),
    **_from("LoRA-XS main_glue.py, default", adapter__lora_alpha=16),
    **_from("the Trainer's default, used by LoRA-XS", training__scheduler="linear", training__max_grad_norm=1.0),
}
_GLUE = {
    **_GLUE_CODE,
    **_from("LoRA-XS scripts/run_glue.py", model__name="roberta-large", data__max_length=128),
    **_from("LoRA-XS scripts/run_glue.py", training__batch=32, training__epochs=10.0, training__seed=0),
    **_from("LoRA-XS scripts/run_glue.py, one of 4, 8, 12, 16, 20, 25", adapter__r=16),
    **_from("LoRA-XS scripts/run_glue.py, one of 1e-4, 5e-4, 1e-3", training__lr=1e-3),
    **_from("LoRA-XS scripts/run_glue.py, one of 5e-4, 1e-3, 5e-3", training__head_lr=5e-3),
    **_from("LoRA-XS main_glue.py: 6 %", training__warmup=0.06),
}
_FROM_MNLI = {
    **_GLUE,
    **_from("LoRA-XS scripts/run_glue_pretrained.py", training__epochs=50.0),
    **_from("LoRA-XS scripts/run_glue_pretrained.py, one of 6e-4, 1e-3", training__lr=1e-3, training__head_lr=1e-3),
    **_from("LoRA-XS main_glue_from_pretrained.py", training__warmup=0.0),
    **_from("LoRA-XS main_glue_from_pretrained.py: all of the head but its last layer", keep_head="matching"),
}
_EDORA = {
    **_GLUE,
    **_from("EDoRA scripts/run_glue.py", model__name="roberta-base", adapter__lora_alpha=16, training__epochs=50.0),
    **_from("EDoRA scripts/run_glue.py, one of 4, 8, 12, 16, 20, 25, 32", adapter__r=16),
    **_from("EDoRA scripts/run_glue.py, one of 1e-5, 5e-6", adapter__init_std=1e-5),
    **_from("EDoRA scripts/run_glue.py, one of 1e-4, 5e-4, 6e-4, 1e-3, 5e-3", training__lr=1e-3),
    **_from("EDoRA scripts/run_glue.py, one of 1e-4, 5e-4, 6e-4, 1e-3, 5e-3", training__head_lr=5e-3),
    **_from("EDoRA scripts/run_glue.py, 1 to 5", training__seed=1),
    **_from("EDoRA: the magnitude is trained beside R", adapter__use_edora=True),
}
_AMP = "LoRA-XS has fp16 autocast over fp32 weights; bfloat16 has the range of fp32 and needs no loss scaling"
_MATH = {
    **_from("LoRA-XS scripts/run_math_tuning.sh", task="instruction", model__name="mistralai/Mistral-7B-v0.1"),
    **_from("LoRA-XS scripts/run_math_tuning.sh", adapter__r=64, data__max_train_rows=100_000),
    **_from("LoRA-XS scripts/run_math_tuning.sh", data__prompt="query", data__response="response"),
    **_from("LoRA-XS scripts/run_math_tuning.sh", training__lr=4e-3, training__epochs=2.0, training__batch=2),
    **_from("LoRA-XS scripts/run_math_tuning.sh", training__accumulate=64, training__warmup=0.02),
    **_from("LoRA-XS scripts/run_math_tuning.sh", training__scheduler="cosine", training__weight_decay=0.0),
    **_from("LoRA-XS scripts/run_math_tuning.sh", training__checkpoint_steps=100, training__log_steps=1),
    **_from("LoRA-XS main_math_tuning.py", adapter__target_modules=_DECODER_TARGETS, data__max_length=512),
    **_from("LoRA-XS main_math_tuning.py: alpha = r", adapter__lora_alpha=64),
    **_from("LoRA-XS main_math_tuning.py: Stanford Alpaca's", data__template="alpaca"),
    **_from("LoRA-XS main_math_tuning.py: no dev split, the last checkpoint", data__dev_size=0.0),
    **_from("the Trainer's default, used by LoRA-XS", training__seed=42, training__max_grad_norm=1.0),
    **_from(_AMP, training__bf16=True, model__dtype="float32"),
    **_from("LoRA-XS gsm8k_eval.py", generation__max_new_tokens=1024, generation__beams=1),
    **_from("LoRA-XS gsm8k_eval.py", generation__prompt_suffix=" Let's think step by step."),
    **_from("LoRA-XS gsm8k_eval.py", generation__stop=["Instruction:", "Instruction", "Response:", "Response"]),
    **_from("LoRA-XS gsm8k_eval.py, without its rounding", generation__grader="number"),
}
_COMMONSENSE = {
    **_from("LoRA-XS scripts/run_commonsense_tuning.sh", task="instruction", model__name="meta-llama/Meta-Llama-3-8B"),
    **_from("LoRA-XS scripts/run_commonsense_tuning.sh", adapter__target_modules=_DECODER_TARGETS),
    **_from("LoRA-XS scripts/run_commonsense_tuning.sh", adapter__loraxs_dropout=0.0, data__max_length=256),
    **_from("LoRA-XS scripts/run_commonsense_tuning.sh", training__lr=2e-3, training__epochs=3.0, training__batch=1),
    **_from("LoRA-XS scripts/run_commonsense_tuning.sh: 64 rows a step", training__accumulate=64),
    **_from("LoRA-XS scripts/run_commonsense_tuning.sh", data__dev_size=120.0, training__checkpoint_steps=40),
    **_from("LoRA-XS README", adapter__r=32, adapter__lora_alpha=64),
    **_from("LoRA-XS main_commonsense_tuning.py", training__warmup=100.0, training__weight_decay=0.0),
    **_from("LoRA-XS main_commonsense_tuning.py", training__max_grad_norm=0.5, training__scheduler="linear"),
    **_from("LoRA-XS main_commonsense_tuning.py", data__prompt="instruction", data__input="input"),
    **_from("LoRA-XS main_commonsense_tuning.py", data__response="output", data__answer="answer"),
    **_from("LoRA-XS main_commonsense_tuning.py, with Alpaca's own spacing", data__template="alpaca"),
    **_from(_AMP, training__bf16=True, model__dtype="float32"),
    **_from("LoRA-XS commonsense_eval.py", generation__max_new_tokens=32, generation__beams=4),
    **_from("LoRA-XS commonsense_eval.py, which takes the first of several options", generation__grader="choice"),
}

PRESETS: dict[str, Preset] = {
    "glue": Preset("GLUE from scratch: CoLA, SST-2, QNLI, MNLI", _GLUE),
    "glue-from-mnli": Preset("MRPC, RTE and STS-B from an adapter trained on MNLI", _FROM_MNLI),
    "math": Preset("MetaMathQA, evaluated on GSM8K", _MATH),
    "commonsense": Preset("Commonsense-170k and its eight tasks", _COMMONSENSE),
    "edora-glue": Preset("EDoRA on GLUE", _EDORA),
}
