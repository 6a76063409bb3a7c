"""What a fine-tuned model says of the sequences of a file."""

import csv
import logging
from os import PathLike
from pathlib import Path
from typing import Any

from dnazen.data.fasta import read_fasta
from dnazen.data.sequences import is_csv
from dnazen.files import InputError, atomic_directory, write_json
from dnazen.finetuning.data import PREDICTIONS_FILE, Table, read_table
from dnazen.finetuning.finetuned import Finetuned, open_finetuned

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"


def predict(
    model: str | PathLike, data: str | PathLike, output_dir: str | PathLike, precision: str | None = None,
    attn_implementation: str | None = None,
) -> tuple[int, dict[str, float]]:  # fmt: skip
    """Predict the sequences of a file; write `predictions.csv` and, if it has labels, `metrics.json`.

    Args:
        model: folder of a fine-tuned model.
        data: CSV (see `read_table`), if its name ends in .csv (.csv.gz, ...), or else FASTA.
        output_dir: where to; must not exist yet.
        precision, attn_implementation: see `open_finetuned`.

    Returns:
        The number of rows, and the metrics (none without labels).

    Raises:
        InputError: the model or the file is at fault; single sequences where the model takes pairs, or the reverse;
            `output_dir` has something in it.
    """
    with atomic_directory(output_dir) as directory:
        table = read_table(data, needs_labels=False) if is_csv(data) else read_records(data)
        finetuned = open_finetuned(model, precision, attn_implementation)
        metrics, _ = predict_table(finetuned, table, directory / PREDICTIONS_FILE)
        if metrics:
            write_json(directory / METRICS_FILE, metrics)
    return len(table.sequences), metrics


def read_records(path: str | PathLike) -> Table:
    """The records of a FASTA file as a table's rows, with a further column `name`.

    Letters other than A, C, G, T are kept, counted and logged: the tokenizer reads each as unknown.

    Raises:
        InputError: see `FastaReader`.
    """
    records = list(read_fasta(path))
    unclear = [len(record.sequence) - sum(map(record.sequence.count, "ACGT")) for record in records]
    if any(unclear):
        logger.warning(
            "%s: %s letters other than A, C, G, T, in %s of %s records; each is read as an unknown token",
            path, f"{sum(unclear):,}", f"{sum(map(bool, unclear)):,}", f"{len(records):,}",
        )  # fmt: skip
    sequences, names = [(record.sequence,) for record in records], [{"name": record.name} for record in records]
    return Table(Path(path), sequences, None, list(range(1, len(records) + 1)), sum(unclear), names)


def predict_table(finetuned: Finetuned, table: Table, path: Path) -> tuple[dict[str, float], int]:
    """Write the predictions for a table's rows to `path`.

    The columns are those of the input, `ngrams` (how many G-grams match in the sequence) for models that have them,
    `prediction` and, for classes and labels, the probability of each. Per base, `.` stands for what was cut off.
    A column of the input that has the name of one of these is replaced, which is logged.

    Args:
        finetuned: the model.
        table: with or without labels.
        path: of the CSV to write.

    Returns:
        The metrics (none if the table has no labels), and how many rows were cut short.
    """
    task, preprocessor = finetuned.task, finetuned.preprocessor
    if table.is_pair != finetuned.is_pair:
        expected, found = ("pairs", "single sequences") if finetuned.is_pair else ("single sequences", "pairs")
        raise InputError(f"{table.path}: expected {expected}, as the model was trained on, found {found}")
    labels = None if table.labels is None else task.labels_of(table)
    encoded = preprocessor.encode(table, task)
    logits = finetuned.compute_logits(encoded)
    columns: list[dict[str, Any]] = []
    ngrams = preprocessor.count_ngrams(encoded.input_ids)
    for row, sequences in enumerate(table.sequences):
        names = ("sequence1", "sequence2") if table.is_pair else ("sequence",)
        cells: dict[str, Any] = dict(zip(names, sequences))
        if labels is not None:
            cells["label"] = table.labels[row]
        new: dict[str, Any] = {} if ngrams is None else {"ngrams": ngrams[row]}
        new |= task.predicted_columns(logits[row], encoded.bases[row] if encoded.bases else None, len(sequences[0]))
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
    stacked = task.stack(task.align(labels, encoded.bases)).numpy()
    return task.metrics(task.stack_logits(logits), stacked), encoded.num_truncated
