"""The baseline that any language model must beat: logistic regression on counts of k-mers."""

import argparse
import csv
import sys
import time
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from dnazen.files import InputError, write_json
from dnazen.finetuning.data import PREDICTIONS_FILE, REPORT_FILE, read_splits
from dnazen.finetuning.tasks import Classification, mcc

NAME = "kmer-lr"
KS, STRENGTHS = (3, 4, 5, 6, 7), (0.001, 0.01, 0.1, 1.0)


def main(argv: list[str] | None = None) -> int:
    """Run on one data set: `python -m dnazen.gue.kmer --data DIR --output-dir DIR`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output-dir", required=True)
    args = parser.parse_args(argv)
    try:
        run_kmers(args.data, Path(args.output_dir))
    except (InputError, OSError) as error:
        print(f"dnazen: error: {error}", file=sys.stderr)
        return 1
    return 0


def run_kmers(data: str, output_dir: Path) -> None:
    """Fit on train for each k and strength of regularisation, take the best MCC on dev, test that one.

    Writes `predictions.csv` and, last, `report.json`, as fine-tuning does. Nothing is random.
    """
    started = time.perf_counter()
    tables = read_splits(data)
    task = Classification.from_table(tables["train"])
    labels = {split: np.stack(task.labels_of(table)) for split, table in tables.items()}
    texts = {split: [" ".join(row) for row in table.sequences] for split, table in tables.items()}
    best: tuple[float, int, float] = (-2.0, 0, 0.0)
    for k in KS:
        vectorizer = CountVectorizer(analyzer="char", ngram_range=(k, k), lowercase=False)
        counts = {split: vectorizer.fit_transform(rows) if split == "train" else vectorizer.transform(rows)
                  for split, rows in texts.items()}  # fmt: skip
        for strength in STRENGTHS:
            model = LogisticRegression(C=strength, max_iter=5000).fit(counts["train"], labels["train"])
            score = mcc(labels["dev"], model.predict(counts["dev"]))
            if score > best[0]:
                best = (score, k, strength)
                logits = {split: np.log(model.predict_proba(counts[split]) + 1e-300) for split in ("dev", "test")}
    report = {split: task.metrics(logits[split], labels[split]) for split in logits}
    output_dir.mkdir(parents=True, exist_ok=True)
    rows = [
        {"sequence": text, "label": label, **task.predicted_columns(row)}
        for text, label, row in zip(texts["test"], labels["test"].tolist(), logits["test"])
    ]
    with open(output_dir / PREDICTIONS_FILE, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    chosen = {"k": best[1], "C": best[2]}
    write_json(output_dir / REPORT_FILE, {**report, **chosen, "train_seconds": time.perf_counter() - started})


if __name__ == "__main__":
    sys.exit(main())
