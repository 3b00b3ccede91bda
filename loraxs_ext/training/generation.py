"""Generating answers, padded on the left, into a file that an interrupted evaluation goes on with."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from loraxs_ext.files import parse_object

from .answers import grade
from .instruction import Template
from .settings import GenerationSettings
from .tables import Row


class AnswersFile:
    """A JSONL file: what the answers were made with in the first line, then one answer a line.

    Args:
        path: new, or of an interrupted evaluation; a line that a kill cut off is dropped.
        made_with: must equal what the file was begun with.

    Raises:
        ValueError: the file was begun with something else, or is damaged before its last line.
    """

    def __init__(self, path: Path, made_with: Mapping[str, Any]) -> None:
        self.path = path
        self.rows: dict[int, dict[str, Any]] = {}
        header = json.loads(json.dumps({"made with": made_with}))
        whole = 0
        if path.exists():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            lines = content[:whole].splitlines()
            for number, line in enumerate(lines, start=1):
                entry = _parse(line, path, number)
                if number == 1 and entry != header:
                    raise ValueError(
                        f"{path}: expected answers made with {header['made with']}, got {entry.get('made with')}; "
                        f"remove the file to answer again"
                    )
                if number > 1:
                    self.rows[int(entry["row"])] = entry
        with open(path, "r+b" if path.exists() else "wb") as file:
            file.truncate(whole)
        if not whole:
            self._append([header])

    def add(self, entries: Sequence[dict[str, Any]]) -> None:
        """Append answers, and flush them to the disk."""
        self._append(entries)
        self.rows |= {int(entry["row"]): entry for entry in entries}

    def _append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class Writer:
    """A model that answers.

    Args:
        model: a causal language model in eval mode.
        template: makes the prompts.
        settings: how to generate.
    """

    model: Any
    template: Template
    settings: GenerationSettings

    @torch.inference_mode()
    def answer(self, rows: Sequence[Row]) -> list[str]:
        """The text generated for every row, without the prompt, cut at the first text of `settings.stop`."""
        tokenizer, settings = self.template.tokenizer, self.settings
        prompts = [self.template.encode_prompt(self.template.prompt(row) + settings.prompt_suffix) for row in rows]
        width = max(map(len, prompts))
        pad, device = tokenizer.pad_token_id, self.model.device
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        stop = StoppingCriteriaList([_Stop(tokenizer, settings.stop, width)] if settings.stop else [])
        output = self.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=settings.max_new_tokens, num_beams=settings.beams,
            do_sample=False, temperature=None, top_p=None, top_k=None, use_cache=True,
            stopping_criteria=stop,
        )  # fmt: skip
        texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        return [_cut(text, settings.stop) for text in texts]


class _Stop(StoppingCriteria):
    """Ends a row once a text of `stop` is in it; transformers' own criterion does not take every tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width
        # A character takes four tokens at most, those of its bytes.
        self.tokens = 4 * max(map(len, stop))

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        new = input_ids[:, self.width :][:, -self.tokens :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return torch.tensor([any(word in text for word in self.stop) for text in texts], device=input_ids.device)


def answer_all(writer: Writer, rows: Sequence[tuple[Row, str]], file: AnswersFile) -> dict[str, Any]:
    """Answer and check every row that is not in the file yet; the sum over all rows.

    Args:
        writer: generates.
        rows: each with its reference.
        file: of the answers.

    Returns:
        rows, correct, unread (no answer could be read), exact_match = correct / rows, and its standard error.

    Raises:
        ValueError: a reference cannot be read.
    """
    batch = writer.settings.batch
    # A reference that cannot be read is found before hours of generating.
    for i, (_, reference) in enumerate(rows):
        try:
            grade("", reference, writer.settings.grader)
        except ValueError as error:
            raise ValueError(f"data.test, row {i}: {error}") from None
    todo = [i for i in range(len(rows)) if i not in file.rows]
    with tqdm(total=len(rows), initial=len(rows) - len(todo), desc="answers", unit="row") as bar:
        for start in range(0, len(todo), batch):
            numbers = todo[start : start + batch]
            texts = writer.answer([rows[i][0] for i in numbers])
            checked = [grade(text, rows[i][1], writer.settings.grader) for i, text in zip(numbers, texts, strict=True)]
            file.add(
                [
                    {"row": i, **asdict(graded), "text": text}
                    for i, text, graded in zip(numbers, texts, checked, strict=True)
                ]
            )
            bar.update(len(numbers))
            bar.set_postfix(correct=sum(bool(file.rows[i]["correct"]) for i in file.rows), refresh=False)
    found = [file.rows[i] for i in range(len(rows))]
    correct, unread = sum(entry["correct"] for entry in found), sum(entry["answer"] is None for entry in found)
    share = correct / len(found)
    deviation = (share * (1 - share) / len(found)) ** 0.5
    return {
        "rows": len(found), "correct": correct, "unread": unread, "exact_match": share, "standard_error": deviation,
    }  # fmt: skip


def _cut(text: str, stop: Sequence[str]) -> str:
    ends = [place for word in stop if (place := text.find(word)) >= 0]
    return text[: min(ends)] if ends else text


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    entry = parse_object(line, f"{path}, line {number}")
    needed = {"row", "answer", "correct"} if number > 1 else {"made with"}
    if not needed <= entry.keys():
        raise ValueError(f"{path}, line {number}: expected a JSON object with {', '.join(sorted(needed))}")
    return entry
