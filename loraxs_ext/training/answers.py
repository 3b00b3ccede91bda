"""Reading the answer out of generated text, and comparing it: exactly, and in one reading only.

A grader that guesses generously inflates a score. So one place in the text is looked at, whatever stands there has one
reading, numbers are compared as fractions without tolerance, and what is malformed or ambiguous is no answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Grader = Literal["number", "last_number", "choice", "exact"]

_MARKER = re.compile(r"#{4}|\banswer\s*(?:is\b|:|=)\s*:?|\\boxed\s*\{", re.IGNORECASE)
_CLAUSE_END = re.compile(r"\n|[.!?](?=\s|$)")
_NEGATION = re.compile(r"\b(?:not|cannot|neither|except|unknown|unclear)\b|n't\b", re.IGNORECASE)
_CHOICE = re.compile(r"\b(?:true|false|yes|no|(?:answer|solution|option|ending)\s?[1-9])\b", re.IGNORECASE)

# A candidate: not inside a word or another number; sign and currency in either order; then every digit, point and comma
# that follows, so that "1,2345" is seen whole and refused rather than cut.
_CANDIDATE = re.compile(
    r"""(?<![\w.,$€£+-])
        (?P<sign>(?:minus|negative)\s+|[-+]\s?)?
        [$€£]*\s*
        (?P<inner>-)?
        (?P<digits>\.?[0-9][0-9.,]*)
        (?P<exponent>[eE][-+]?[0-9]+)?""",
    re.VERBOSE | re.ASCII,
)
_WELL_FORMED = re.compile(r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+")
_MIXED = re.compile(r"\s+([0-9]{1,20})/([0-9]{1,20})(?![0-9])")
_DENOMINATOR = re.compile(r"\s?/\s?([0-9]{1,20})(?![0-9,])")
_SCALE = re.compile(r"\s*(hundred|thousand|million|billion|trillion)\b|k\b", re.IGNORECASE)
_SCALES = {None: 3, "hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# What makes the number a part of something else: a calculation, a list, a range, a time, a power, a variable.
_CALCULATION = re.compile(r"\s*(?:[-–—+*/×÷·^=<>]|(?:x|times|plus|minus)\b)[\s(]*[-$€£.]*[0-9]", re.IGNORECASE)
_MORE = re.compile(r"\s*(?:[,;:]|or\b|and\b|to\b)\s*[-$€£.]*[0-9]|\s+[0-9]|[²³⁰-⁹^√π]|\s?[xyzn]\b|\.[0-9]")
_OPERATOR_BEFORE = re.compile(r"[0-9)]\s*[-–—+*/×÷·^:]?\s*$")
_LONGEST = 40


@dataclass(frozen=True)
class Graded:
    """One checked answer.

    Attributes:
        answer: what was read out of the generated text; None if there is no answer in it.
        expected: what was read out of the reference.
        correct: whether the two are equal.
    """

    answer: str | None
    expected: str
    correct: bool


def grade(generated: str, reference: str, grader: Grader) -> Graded:
    """Check a generated text against a reference.

    Args:
        generated: what the model wrote, without the prompt.
        reference: a bare answer, or a solution that ends in a marked one ("#### 18", "The answer is: 18").
        grader: "number" reads the number after the last marker; "last_number" does so too, and takes the last number
            of a text without any marker; "choice" wants exactly one option (true, false, yes, no, answer1, solution2,
            option1, ending4) behind the last marker, or in all of a text without one; "exact" compares the texts with
            white space folded.

    Raises:
        ValueError: the reference itself cannot be read.
    """
    if grader == "exact":
        answer, expected = (" ".join(text.split()) for text in (generated, reference))
        return Graded(answer, expected, answer == expected)
    if grader == "choice":
        choice, gold = extract_choice(generated), extract_choice(reference)
        if gold is None:
            raise ValueError(f"reference: expected exactly one option such as 'true' or 'answer1', got {reference!r}")
        return Graded(choice, gold, choice == gold)
    number, right = extract_number(generated, need_marker=grader == "number"), reference_number(reference)
    return Graded(None if number is None else str(number), str(right), number == right)


def extract_number(text: str, *, need_marker: bool = True) -> Fraction | None:
    """The number that a text gives as its answer; None if it gives none, a malformed one, or several.

    It stands in the first clause after the last marker: "####", "answer is", "answer:" or "\\boxed{". Read are signs,
    currencies, grouped thousands, decimals, "1/2", "1 1/2", "\\frac{1}{2}", "1e3", "2.5 million", "10k"; a percentage
    is its number, 50 % = 50; a calculation counts by what stands behind its last "=".

    Args:
        text: generated or given.
        need_marker: without it, a text that has no marker answers with its last number.
    """
    text = _plain(text)
    marker = _last(_MARKER, text)
    if marker is not None:
        rest = text[marker.end() :]
        clause = rest.partition("}")[0] if marker[0].startswith("\\") else _CLAUSE_END.split(rest.lstrip(), 1)[0]
        return _first_number(clause)
    candidate = None if need_marker else _last(_CANDIDATE, text)
    if candidate is None or _OPERATOR_BEFORE.search(text[: candidate.start()]):
        return None
    return _read(candidate, _CLAUSE_END.split(text[candidate.end() :], 1)[0])


def reference_number(text: str) -> Fraction:
    """The number of a reference solution: behind its marker, or all there is.

    Raises:
        ValueError: there is none.
    """
    number = extract_number(text if _MARKER.search(text) else f"#### {text}")
    if number is None:
        raise ValueError(f"reference: expected a number, bare or behind '####' or 'The answer is', got {text!r}")
    return number


def extract_choice(text: str) -> str | None:
    """The one option that a text names, in lower case without spaces; None if it names none or several."""
    marker = _last(re.compile(r"\banswer\s+is\b\s*:?", re.IGNORECASE), text)
    clause = text if marker is None else _CLAUSE_END.split(text[marker.end() :].lstrip(), 1)[0]
    if _NEGATION.search(clause):
        return None
    found = {"".join(match[0].lower().split()) for match in _CHOICE.finditer(clause)}
    return found.pop() if len(found) == 1 else None


def _plain(text: str) -> str:
    """Without the marks of Markdown and LaTeX that stand in or around numbers."""
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\!", "").replace("\\,", "").replace("\xa0", " ")
    text = re.sub(r"\\[dt]?frac\s*\{([0-9]+)\}\s*\{([0-9]+)\}", r"\1/\2", text)
    return re.sub(r"\\([$%])", r"\1", text).replace("**", " ").replace("`", " ")


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = None
    for match in pattern.finditer(text):
        found = match
    return found


def _first_number(clause: str) -> Fraction | None:
    candidate = _CANDIDATE.search(clause)
    if candidate is None or _NEGATION.search(clause[: candidate.start()]):
        return None
    rest = clause[candidate.end() :]
    if _CALCULATION.match(rest) and "=" in rest:
        return _first_number(clause.rpartition("=")[2])
    return _read(candidate, rest)


def _read(candidate: re.Match[str], rest: str) -> Fraction | None:
    """The value of a candidate and of what belongs to it in `rest`, the remainder of its clause."""
    digits = candidate["digits"].rstrip(".,")
    # Punctuation that was stripped belongs to the text again: "3, 4" is a list.
    rest = candidate["digits"][len(digits) :] + (candidate["exponent"] or "") + rest
    exponent = 0
    if candidate["exponent"] and len(candidate["digits"]) == len(digits):
        rest, exponent = rest[len(candidate["exponent"]) :], int(candidate["exponent"][1:][:4])
    if not _WELL_FORMED.fullmatch(digits) or len(digits) > _LONGEST or abs(exponent) > _LONGEST:
        return None
    value = Fraction(digits.replace(",", "")) * Fraction(10) ** exponent
    if (mixed := _MIXED.match(rest)) and digits.isdigit():
        if not (below := int(mixed[2])):
            return None
        value, rest = value + Fraction(int(mixed[1]), below), rest[mixed.end() :]
    elif denominator := _DENOMINATOR.match(rest):
        if not (below := int(denominator[1])):
            return None
        value, rest = value / below, rest[denominator.end() :]
    elif scale := _SCALE.match(rest):
        value *= 10 ** _SCALES[scale[1].lower() if scale[1] else None]
        rest = rest[scale.end() :]
    if _CALCULATION.match(rest) or _MORE.match(rest):
        return None
    negative = (candidate["sign"] or "").strip().lower() in ("-", "minus", "negative")
    if negative and candidate["inner"]:
        return None
    return -value if negative or candidate["inner"] else value
