"""What is predicted: how labels are written in a CSV, the loss, the metrics, and how predictions are written."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit, softmax
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error, roc_auc_score
from torch import Tensor
from typing_extensions import Self

from dnazen.files import InputError
from dnazen.finetuning.data import Table

UNSEEN = "."  # in per-base predictions: a base that was cut off


@dataclass(frozen=True)
class Task(ABC):
    """A kind of prediction, and how many classes, targets or labels it has.

    The labels of a file are numpy arrays, one a row; `stack` makes those of a batch.
    """

    num_labels: int

    kind: ClassVar[str]  # its name on the command line and on disk
    problem_type: ClassVar[str]  # Hugging Face's name for it
    label_form: ClassVar[str]  # what a label looks like, for people
    metric_names: ClassVar[tuple[str, ...]] = ("mcc", "accuracy", "f1")  # the first chooses the best model on dev
    has_classes: ClassVar[bool] = False  # which can be weighted
    is_per_token: ClassVar[bool] = False  # each token has logits, not each row

    @classmethod
    @abstractmethod
    def from_table(cls, table: Table) -> Self:
        """The task that a training file sets.

        Raises:
            InputError: a label is not of the task's form; the classes found are not 0 to C-1 with C at least 2.
        """

    @staticmethod
    @abstractmethod
    def parse_label(text: str) -> np.ndarray:
        """One label; ValueError if it is not of the task's form."""

    @abstractmethod
    def describe_fault(self, label: np.ndarray) -> str | None:
        """What a label has that those of training have not, if anything."""

    @abstractmethod
    def stack(self, labels: Sequence[np.ndarray]) -> Tensor:
        """The labels of a batch, as `loss` takes them."""

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """Mean loss of a batch in fp32.

        Args:
            logits: `[B, num_labels]`, or `[T, num_labels]` if they are per token.
            labels: as `stack` makes them.
            class_weights: `[num_labels]`; for tasks with classes alone.
        """

    @abstractmethod
    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Metrics by name, of all rows: logits as `stack_logits` makes them, labels as `stack` does.

        Of several labels or targets it is the mean. What is undefined (a constant has no correlation) is 0 for MCC and
        correlations; `auroc` is left out where a class is absent.
        """

    @abstractmethod
    def predicted_columns(self, logits: np.ndarray, bases: np.ndarray | None = None, length: int = 0) -> dict[str, Any]:
        """The columns of one row's prediction.

        Args:
            logits: `[num_labels]`, or `[tokens, num_labels]` if they are per token.
            bases: of each token, 0 for special tokens; needed if logits are per token.
            length: bases of the sequence, those that were cut off included; needed if logits are per token.
        """

    @classmethod
    def parse(cls, table: Table) -> list[np.ndarray]:
        """A file's labels, one array a row.

        Raises:
            InputError: the file has no labels, or one is not of the task's form.
        """
        if table.labels is None:
            raise InputError(f"{table.path}: expected a column label with a label in each row, found none")
        labels = []
        for text, line in zip(table.labels, table.lines):
            try:
                labels.append(cls.parse_label(text))
            except ValueError:
                found = f"expected {cls.label_form}, found {text[:50]!r}"
                raise InputError(f"{table.path}: line {line}: label: {found}") from None
        return labels

    def labels_of(self, table: Table) -> list[np.ndarray]:
        """A file's labels, one array a row.

        Raises:
            InputError: a label is not of the task's form, or is a class, or has a length, that training does not have.
        """
        labels = self.parse(table)
        for label, line in zip(labels, table.lines):
            if (fault := self.describe_fault(label)) is not None:
                raise InputError(f"{table.path}: line {line}: label: {fault}")
        return labels

    def align(self, labels: list[np.ndarray], bases: list[np.ndarray] | None) -> list[np.ndarray]:
        """Labels as `stack` takes them; `bases` are those of each row's tokens, needed if logits are per token."""
        return labels

    def stack_logits(self, logits: Sequence[np.ndarray]) -> np.ndarray:
        """The logits of all rows as `loss` and `metrics` take them."""
        return np.stack(logits)

    def record(self) -> dict[str, Any]:
        """What `task_from_record` needs; every kind has the same fields."""
        return {"kind": self.kind, "num_labels": self.num_labels, "means": None, "deviations": None}


class _ClassTask(Task):
    """Labels are classes, 0 to num_labels - 1."""

    problem_type = "single_label_classification"
    has_classes = True

    @classmethod
    def from_table(cls, table: Table) -> Self:
        found = np.unique(np.hstack(cls.parse(table))).tolist()
        if len(found) < 2 or found != list(range(len(found))):
            expected = f"0 to {max(found[-1], 1)}, each at least once" if found[-1] < 1000 else "0 to C-1"
            shown = ", ".join(map(str, found[:10])) + (", ..." if len(found) > 10 else "")
            raise InputError(f"{table.path}: label: expected classes {expected}, found {shown}")
        return cls(len(found))

    def describe_fault(self, label: np.ndarray) -> str | None:
        if label.max() < self.num_labels:
            return None
        return f"expected a class from 0 to {self.num_labels - 1}, as in training, found {label.max()}"

    def balanced_weights(self, labels: Sequence[np.ndarray]) -> list[float]:
        """A weight for each class, inverse to its frequency, 1 on average over all labels (as in scikit-learn)."""
        classes = np.hstack(labels)
        return (len(classes) / (self.num_labels * np.bincount(classes, minlength=self.num_labels))).tolist()


class Classification(_ClassTask):
    """A class for each row; two classes or more. Labels are `[B]` int64, the loss is cross-entropy."""

    kind = "classification"
    label_form = "a class, 0, 1, 2, ..."

    @staticmethod
    def parse_label(text: str) -> np.ndarray:
        if (value := int(text)) < 0:
            raise ValueError
        return np.array(value)

    def stack(self, labels: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(labels).astype(np.int64))

    def loss(self, logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
        return F.cross_entropy(logits.float(), labels, class_weights)

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        values = _class_metrics(labels, logits.argmax(-1))
        if len(np.unique(labels)) == self.num_labels:
            probabilities = softmax(logits.astype(np.float64), -1)
            scores = probabilities[:, 1] if self.num_labels == 2 else probabilities
            values["auroc"] = float(roc_auc_score(labels, scores, multi_class="ovr"))
        return values

    def predicted_columns(self, logits: np.ndarray, bases: np.ndarray | None = None, length: int = 0) -> dict[str, Any]:
        return {"prediction": int(logits.argmax()), **_name_probabilities(softmax(logits.astype(np.float64)))}


class PerBase(_ClassTask):
    """A class for each base, which has its token's logits.

    Labels of a row are `[bases]` classes; `align` makes `[tokens, num_labels]` counts of each token's bases of them,
    `stack` `[T, num_labels]` fp32. Loss and metrics count each base once; special tokens have none. The loss is
    cross-entropy.
    """

    kind = "per-base"
    label_form = "a digit for each base, its class"
    is_per_token = True

    @classmethod
    def parse(cls, table: Table) -> list[np.ndarray]:
        if table.labels is not None and table.is_pair:
            raise InputError(f"{table.path}: expected one sequence a row for labels per base, found pairs")
        labels = super().parse(table)
        for label, (sequence,), line in zip(labels, table.sequences, table.lines):
            if len(label) != len(sequence):
                found = f"expected {len(sequence)} digits, one for each base, found {len(label)}"
                raise InputError(f"{table.path}: line {line}: label: {found}")
        return labels

    @staticmethod
    def parse_label(text: str) -> np.ndarray:
        if not (text.isascii() and text.isdigit()):
            raise ValueError
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64) - ord("0")

    def align(self, labels: list[np.ndarray], bases: list[np.ndarray] | None) -> list[np.ndarray]:
        return [_count_by_token(label, row, self.num_labels) for label, row in zip(labels, bases)]

    def stack(self, labels: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(labels).astype(np.float32))

    def stack_logits(self, logits: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(logits)

    def loss(self, logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
        weights = labels if class_weights is None else labels * class_weights
        return -(weights * logits.float().log_softmax(-1)).sum() / weights.sum()

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        tokens, classes = labels.nonzero()
        return _class_metrics(classes, logits.argmax(-1)[tokens], labels[tokens, classes])

    def predicted_columns(self, logits: np.ndarray, bases: np.ndarray | None = None, length: int = 0) -> dict[str, Any]:
        classes = "".join(str(c) * n for c, n in zip(logits.argmax(-1).tolist(), bases.tolist()))
        return {"prediction": classes.ljust(length, UNSEEN)}


class _ValueTask(Task):
    """Labels are `[num_labels]` fp32, and `[B, num_labels]` in a batch."""

    @classmethod
    def from_table(cls, table: Table) -> Self:
        return cls(len(cls.parse(table)[0]))

    def describe_fault(self, label: np.ndarray) -> str | None:
        return None if len(label) == self.num_labels else f"expected {self.num_labels} values, found {len(label)}"

    def stack(self, labels: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(labels).astype(np.float32))


class MultiLabel(_ValueTask):
    """Several labels a row, each 0 or 1. The loss is binary cross-entropy."""

    kind = "multi-label"
    problem_type = "multi_label_classification"
    label_form = "0 or 1 for each label, separated by spaces"

    @staticmethod
    def parse_label(text: str) -> np.ndarray:
        values = [float(value) for value in text.split()]
        if not {0.0, 1.0}.issuperset(values):
            raise ValueError
        return np.array(values, np.float32)

    def loss(self, logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits.float(), labels)

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        predicted = logits > 0
        values = {
            "mcc": np.mean([mcc(*pair) for pair in zip(labels.T, predicted.T)]),
            "accuracy": np.mean(labels == predicted),
            "f1": f1_score(labels, predicted, average="macro", zero_division=0),
        }
        if all(0 < column.mean() < 1 for column in labels.T):
            values["auroc"] = roc_auc_score(labels, logits, average="macro")
        return {name: float(value) for name, value in values.items()}

    def predicted_columns(self, logits: np.ndarray, bases: np.ndarray | None = None, length: int = 0) -> dict[str, Any]:
        prediction = " ".join(str(int(value > 0)) for value in logits)
        return {"prediction": prediction, **_name_probabilities(expit(logits.astype(np.float64)))}


@dataclass(frozen=True)
class Regression(_ValueTask):
    """One number or several a row. The loss is the mean squared error of standardised targets.

    A model is trained on, and gives, `(target - mean) / target_std`, with mean and standard deviation of each target in
    training; without them, the targets themselves.
    """

    means: Sequence[float] | None = None
    target_std: Sequence[float] | None = None

    kind = "regression"
    problem_type = "regression"
    label_form = "a number, or several separated by spaces"
    metric_names = ("pearson", "spearman", "mse")

    @classmethod
    def from_table(cls, table: Table) -> Self:
        task = super().from_table(table)
        values = np.stack(task.labels_of(table)).astype(np.float64)
        target_std = values.std(0)
        target_std[target_std == 0] = 1.0  # a constant
        return cls(task.num_labels, values.mean(0).tolist(), target_std.tolist())

    @staticmethod
    def parse_label(text: str) -> np.ndarray:
        values = [float(value) for value in text.split()]
        if not all(map(math.isfinite, values)):
            raise ValueError
        return np.array(values, np.float32)

    def loss(self, logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
        if self.means is not None:
            labels = (labels - labels.new_tensor(self.means)) / labels.new_tensor(self.target_std)
        return F.mse_loss(logits.float(), labels)

    def restore(self, logits: np.ndarray) -> np.ndarray:
        """Targets as they are labelled, from standardised ones `[..., num_labels]`."""
        return logits if self.means is None else logits * np.array(self.target_std) + np.array(self.means)

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        predicted = self.restore(logits)
        columns = list(zip(labels.T, predicted.T))
        return {
            "pearson": float(np.mean([_correlation(pearsonr, *column) for column in columns])),
            "spearman": float(np.mean([_correlation(spearmanr, *column) for column in columns])),
            "mse": float(mean_squared_error(labels, predicted)),
        }

    def predicted_columns(self, logits: np.ndarray, bases: np.ndarray | None = None, length: int = 0) -> dict[str, Any]:
        return {"prediction": " ".join(f"{value:.6g}" for value in self.restore(logits))}

    def record(self) -> dict[str, Any]:
        return {**super().record(), "means": self.means, "deviations": self.target_std}


TASKS: dict[str, type[Task]] = {task.kind: task for task in (Classification, Regression, MultiLabel, PerBase)}


def task_from_record(record: dict[str, Any]) -> Task:
    """The task that `Task.record` described; KeyError if the kind is unknown or a field is absent."""
    task_class = TASKS[record["kind"]]
    on_disk = {"target_std": "deviations"}
    names = [field.name for field in dataclasses.fields(task_class)]
    return task_class(**{name: record[on_disk.get(name, name)] for name in names})


def mcc(truth: np.ndarray, prediction: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Matthews' correlation coefficient; 0 where it is undefined, for there is one class alone."""
    if len(np.union1d(truth, prediction)) < 2:
        return 0.0
    return float(matthews_corrcoef(truth, prediction, sample_weight=weights))


def _class_metrics(truth: np.ndarray, prediction: np.ndarray, weights: np.ndarray | None = None) -> dict[str, float]:
    return {
        "mcc": mcc(truth, prediction, weights),
        "accuracy": float(accuracy_score(truth, prediction, sample_weight=weights)),
        "f1": float(f1_score(truth, prediction, average="macro", zero_division=0, sample_weight=weights)),
    }


def _name_probabilities(probabilities: np.ndarray) -> dict[str, str]:
    return {f"probability_{index}": f"{value:.6f}" for index, value in enumerate(probabilities)}


def _correlation(function: Any, truth: np.ndarray, prediction: np.ndarray) -> float:
    is_defined = len(truth) > 1 and np.ptp(truth) > 0 and np.ptp(prediction) > 0
    return float(function(truth, prediction).statistic) if is_defined else 0.0


def _count_by_token(label: np.ndarray, bases: np.ndarray, num_labels: int) -> np.ndarray:
    """`[bases]` classes to `[tokens, num_labels]` counts; bases of tokens that were cut off are not counted."""
    counts = np.zeros((len(bases), num_labels), np.float32)
    token = np.repeat(np.arange(len(bases)), bases)
    np.add.at(counts, (token, label[: len(token)]), 1)
    return counts
