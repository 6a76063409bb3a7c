"""What is predicted: how labels are written in a CSV, the loss, the metrics, and how predictions are written."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit, softmax
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error, roc_auc_score
from torch import Tensor

from dnazen.files import InputError
from dnazen.finetuning.data import Table

CLASSIFICATION, REGRESSION, MULTI_LABEL, PER_BASE = KINDS = ("classification", "regression", "multi-label", "per-base")
_PROBLEM_TYPES = {
    CLASSIFICATION: "single_label_classification", REGRESSION: "regression", MULTI_LABEL: "multi_label_classification",
    PER_BASE: "single_label_classification",
}  # fmt: skip
_FORMS = {
    CLASSIFICATION: "a class, 0, 1, 2, ...",
    REGRESSION: "a number, or several separated by spaces",
    MULTI_LABEL: "0 or 1 for each label, separated by spaces",
    PER_BASE: "a digit for each base, its class",
}
UNSEEN = "."  # in per-base predictions: a base that was cut off


class Task(NamedTuple):
    """A kind of prediction and how many classes, targets or labels it has.

    Labels are numpy arrays: the class (`classification`); `[num_labels]` floats (`regression`, `multi-label`);
    `[bases]` classes (`per-base`), which become `[tokens, num_labels]` counts of each token's bases.
    """

    kind: str
    num_labels: int
    # of each regression target in training; models are trained on, and give, (target - mean) / deviation
    means: Sequence[float] | None = None
    target_std: Sequence[float] | None = None

    @classmethod
    def of(cls, kind: str, table: Table) -> "Task":
        """The task that a training file sets.

        Raises:
            InputError: a label is not of the kind's form, or the classes found are not 0..C-1 with C at least 2.
        """
        labels = parse_labels(kind, table)
        if kind == MULTI_LABEL:
            return cls(kind, len(labels[0]))
        if kind == REGRESSION:
            for line, label in zip(table.lines, labels):
                if len(label) != len(labels[0]):
                    found = f"expected {len(labels[0])} values, found {len(label)}"
                    raise InputError(f"{table.path}: line {line}: label: {found}")
            values = np.stack(labels).astype(np.float64)
            target_std = values.std(0)
            target_std[target_std == 0] = 1.0  # a constant
            return cls(kind, values.shape[1], values.mean(0).tolist(), target_std.tolist())
        found = np.unique(np.concatenate(labels) if kind == PER_BASE else np.array(labels)).tolist()
        if len(found) < 2 or found != list(range(len(found))):
            expected = f"0 to {max(found[-1], 1)}, each at least once" if found[-1] < 1000 else "0 to C-1"
            raise InputError(f"{table.path}: label: expected classes {expected}, found {_shorten(found)}")
        return cls(kind, len(found))

    @property
    def problem_type(self) -> str:
        """Hugging Face's name for it."""
        return _PROBLEM_TYPES[self.kind]

    @property
    def metric(self) -> str:
        """The metric that chooses the best model on dev."""
        return "pearson" if self.kind == REGRESSION else "mcc"

    def labels_of(self, table: Table) -> list[np.ndarray]:
        """A file's labels, one array a row.

        Raises:
            InputError: a label is not of the kind's form, or is a class, or has a length, that training does not have.
        """
        labels = parse_labels(self.kind, table)
        for line, label in zip(table.lines, labels):
            if self.kind in (REGRESSION, MULTI_LABEL):
                if len(label) != self.num_labels:
                    found = f"expected {self.num_labels} values, found {len(label)}"
                    raise InputError(f"{table.path}: line {line}: label: {found}")
            elif label.max() >= self.num_labels:
                expected = f"a class from 0 to {self.num_labels - 1}, as in training"
                raise InputError(f"{table.path}: line {line}: label: expected {expected}, found {label.max()}")
        return labels

    def stack(self, labels: Sequence[np.ndarray]) -> Tensor:
        """The labels of a batch: `[B]` int64, `[B, num_labels]` fp32, or, per base, `[T, num_labels]` fp32."""
        if self.kind == PER_BASE:
            return torch.from_numpy(np.concatenate(labels).astype(np.float32))
        return torch.from_numpy(np.stack(labels).astype(np.int64 if self.kind == CLASSIFICATION else np.float32))

    def loss(self, logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """Mean loss in fp32: cross-entropy, mean squared error (of standardised targets) or binary cross-entropy.

        Per base, each base has its token's logits; those of special tokens, which have no bases, do not count.
        """
        logits = logits.float()
        if self.kind == CLASSIFICATION:
            return F.cross_entropy(logits, labels, class_weights)
        if self.kind == REGRESSION:
            if self.means is not None:
                labels = (labels - labels.new_tensor(self.means)) / labels.new_tensor(self.target_std)
            return F.mse_loss(logits, labels)
        if self.kind == MULTI_LABEL:
            return F.binary_cross_entropy_with_logits(logits, labels)
        weights = labels if class_weights is None else labels * class_weights
        return -(weights * logits.log_softmax(-1)).sum() / weights.sum()

    def restore(self, logits: np.ndarray) -> np.ndarray:
        """Regression targets as they are labelled, from standardised ones `[..., num_labels]`."""
        return logits if self.means is None else logits * np.array(self.target_std) + np.array(self.means)

    def balanced_weights(self, labels: Sequence[np.ndarray]) -> list[float]:
        """A weight for each class, inverse to its frequency, 1 on average over all labels (as in scikit-learn)."""
        classes = np.concatenate(labels) if self.kind == PER_BASE else np.stack(labels)
        return (len(classes) / (self.num_labels * np.bincount(classes, minlength=self.num_labels))).tolist()

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Metrics by name, of all rows: arrays as `stack` makes them, logits `[rows or tokens, num_labels]`.

        Of several labels or targets it is the mean. What is undefined (a constant has no correlation) is 0 for MCC and
        correlations; `auroc` is left out where a class is absent.
        """
        if self.kind == REGRESSION:
            logits = self.restore(logits)
            columns = list(zip(labels.T, logits.T))
            return {
                "pearson": float(np.mean([_correlation(pearsonr, *column) for column in columns])),
                "spearman": float(np.mean([_correlation(spearmanr, *column) for column in columns])),
                "mse": float(mean_squared_error(labels, logits)),
            }
        if self.kind == MULTI_LABEL:
            predicted = logits > 0
            pairs = list(zip(labels.T, predicted.T))
            values = {
                "mcc": np.mean([mcc(*pair) for pair in pairs]),
                "accuracy": np.mean(labels == predicted),
                "f1": f1_score(labels, predicted, average="macro", zero_division=0),
            }
            if all(0 < column.mean() < 1 for column in labels.T):
                values["auroc"] = roc_auc_score(labels, logits, average="macro")
            return {name: float(value) for name, value in values.items()}
        predicted, counts = logits.argmax(-1), None
        if self.kind == PER_BASE:
            tokens, labels_of_tokens = labels.nonzero()
            counts, predicted, labels = labels[tokens, labels_of_tokens], predicted[tokens], labels_of_tokens
        values = {
            "mcc": mcc(labels, predicted, counts),
            "accuracy": accuracy_score(labels, predicted, sample_weight=counts),
            "f1": f1_score(labels, predicted, average="macro", zero_division=0, sample_weight=counts),
        }
        if self.kind == CLASSIFICATION and len(np.unique(labels)) == self.num_labels:
            probabilities = softmax(logits.astype(np.float64), -1)
            scores = probabilities[:, 1] if self.num_labels == 2 else probabilities
            values["auroc"] = roc_auc_score(labels, scores, multi_class="ovr")
        return {name: float(value) for name, value in values.items()}

    def describe_predictions(self, logits: np.ndarray, bases: np.ndarray | None = None) -> dict[str, Any]:
        """The columns of one row's prediction.

        Args:
            logits: `[num_labels]`, or per base `[tokens, num_labels]`.
            bases: of each token, per base only; 0 for special tokens.
        """
        if self.kind == REGRESSION:
            return {"prediction": " ".join(f"{value:.6g}" for value in self.restore(logits))}
        if self.kind == PER_BASE:
            return {"prediction": "".join(str(c) * n for c, n in zip(logits.argmax(-1).tolist(), bases.tolist()))}
        is_single = self.kind == CLASSIFICATION
        probabilities = softmax(logits.astype(np.float64)) if is_single else expit(logits.astype(np.float64))
        columns = {f"probability_{i}": f"{value:.6f}" for i, value in enumerate(probabilities)}
        prediction = int(logits.argmax()) if is_single else " ".join(str(int(value > 0)) for value in logits)
        return {"prediction": prediction, **columns}


def mcc(truth: np.ndarray, prediction: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Matthews' correlation coefficient; 0 where it is undefined, for there is one class alone."""
    if len(np.union1d(truth, prediction)) < 2:
        return 0.0
    return float(matthews_corrcoef(truth, prediction, sample_weight=weights))


def parse_labels(kind: str, table: Table) -> list[np.ndarray]:
    """A file's labels, one array a row (see `Task`).

    Raises:
        InputError: the file has no labels, or one is not of the kind's form.
    """
    if table.labels is None:
        raise InputError(f"{table.path}: expected a column label with a label in each row, found none")
    if kind == PER_BASE and table.is_pair:
        raise InputError(f"{table.path}: expected one sequence a row for labels per base, found pairs")
    parsed = []
    for text, sequences, line in zip(table.labels, table.sequences, table.lines):
        try:
            label = _parse_label(kind, text)
        except ValueError:
            found = f"expected {_FORMS[kind]}, found {text[:50]!r}"
            raise InputError(f"{table.path}: line {line}: label: {found}") from None
        if kind == PER_BASE and len(label) != len(sequences[0]):
            found = f"expected {len(sequences[0])} digits, one for each base, found {len(label)}"
            raise InputError(f"{table.path}: line {line}: label: {found}")
        parsed.append(label)
    return parsed


def _parse_label(kind: str, text: str) -> np.ndarray:
    if kind == PER_BASE:
        if not (text.isascii() and text.isdigit()):
            raise ValueError
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64) - ord("0")
    if kind == CLASSIFICATION:
        value = int(text)
        if value < 0:
            raise ValueError
        return np.array(value)
    values = [float(value) for value in text.split()]
    if not all(map(math.isfinite, values)) or (kind == MULTI_LABEL and not {0.0, 1.0}.issuperset(values)):
        raise ValueError
    return np.array(values, np.float32)


def _correlation(function: Any, truth: np.ndarray, prediction: np.ndarray) -> float:
    is_defined = len(truth) > 1 and np.ptp(truth) > 0 and np.ptp(prediction) > 0
    return float(function(truth, prediction).statistic) if is_defined else 0.0


def _shorten(values: list[int]) -> str:
    return ", ".join(map(str, values[:10])) + (", ..." if len(values) > 10 else "")
