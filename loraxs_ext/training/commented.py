"""A preset as a YAML file in which every field is explained, to be edited and given to `loraxs train`."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from typing import Any

from .fields import check_names
from .presets import PRESETS, Choice
from .settings import TASKS

_WIDTH = 118


def commented_yaml(name: str) -> str:
    """The YAML of a preset, or of a task with its defaults.

    Args:
        name: a key of PRESETS or TASKS.

    Raises:
        ValueError: it is neither.
    """
    check_names([name], [*PRESETS, *TASKS], "preset")
    preset = PRESETS.get(name)
    choices: Mapping[str, Choice] = preset.choices if preset else {}
    task = name if preset is None else choices["task"].value if "task" in choices else "classification"
    lines = [f"# {preset.about if preset else 'The defaults'}. Start it with: loraxs train THIS_FILE"]
    values = {"task": task, "preset": name if preset else None}
    for field in dataclasses.fields(TASKS[task]):
        if field.default_factory is not dataclasses.MISSING and not field.metadata:
            lines += ["", f"{field.name}:", *_section(field.default_factory(), field.name, choices)]
        elif field.name == "adapter":
            lines += ["", "adapter:  # " + field.metadata["doc"], *_adapter(choices)]
        else:
            value = values.get(field.name, field.default)
            lines += _entry(field.name, value, field.metadata["doc"], choices.get(field.name), "")
    return "\n".join(lines) + "\n"


def _section(defaults: Any, section: str, choices: Mapping[str, Choice]) -> list[str]:
    lines = []
    for field in dataclasses.fields(defaults):
        value, choice = getattr(defaults, field.name), choices.get(f"{section}.{field.name}")
        lines += _entry(field.name, value, field.metadata["doc"], choice, "  ")
    return lines


def _adapter(choices: Mapping[str, Choice]) -> list[str]:
    chosen = {path.partition(".")[2]: choice for path, choice in choices.items() if path.startswith("adapter.")}
    plain = {"r": Choice(16, "rank"), "lora_alpha": Choice(16, "scaling alpha / r")}
    lines = []
    for name, choice in (chosen or plain).items():
        lines += [f"  # {choice.source}", f"  {name}: {_scalar(choice.value)}"]
    return lines


def _entry(name: str, default: Any, doc: str, choice: Choice | None, indent: str) -> list[str]:
    said = f"{doc} [{choice.source}]" if choice else doc
    comment = textwrap.wrap(said, _WIDTH - len(indent) - 2)
    return [
        *(f"{indent}# {line}" for line in comment),
        f"{indent}{name}: {_scalar(choice.value if choice else default)}",
    ]


def _scalar(value: Any) -> str:
    """As JSON, which is YAML but for numbers like 1e-05, which YAML reads only with a point."""
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("e", ".0e") if isinstance(value, float) and "e" in text and "." not in text else text
