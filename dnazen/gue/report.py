"""GUE's results as Markdown, CSV and a picture, beside the paper's."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from dnazen.files import atomic_file
from dnazen.finetuning.data import PREDICTIONS_FILE, REPORT_FILE, SPLITS, Overlap
from dnazen.finetuning.tasks import mcc
from dnazen.gue.datasets import describe_data
from dnazen.gue.paper import AVERAGE_NGRAMS, DATASETS, TABLES, mcc_of

# the paper's models that stand beside ours, and the table each is from
BESIDE = (
    ("Table 2", "DNABERT-2"), ("Table 2", "DNAZEN"), ("Table 2", "DNAZEN†"), ("Table 3", "DNAZEN w/o WGM"),
    ("Table 4", "DNAZEN (R)"), ("Table 6", "NT-2500M-multi"),
)  # fmt: skip
# matched G-grams in a sequence, from and to
DENSITIES = ((0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, None))


def write_report(
    output_dir: Path, models: list[str], results: list[dict[str, Any]], failed: dict[str, str], absent: dict[str, str],
    overlaps: dict[str, dict[str, Overlap]], settings: dict[str, Any],
) -> str:  # fmt: skip
    """Write `report.md`, `results.csv` (a line a job), `density.csv` and `gue.png`.

    Args:
        output_dir: where to.
        models: labels, in the order of the rows.
        results: of each finished job `model`, `dataset`, `seed` and `folder`.
        failed: why, by the name of the job.
        absent: data sets that were not run, and why.
        overlaps: repeats and leaks by data set and split.
        settings: what was the same for all jobs.

    Returns:
        The text of `report.md`.
    """
    for result in results:
        report = json.loads((result["folder"] / REPORT_FILE).read_text())
        result |= {f"test_{name}": report["test"][name] for name in ("mcc", "accuracy", "f1")}
        result |= {"dev_mcc": report["dev"]["mcc"], "seconds": report["train_seconds"]}
        result |= {name: report.get(name, "") for name in ("steps", "best_step", "k", "C")}
        result |= {f"cut_short_{split}": report.get("num_truncated", {}).get(split, 0) for split in SPLITS}
    _write_csv(output_dir / "results.csv", [{k: v for k, v in result.items() if k != "folder"} for result in results])
    density = list(score_by_density(results))
    _write_csv(output_dir / "density.csv", density)
    text = format_report(models, results, failed, absent, overlaps, settings, density)
    with atomic_file(output_dir / "report.md", may_exist=True) as path:
        path.write_text(text)
    if results:
        plot_results(output_dir / "gue.png", models, results)
    return text


def format_report(
    models: list[str], results: list[dict[str, Any]], failed: dict[str, str], absent: dict[str, str],
    overlaps: dict[str, dict[str, Overlap]], settings: dict[str, Any], density: list[dict[str, Any]],
) -> str:  # fmt: skip
    """The report as Markdown; see `write_report`."""
    lines = ["# GUE", "", "MCC in percent on test, of the model that is best on dev. "
             + "; ".join(f"{name}: {value}" for name, value in settings.items()) + ".", ""]  # fmt: skip
    datasets = [dataset for dataset in DATASETS if any(result["dataset"] == dataset for result in results)]
    cells = {(dataset, model): _select(results, dataset, model) for dataset in datasets for model in models}
    rows = []
    for dataset in datasets:
        row = [dataset]
        best = max(_mean(cell, "test_mcc") for (name, _), cell in cells.items() if name == dataset and cell)
        for model in models:
            cell = cells[dataset, model]
            text = _spread(cell, "test_mcc") if cell else ""
            row.append(f"**{text}**" if cell and _mean(cell, "test_mcc") == best else text)
        rows.append(row + [f"{mcc_of(table, model, dataset):.2f}" for table, model in BESIDE])
    if datasets and all(cells.values()):
        means = [np.mean([_mean(cells[dataset, model], "test_mcc") for dataset in datasets]) for model in models]
        paper = [np.mean([mcc_of(table, model, dataset) for dataset in datasets]) for table, model in BESIDE]
        rows.append(["mean", *(f"{100 * value:.2f}" for value in means), *(f"{value:.2f}" for value in paper)])
    lines += _table(["data set", *models, *(f"{model} ({table})" for table, model in BESIDE)], rows)
    lines += ["", "Bold: the best of the models run here; ± is the standard deviation over seeds. Columns with a "
              "table's number are the paper's (arXiv 2505.02206); † was pretrained further on GUE.", ""]  # fmt: skip
    if len(models) > 1 and datasets:
        lines += ["## Wins and losses of the first model", ""]
        lines += [_compare(models[0], other, datasets, cells) for other in models[1:]] + [""]
    lines += ["## Each data set", ""]
    rows = []
    for (dataset, model), cell in cells.items():
        if cell:
            by_seed = ", ".join(f"{100 * result['test_mcc']:.2f}" for result in cell)
            spreads = [_spread(cell, name) for name in ("test_accuracy", "test_f1", "dev_mcc")]
            cut_short = " / ".join(f"{cell[0][f'cut_short_{split}']:,}" for split in SPLITS)
            seconds = f"{_mean(cell, 'seconds'):.0f}"
            rows.append([dataset, model, by_seed, *spreads, seconds, cut_short, _describe_choice(cell)])
    header = ["data set", "model", "MCC by seed", "accuracy %", "macro F1 %", "dev MCC", "seconds",
              "cut short (train / dev / test)", "best step or k, C"]  # fmt: skip
    lines += [*_table(header, rows), ""]
    if density:
        lines += ["## By number of matched G-grams", "", "Accuracy in percent over the test sequences of all data sets "
                  "and seeds, by how many G-grams match in the sequence.", ""]  # fmt: skip
        lines += [*_table(["G-grams", "sequences", *models], _pool_density(density, models)), ""]
        averages = []
        for dataset in datasets:
            here = [row for row in density if row["dataset"] == dataset and row["model"] == density[0]["model"]]
            found = sum(row["ngrams"] for row in here) / max(1, sum(row["sequences"] for row in here))
            averages.append(f"{dataset} {found:.1f} ({AVERAGE_NGRAMS[DATASETS.index(dataset)]})")
        lines += ["G-grams in a test sequence on average, and in the paper: " + ", ".join(averages) + ".", ""]
    if datasets:
        rows = [
            [table, model, *(f"{mcc_of(table, model, dataset):.2f}" for dataset in datasets)]
            for table, rows_of_table in TABLES.items()
            for model in rows_of_table
        ]
        lines += ["## The paper's figures on these data sets", "", *_table(["table", "model", *datasets], rows), ""]
    lines += ["## The data", ""]
    lines += [f"- {line}" for line in describe_data(overlaps, absent)]
    lines += ["", "## Failed jobs", "", *(f"- {name}: {reason}" for name, reason in failed.items())] if failed else []
    return "\n".join(lines).rstrip() + "\n"


def score_by_density(results: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Accuracy and MCC of each model on each data set by how many G-grams match in a sequence, over all seeds.

    The counts are those of the first model that has G-grams, for all models alike; a data set without any is left out.
    """
    tables: dict[tuple[str, str], list[list[dict[str, str]]]] = {}
    for result in results:
        with open(result["folder"] / PREDICTIONS_FILE, newline="") as file:
            tables.setdefault((result["dataset"], result["model"]), []).append(list(csv.DictReader(file)))
    for (dataset, model), runs in tables.items():
        counted = [other[0] for (name, _), other in tables.items() if name == dataset and "ngrams" in other[0][0]]
        if not counted:
            continue
        counts = np.array([int(row["ngrams"]) for row in counted[0]])
        labels = np.array([int(row["label"]) for row in counted[0]])
        predictions = np.array([[int(row["prediction"]) for row in run] for run in runs])
        for first, last in DENSITIES:
            chosen = (counts >= first) & (counts <= (last if last is not None else counts.max(initial=first)))
            if chosen.any():
                truth, said = np.tile(labels[chosen], len(runs)), predictions[:, chosen].ravel()
                yield {
                    "dataset": dataset, "model": model, "from": first, "to": "" if last is None else last,
                    "sequences": int(chosen.sum()), "ngrams": int(counts[chosen].sum()),
                    "accuracy": float((truth == said).mean()), "mcc": mcc(truth, said),
                }  # fmt: skip


def plot_results(path: Path, models: list[str], results: list[dict[str, Any]]) -> None:
    """A line for each data set: mean and spread over seeds of each model, and the paper's DNABERT-2 and DNAZEN†."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    datasets = [dataset for dataset in DATASETS if any(result["dataset"] == dataset for result in results)]
    figure = Figure(figsize=(8, 1.6 + 0.45 * len(datasets)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = np.arange(len(datasets))[::-1]
    first = {dataset: _select(results, dataset, models[0]) for dataset in datasets}
    for place, dataset in zip(places, datasets):
        others = [_mean(cell, "test_mcc") for model in models[1:] if (cell := _select(results, dataset, model))]
        if first[dataset] and others:
            wins = _mean(first[dataset], "test_mcc") > max(others)
            axes.axhspan(place - 0.5, place + 0.5, color="#2a7f3f" if wins else "#b03030", alpha=0.08, linewidth=0)
    for index, model in enumerate(models):
        cells = [_select(results, dataset, model) for dataset in datasets]
        found = [(place, cell) for place, cell in zip(places, cells) if cell]
        offset = 0.5 * (len(models) - 1) * 0.12 - index * 0.12
        axes.errorbar(
            [100 * _mean(cell, "test_mcc") for _, cell in found], [place + offset for place, _ in found],
            xerr=[100 * _deviation(cell, "test_mcc") for _, cell in found], fmt="o", markersize=5, label=model,
        )  # fmt: skip
    for model, marker in (("DNABERT-2", "|"), ("DNAZEN†", "x")):
        values = [mcc_of("Table 2", model, dataset) for dataset in datasets]
        axes.plot(values, places, marker, color="0.4", markersize=9, label=f"{model} (paper)")
    axes.set_yticks(places, datasets)
    axes.set_ylim(-0.6, len(datasets) - 0.4)
    axes.set_xlabel("MCC on test, %")
    if len(models) > 1:
        axes.set_title(f"green: {models[0]} is ahead of the others run here; red: it is not", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncol=3, fontsize=8, frameon=False)
    with atomic_file(path, may_exist=True) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def _select(results: list[dict[str, Any]], dataset: str, model: str) -> list[dict[str, Any]]:
    return [result for result in results if result["dataset"] == dataset and result["model"] == model]


def _mean(cell: list[dict[str, Any]], name: str) -> float:
    return mean(result[name] for result in cell)


def _deviation(cell: list[dict[str, Any]], name: str) -> float:
    return stdev(result[name] for result in cell) if len(cell) > 1 else 0.0


def _spread(cell: list[dict[str, Any]], name: str) -> str:
    text = f"{100 * _mean(cell, name):.2f}"
    return f"{text} ± {100 * _deviation(cell, name):.2f}" if len(cell) > 1 else text


def _describe_choice(cell: list[dict[str, Any]]) -> str:
    if cell[0]["k"]:
        return f"k {cell[0]['k']}, C {cell[0]['C']:g}"
    return ", ".join(str(result["best_step"]) for result in cell) + f" of {max(result['steps'] for result in cell)}"


def _compare(model: str, other: str, datasets: list[str], cells: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    differences = {
        dataset: 100 * (_mean(cells[dataset, model], "test_mcc") - _mean(cells[dataset, other], "test_mcc"))
        for dataset in datasets
        if cells[dataset, model] and cells[dataset, other]
    }
    ahead = sum(value > 0 for value in differences.values())
    listed = ", ".join(f"{dataset} {value:+.2f}" for dataset, value in differences.items())
    return f"- against {other}: ahead on {ahead} of {len(differences)} ({listed})"


def _pool_density(density: list[dict[str, Any]], models: list[str]) -> list[list[str]]:
    rows = []
    for first, last in DENSITIES:
        here = [row for row in density if row["from"] == first]
        if not here:
            continue
        cells = []
        for model in models:
            mine = [row for row in here if row["model"] == model]
            weights = [row["sequences"] for row in mine]
            cells.append(f"{100 * np.average([row['accuracy'] for row in mine], weights=weights):.2f}" if mine else "")
        size = max(sum(row["sequences"] for row in here if row["model"] == model) for model in models)
        name = f"{first} or more" if last is None else str(first) if first == last else f"{first} to {last}"
        rows.append([name, f"{size:,}", *cells])
    return rows


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_file(path, may_exist=True) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["dataset"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
