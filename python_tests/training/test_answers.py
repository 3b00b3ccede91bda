"""Answers are read in one way, and a wrong one never counts."""

from __future__ import annotations

from fractions import Fraction

import pytest

from loraxs_ext.training.answers import extract_choice, extract_number, grade, reference_number

READ = {
    "The answer is: 18": 18,
    "The answer is 18.": 18,
    "the ANSWER IS 18": 18,
    "So she has 9 + 9 eggs.\n#### 18": 18,
    "####18": 18,
    "#### -3": -3,
    "The answer is: \u22123": -3,
    "The answer is: - 3": -3,
    "The answer is minus 3": -3,
    "The answer is negative 3": -3,
    "The answer is: -$3": -3,
    "The answer is: $-3": -3,
    "The answer is +3": 3,
    "The answer is 1,234": 1234,
    "The answer is 1,234,567": 1234567,
    "The answer is: $1,234.50": "1234.5",
    "The answer is: $1,234.50.": "1234.5",
    "The answer is: $ 1,234.50 in total": "1234.5",
    "The answer is \\$1{,}234": 1234,
    "The answer is 1/2": "1/2",
    "The answer is: 3 / 4 of it": "3/4",
    "The answer is: 1 1/2 cups": "3/2",
    "The answer is: \\frac{1}{2}": "1/2",
    "The answer is $\\boxed{\\dfrac{7}{2}}$.": "7/2",
    "Thus \\boxed{42}.": 42,
    "The answer is **18**.": 18,
    "The answer is `18`": 18,
    "The answer is $18$": 18,
    "The answer is .5": "1/2",
    "The answer is 0.5.": "1/2",
    "The answer is 18.0": 18,
    "The answer is 1e3": 1000,
    "The answer is 2.5E-1": "1/4",
    "The answer is 2.5 million dollars": 2500000,
    "The answer is 10k": 10000,
    "The answer is 3 hundred": 300,
    "The answer is 50%": 50,
    "The answer is 50 \\%": 50,
    "The answer is 18 dollars per day": 18,
    "The answer is 5kg": 5,
    "The answer is 18 - well done": 18,
    "The answer is x = 5": 5,
    "The answer is 3 + 4 = 7": 7,
    "The answer is 16 - 3 - 4 = $9": 9,
    "The answer is that she makes $18 every day. She sold 9 eggs.": 18,
    "The answer is:\n\n18\n\nNext: 20": 18,
    "Answer: 18": 18,
    "The answer is 5. No wait. The answer is 6.": 6,
    "#### 5\n#### 6": 6,
    "The answer is: 0": 0,
    "The answer is 007": 7,
    "The answer is about 12, as shown": 12,
}

NOT_READ = [
    "",
    "18",
    "She has 18 eggs.",
    "####",
    "The answer is",
    "The answer is unknown",
    "The answer is eighteen",
    "The answer is not 5",
    "The answer isn't 5",
    "The answer is that it cannot be 5",
    "The answer is unknown. There are 5 ducks",
    "The answer is unclear\n5",
    "The answer is 1,2345",
    "The answer is 12,34",
    "The answer is 1234,567",
    "The answer is 1.234,56",
    "The answer is 1.2.3",
    "The answer is 0,5",
    "The answer is 3, 4",
    "The answer is 3 or 4",
    "The answer is 3 and 4",
    "The answer is 3 to 4",
    "The answer is 10-12",
    "The answer is 10 – 12",
    "The answer is 1 234",
    "The answer is 3 + 4",
    "The answer is 3 x 4",
    "The answer is 3 times 4",
    "The answer is 3 × 10^5",
    "The answer is 2^3",
    "The answer is 2**3",
    "The answer is 10²",
    "The answer is 3√2",
    "The answer is 3x",
    "The answer is x2",
    "The answer is 10:30",
    "The answer is 3/4/2024",
    "The answer is 1/0",
    "The answer is 1 1/0",
    "The answer is 5 = 5x + 1 =",
    "The answer is 1e999999999",
    "The answer is " + "9" * 5000,
    "The answer is --3",
    "The answer is -$-3",
    "The answer is x-3",
    "The answer is US-$18",
]


@pytest.mark.parametrize(("text", "value"), READ.items(), ids=list(READ))
def test_reads(text: str, value: int | str) -> None:
    assert extract_number(text) == Fraction(value)


@pytest.mark.parametrize("text", NOT_READ, ids=lambda text: text[:40] or "empty")
def test_does_not_guess(text: str) -> None:
    assert extract_number(text) is None


@pytest.mark.parametrize(
    ("generated", "reference", "correct"),
    [
        ("The answer is 1,234,567", "1234567", True),
        ("The answer is 1,234", "1234567", False),  # truncated where the reference graders truncate
        ("The answer is 1", "1,234,567", False),
        ("The answer is 0.18", "18", False),  # no factor of 100, in either direction
        ("The answer is 1800", "18", False),
        ("The answer is 18%", "0.18", False),
        ("The answer is 17.6", "18", False),  # no rounding
        ("The answer is 18.0000001", "18", False),
        ("The answer is 1/3", "0.333", False),
        ("The answer is 0.25", "1/4", True),
        ("The answer is 18", "Half of 36.\n#### 18", True),
        ("The answer is -18", "18", False),
        ("The answer is 19", "#### 18", False),
        ("I don't know.", "18", False),
        ("The answer is 18 or 19", "18", False),
        ("So 9 * 2 = 18", "18", False),  # unmarked
    ],
)
def test_never_inflates(generated: str, reference: str, correct: bool) -> None:
    graded = grade(generated, reference, "number")
    assert graded.correct is correct
    assert graded.expected == str(reference_number(reference))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("She makes 9 * 2 = 18 dollars", 18),
        ("5 ducks and 18 eggs.", 18),
        ("She sold 10 - 3", None),
        ("She sold 10 -3", None),
        ("It is 10:30", None),
        ("The answer is 5, of 18", 5),  # a marker goes first
        ("The answer is unknown, 18", None),
        ("nothing", None),
        ("They left at -4.", -4),
    ],
)
def test_last_number(text: str, value: int | None) -> None:
    assert extract_number(text, need_marker=False) == value
    assert grade(text, "18", "last_number").correct is (value == 18)


@pytest.mark.parametrize("reference", ["", "eighteen", "3 or 4", "#### none"])
def test_unreadable_reference_is_an_error(reference: str) -> None:
    with pytest.raises(ValueError, match="reference: expected a number"):
        grade("The answer is 18", reference, "number")


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("the correct answer is true", "true"),
        ("The correct answer is answer2.", "answer2"),
        ("Solution 1", "solution1"),
        ("true or false", None),
        ("the correct answer is not true", None),
        ("true. The correct answer is false", "false"),
        ("untrue", None),
        ("", None),
    ],
)
def test_choice(text: str, choice: str | None) -> None:
    assert extract_choice(text) == choice
    assert grade(text, "the correct answer is true", "choice").correct is (choice == "true")


def test_choice_needs_a_reference() -> None:
    with pytest.raises(ValueError, match="exactly one option"):
        grade("true", "maybe", "choice")


def test_exact_folds_white_space_only() -> None:
    assert grade(" a  b\n", "a b", "exact").correct
    assert not grade("A b", "a b", "exact").correct
