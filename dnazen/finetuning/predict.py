"""What a fine-tuned model says of the sequences of a CSV file."""

import csv
import logging
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from dnazen.files import InputError, atomic_directory, write_json
from dnazen.finetuning.data import PREDICTIONS_FILE, Table, read_table
from dnazen.finetuning.model import Finetuned, open_finetuned
from dnazen.finetuning.tasks import PER_BASE, UNSEEN

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"


def predict(
    model: str | PathLike, data: str | PathLike, output_dir: str | PathLike, attn_implementation: str | None = None
) -> tuple[int, dict[str, float]]:
    """Predict the rows of a CSV file; write `predictions.csv` and, if it has labels, `metrics.json`.

    Returns:
        The number of rows, and the metrics (none without labels).

    Raises:
        InputError: the model or the file is at fault; single sequences where the model takes pairs, or the reverse;
            `output_dir` has something in it.
    """
    with atomic_directory(output_dir) as directory:
        table = read_table(data, needs_labels=False)
        finetuned = open_finetuned(model, attn_implementation)
        metrics, _ = predict_table(finetuned, table, directory / PREDICTIONS_FILE)
        if metrics:
            write_json(directory / METRICS_FILE, metrics)
    return len(table.sequences), metrics


def predict_table(finetuned: Finetuned, table: Table, path: Path) -> tuple[dict[str, float], int]:
    """Write the predictions for a table's rows to `path`.

    The columns are those of the input, `ngrams` (how many G-grams match in the sequence) for models that have them,
    `prediction` and, for classes and labels, the probability of each. Per base, `.` stands for what was cut off.
    A column of the input that has the name of one of these is replaced, which is logged.

    Returns:
        The metrics (none if the table has no labels), and how many rows were cut short.
    """
    task, encoder = finetuned.task, finetuned.encoder
    if table.is_pair != finetuned.is_pair:
        expected, found = ("pairs", "single sequences") if finetuned.is_pair else ("single sequences", "pairs")
        raise InputError(f"{table.path}: expected {expected}, as the model was trained on, found {found}")
    labels = None if table.labels is None else task.labels_of(table)
    encoded = encoder.encode(table, task)
    logits = finetuned.predict(encoded)
    columns: list[dict[str, Any]] = []
    ngrams = encoder.count_ngrams(encoded.input_ids) if encoder.is_packed and encoder.vocabulary.ngrams else None
    for row, sequences in enumerate(table.sequences):
        names = ("sequence1", "sequence2") if table.is_pair else ("sequence",)
        cells: dict[str, Any] = dict(zip(names, sequences))
        if labels is not None:
            cells["label"] = table.labels[row]
        new: dict[str, Any] = {} if ngrams is None else {"ngrams": ngrams[row]}
        new |= task.describe_predictions(logits[row], encoded.bases[row] if encoded.bases else None)
        if task.kind == PER_BASE:
            new["prediction"] = new["prediction"].ljust(len(sequences[0]), UNSEEN)
        others = table.others[row] if table.others else {}
        if row == 0 and (replaced := sorted(others.keys() & new.keys())):
            logger.warning("%s: replaced in the predictions: columns %s", table.path, ", ".join(replaced))
        columns.append({**cells, **others, **new})
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(columns[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(columns)
    if labels is None:
        return {}, encoded.num_truncated
    stacked = np.concatenate(logits) if task.kind == PER_BASE else np.stack(logits)
    return task.metrics(stacked, task.stack(encoded.labels(task, labels)).numpy()), encoded.num_truncated
