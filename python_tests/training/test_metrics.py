"""The metrics agree with scikit-learn and scipy, edge cases included."""

from __future__ import annotations

import numpy as np
import pytest

from loraxs_ext.training.metrics import classification_metrics, regression_metrics

sklearn_metrics = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("skew", [1.0, 0.1])
def test_classification(classes: int, skew: float) -> None:
    generator = np.random.default_rng(classes)
    labels = generator.integers(classes, size=101)
    predicted = np.where(generator.random(101) < skew, generator.integers(classes, size=101), labels)
    average = "binary" if classes == 2 else "macro"
    found = classification_metrics(predicted, labels, classes)
    assert found == pytest.approx(
        {
            "accuracy": sklearn_metrics.accuracy_score(labels, predicted),
            "f1": sklearn_metrics.f1_score(labels, predicted, average=average),
            "matthews": sklearn_metrics.matthews_corrcoef(labels, predicted),
        }
    )


def test_constant_predictions_correlate_with_nothing() -> None:
    labels, ones = np.array([0, 1, 1, 0]), np.ones(4, dtype=int)
    assert classification_metrics(ones, labels, 2) == pytest.approx({"accuracy": 0.5, "f1": 2 / 3, "matthews": 0.0})
    assert classification_metrics(0 * ones, labels, 2)["f1"] == 0.0
    assert regression_metrics(ones, labels)["correlation"] == 0.0


def test_regression_with_ties() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(6, size=80) / 2
    predicted = np.round(labels + generator.normal(size=80), 1)
    pearson, spearman = stats.pearsonr(predicted, labels)[0], stats.spearmanr(predicted, labels)[0]
    assert regression_metrics(predicted, labels) == pytest.approx(
        {
            "pearson": pearson,
            "spearman": spearman,
            "correlation": (pearson + spearman) / 2,
            "mse": np.mean((predicted - labels) ** 2),
        }
    )
