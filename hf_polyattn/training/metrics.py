"""Metrics that `evaluate` computes offline: evaluate.load fetches scripts from the Hub, these subclasses do not."""

from typing import Any

import datasets
import evaluate
import numpy as np


class Classification(evaluate.Metric):
    """Accuracy, and F1: of class 1 where there are two classes, the mean over classes otherwise."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe("accuracy and F1", "int64")

    def _compute(self, predictions: Any, references: Any, **_: Any) -> dict[str, float]:
        predictions, references = np.asarray(predictions), np.asarray(references)
        classes = np.union1d(predictions, references)
        if set(classes) <= {0, 1}:
            classes = np.array([1])
        scores = [_f1(predictions == c, references == c) for c in classes]
        return {"accuracy": float(np.mean(predictions == references)), "f1": float(np.mean(scores))}


class Regression(evaluate.Metric):
    """Pearson's and Spearman's correlation, mean squared error."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe("correlation and squared error", "float32")

    def _compute(self, predictions: Any, references: Any, **_: Any) -> dict[str, float]:
        predictions = np.asarray(predictions, dtype=np.float64)
        references = np.asarray(references, dtype=np.float64)
        return {
            "pearson": _correlation(predictions, references),
            "spearman": _correlation(_ranks(predictions), _ranks(references)),
            "mean_squared_error": float(np.mean((predictions - references) ** 2)),
        }


def _describe(what: str, dtype: str) -> evaluate.MetricInfo:
    features = datasets.Features({"predictions": datasets.Value(dtype), "references": datasets.Value(dtype)})
    return evaluate.MetricInfo(description=what, citation="", inputs_description="", features=features)


def _f1(predicted: np.ndarray, actual: np.ndarray) -> float:
    wrong = np.sum(predicted != actual)
    hits = np.sum(predicted & actual)
    return float(2 * hits / (2 * hits + wrong)) if hits + wrong else 0.0


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if a.std() == 0 or b.std() == 0:
        # a constant has no correlation with anything
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing their mean rank."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[group]
