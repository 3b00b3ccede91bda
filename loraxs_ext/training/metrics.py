"""The metrics of GLUE, in plain numpy: accuracy, F1, Matthews, Pearson, Spearman."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.number]


def classification_metrics(predicted: Array, labels: Array, classes: int) -> dict[str, float]:
    """Accuracy, F1 and Matthews correlation.

    Args:
        predicted, labels: class numbers [rows].
        classes: how many there are; F1 is that of class 1 if there are two (as in GLUE), else the mean over classes.
    """
    counts = np.zeros((classes, classes))
    np.add.at(counts, (labels.astype(int), predicted.astype(int)), 1)
    right, truth, guesses = np.diag(counts), counts.sum(1), counts.sum(0)
    f1 = _divide(2 * right, truth + guesses)
    # Gorodkin's correlation of K classes; the binary coefficient of Matthews for K = 2.
    total = counts.sum()
    covariance = right.sum() * total - truth @ guesses
    spread = np.sqrt((total**2 - truth @ truth) * (total**2 - guesses @ guesses))
    return {
        "accuracy": float(right.sum() / total),
        "f1": float(f1[1] if classes == 2 else f1.mean()),
        "matthews": float(_divide(covariance, spread)),
    }


def regression_metrics(predicted: Array, labels: Array) -> dict[str, float]:
    """Pearson and Spearman correlation, their mean (GLUE's score of STS-B), and the mean squared error.

    Args:
        predicted, labels: values [rows].
    """
    pearson = _correlation(predicted, labels)
    spearman = _correlation(_ranks(predicted), _ranks(labels))
    error = float(np.mean((predicted.astype(float) - labels.astype(float)) ** 2))
    return {"pearson": pearson, "spearman": spearman, "correlation": (pearson + spearman) / 2, "mse": error}


def _correlation(a: Array, b: Array) -> float:
    """Pearson's; 0 where one side is constant, which orders nothing."""
    x, y = a.astype(float) - a.mean(), b.astype(float) - b.mean()
    return float(_divide(x @ y, np.sqrt((x @ x) * (y @ y))))


def _ranks(values: Array) -> Array:
    """Ranks from 1, ties sharing their mean."""
    _, position, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[position]


def _divide(a: Array | float, b: Array | float) -> Array:
    """a / b, and 0 where b is 0."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    return np.divide(a, b, out=np.zeros_like(b), where=b != 0)
