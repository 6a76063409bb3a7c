"""GUE: its tables, the launcher (killed, failing, resumed), the baseline and the report."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import matthews_corrcoef

from dnazen.cli.main import main
from dnazen.files import InputError
from dnazen.gue import paper, schedule
from dnazen.gue.datasets import choose_datasets
from dnazen.gue.kmer import run_kmers
from dnazen.gue.launch import run_gue
from dnazen.gue.models import list_models
from dnazen.gue.protocol import PROTOCOLS
from dnazen.gue.report import score_by_density
from tests.finetuning.conftest import data, model_folder, motif_row, write_splits  # noqa: F401
from tests.helpers.launch import environment, kill_trees
from tests.helpers.warm import WarmProgram


@pytest.fixture(scope="session")
def gue(tmp_path_factory):
    """A GUE of two small data sets, one without training split and 25 that are absent."""
    folder = tmp_path_factory.mktemp("gue")
    for name in ("mouse/2", "prom/prom_core_tata", "EMP/H3"):
        write_splits(folder / name, motif_row)
    (folder / "EMP" / "H3" / "train.csv").unlink()
    return folder


def arguments(gue, output_dir, *models, **options):
    words = ["gue", "--data", str(gue), "--output-dir", str(output_dir), "--model", *map(str, models)]
    for name, value in {"seeds": 1, "max_steps": 2, "jobs_per_device": 2, **options}.items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


class WarmJob(WarmProgram):
    """A job as the launcher starts it, forked; that it dies with the launcher is tested with real ones."""

    def __init__(self, command, stdout, stderr, env, preexec_fn):
        assert command[0] == sys.executable and stderr == subprocess.STDOUT
        super().__init__(command[1:], [env], Path(stdout.name))

    @property
    def returncode(self):
        return self.poll()

    def kill(self):
        kill_trees(self.pids)

    def wait(self, timeout=60):
        return super().wait(timeout)


@pytest.fixture
def warm_jobs(monkeypatch):
    """Jobs of launchers in this process are forked from one that has imported what takes seconds."""
    monkeypatch.setattr(schedule, "subprocess", types.SimpleNamespace(Popen=WarmJob, STDOUT=subprocess.STDOUT))


@pytest.fixture
def launch(capfd, caplog, monkeypatch, warm_jobs):
    """Run the launcher in this process, its jobs in theirs; what it printed and logged."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)

    def launch(*args, expect=0, **options):
        capfd.readouterr()
        caplog.clear()
        status = main(arguments(*args, **options))
        output = "".join((*capfd.readouterr(), caplog.text))
        assert status == expect, output
        return output

    return launch


# -- tables -----------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_paper(root):
    """Every row that the text of the paper has stands in the tables, value by value, and no other."""
    text = root.parent / "shared" / "papers" / "dnazen-paper.txt"
    if not text.is_file():
        pytest.skip(f"needs {text}")
    lines = [[cell.strip() for cell in line.split("|") if cell.strip()] for line in text.read_text().splitlines()]
    rows: dict[str, list[list[float]]] = {}
    for cells in lines:
        is_row = len(cells) in (7, 8, 9) and all(cell.replace(".", "").isdigit() for cell in cells[1:])
        if is_row and not cells[0].startswith(("train", "dev", "test")):
            rows.setdefault(cells[0], []).append([float(cell) for cell in cells[1:]])
    found: dict[str, list[float]] = {}
    for name, values in {"Avg. G-gram per Case": paper.AVERAGE_NGRAMS}.items():
        assert sum(rows.pop(name), []) == list(values)
    for table in paper.TABLES.values():
        for model, values in table.items():
            found.setdefault(model, []).extend(values)
    assert {model: sum(parts, []) for model, parts in rows.items()} == found


def test_all_28_data_sets_have_a_protocol():
    assert len(PROTOCOLS) == len(set(paper.DATASETS)) == 28
    assert PROTOCOLS["prom/prom_core_tata"] == (10, 20, 200, 50, -1) and PROTOCOLS["mouse/3"].max_steps == 1000
    assert all(len(values) == 28 for table in paper.TABLES.values() for values in table.values())


def test_data_sets_by_name(gue):
    present, absent = choose_datasets(gue, None)
    assert list(present) == ["prom/prom_core_tata", "mouse/2"] and len(absent) == 26
    assert absent["EMP/H3"] == "without train" and absent["tf/0"] == "absent"
    assert list(choose_datasets(gue, ["mouse/2", "prom_core_tata"])[0]) == ["mouse/2", "prom/prom_core_tata"]
    for names, message in (
        (["prom_tata"], "found prom_tata"), (["0"], "found 0"), (["EMP/H3"], "found EMP/H3 without train"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            choose_datasets(gue, names)
    with pytest.raises(InputError, match="found none"):
        choose_datasets(gue / "mouse", None)


def test_labels_of_models(model_folder, tmp_path):  # noqa: F811
    for name in ("a/final", "b/final", "c/x", "d/x"):
        shutil.copytree(model_folder, tmp_path / name)
    names = [str(tmp_path / name) for name in ("a/final", "b/final")]
    assert [m.label for m in list_models([*names, "kmer-lr"], True)] == [
        "a", "a, no G-grams", "b", "b, no G-grams", "kmer-lr"
    ]  # fmt: skip
    config = tmp_path / "b" / "final" / "config.json"  # one that was pretrained without
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_ngrams": False}))
    assert [m.label for m in list_models(names, True)] == ["a", "a, no G-grams", "b"]
    same = [str(tmp_path / "c" / "x"), str(tmp_path / "d" / "x")]
    assert [m.label for m in list_models(same, False)] == ["c/x", "d/x"]
    assert {m.job_folder for m in list_models(same, False)} == {"c-x", "d-x"}
    # a folder that is only called `model` takes the name of what it lies in; where its jobs lie does not change
    untelling = [str(shutil.copytree(model_folder, tmp_path / name)) for name in ("e/model/final", "e-model")]
    (first, second) = list_models(untelling, False)
    assert (first.label, first.job_folder, second.label) == ("e/model", "model", "e-model")
    with pytest.raises(InputError, match="expected different models"):
        list_models([names[0], f"{names[0]}/."], False)
    shutil.copytree(model_folder, tmp_path / "b", dirs_exist_ok=True)
    with pytest.raises(InputError, match="expected models that differ beside `final`"):
        list_models([str(tmp_path / "b"), str(tmp_path / "b" / "final")], False)
    pair = [str(shutil.copytree(model_folder, tmp_path / name)) for name in ("a b", "a-b")]
    with pytest.raises(InputError, match="expected a folder of jobs for each, found a-b for a b"):
        list_models(pair, False)


# -- the launcher -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_report_and_what_it_is_made_of(gue, model_folder, tmp_path, launch):  # noqa: F811
    output = launch(gue, tmp_path / "o", model_folder, "kmer-lr", no_ngrams=True, tasks="mouse/2")
    assert "not run, because without train: EMP/H3" in output and "3/3" in output
    rows = list(csv.DictReader(open(tmp_path / "o" / "results.csv")))
    assert [row["model"] for row in rows] == ["small", "small, no G-grams", "kmer-lr"]
    text = (tmp_path / "o" / "report.md").read_text()
    for row in rows:
        label = row["model"].replace(", no ", "-no-").replace(" ", "-")
        folder = tmp_path / "o" / "jobs" / label / "mouse-2" / f"seed-{row['seed']}"
        predictions = list(csv.DictReader(open(folder / "predictions.csv")))
        truth, said = ([int(r[name]) for r in predictions] for name in ("label", "prediction"))
        assert float(row["test_mcc"]) == pytest.approx(matthews_corrcoef(truth, said))
        assert f"{100 * float(row['test_mcc']):.2f}" in text
    assert f"{paper.mcc_of('Table 2', 'DNAZEN†', 'mouse/2'):.2f}" in text and "no G-grams" in text
    cut = json.loads((tmp_path / "o" / "jobs" / "small" / "mouse-2" / "seed-0" / "report.json").read_text())
    assert " / ".join(str(cut["num_truncated"][split]) for split in ("train", "dev", "test")) in text
    assert (tmp_path / "o" / "gue.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_precision_and_attention_reach_the_jobs(gue, model_folder, tmp_path, warm_jobs):  # noqa: F811
    folder, options = tmp_path / "o", {"seeds": 1, "tasks": ["mouse/2"], "max_steps": 1}
    text, is_complete = run_gue(
        gue, [str(model_folder)], folder, precision="bf16", attn_implementation="eager", **options
    )
    job = folder / "jobs" / "small" / "mouse-2" / "seed-0"
    assert is_complete and text == (folder / "report.md").read_text()
    (dtype,) = json.loads((job / "final" / "finetune.json").read_text())["autocast"].values()
    assert dtype == "bfloat16" and "attends eager" in (job / "log.txt").read_text()
    with pytest.raises(InputError, match="--precision: expected fp32 or bf16, found half"):
        run_gue(gue, [str(model_folder)], folder, precision="half", **options)


@pytest.mark.slow
def test_killed_and_started_again(gue, model_folder, tmp_path, launch):  # noqa: F811
    """kill -9 of the launcher: its jobs die with it, what was finished stays as it is, the rest is run."""
    args, options = (gue, tmp_path / "o", model_folder), {"tasks": "mouse/2", "seeds": 2, "jobs_per_device": 1}
    command = [sys.executable, "-m", "dnazen.cli.main", *arguments(*args, **options)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    first, second = (tmp_path / "o" / "jobs" / "small" / "mouse-2" / f"seed-{seed}" for seed in (0, 1))
    deadline = time.monotonic() + 300
    while not (second / "job.json").exists():  # the first is done, the second has begun
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert children
    while any(os.path.exists(f"/proc/{child}") and "Z" not in _state(child) for child in children):
        assert time.monotonic() < deadline, "a job outlived the launcher"
        time.sleep(0.05)
    assert (first / "report.json").is_file() and not (second / "report.json").exists()
    before = (first / "report.json").stat().st_mtime_ns
    output = launch(*args, **options)
    assert "1 of 2 jobs were finished before" in output and "2/2" in output
    assert (first / "report.json").stat().st_mtime_ns == before and (second / "report.json").is_file()
    assert len(list(first.parent.glob("*/final"))) == 1, "of a data set's seeds the best on dev is kept, alone"
    assert "finished with other settings" in launch(*args, **{**options, "max_steps": 3}, expect=1)


def _state(pid: str) -> str:
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


@pytest.mark.slow
def test_failing_job_does_not_stop_the_others(gue, tmp_path, launch):
    """One data set's dev split has a class of its own: that job fails and is reported, the other is done."""
    broken = shutil.copytree(gue, tmp_path / "gue")
    with open(broken / "mouse" / "2" / "dev.csv", "a") as file:
        file.write("ACGT,7\n")
    output = launch(broken, tmp_path / "o", "kmer-lr", expect=1)
    assert "kmer-lr mouse/2 seed 0: failed" in output and "expected a class from 0 to 1" in output
    assert "kmer-lr prom/prom_core_tata seed 0: test MCC" in output
    report = (tmp_path / "o" / "report.md").read_text()
    assert "## Failed jobs" in report and "| prom/prom_core_tata |" in report
    shutil.copy(gue / "mouse" / "2" / "dev.csv", broken / "mouse" / "2" / "dev.csv")
    output = launch(broken, tmp_path / "o", "kmer-lr")
    assert "1 of 2 jobs were finished before" in output and "failed" not in output


@pytest.mark.slow
def test_data_set_that_cannot_be_read_does_not_stop_the_others(gue, tmp_path, launch):
    """It is listed as failed if it was to be run, and not even read if it was not."""
    broken = shutil.copytree(gue, tmp_path / "gue")
    (broken / "mouse" / "2" / "train.csv").write_text("no,columns\n")
    output = launch(broken, tmp_path / "chosen", "kmer-lr", tasks="prom_core_tata")
    assert "failed" not in output and "not run, because without train: EMP/H3" in output
    output = launch(broken, tmp_path / "all", "kmer-lr", expect=1)
    assert "mouse/2: failed" in output and "kmer-lr prom/prom_core_tata seed 0: test MCC" in output
    report = (tmp_path / "all" / "report.md").read_text()
    assert "## Failed jobs" in report and "found no, columns" in report and "| prom/prom_core_tata |" in report
    (broken / "EMP" / "H3" / "dev.csv.gz").write_bytes(b"")  # beside dev.csv
    output = launch(broken, tmp_path / "two", "kmer-lr", tasks="prom_core_tata")
    assert "expected one file for dev, found dev.csv and dev.csv.gz: EMP/H3" in output


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seeds", "0"], "--seeds: expected a number above 0, found 0"),
        (["--learning-rate", "-1"], "--learning-rate: expected a number above 0"),
        (["--tasks", "mouse/9"], "found mouse/9"),
    ],
)
def test_arguments_out_of_range(gue, tmp_path, capsys, options, message):
    words = ["gue", "--data", str(gue), "--model", "kmer-lr", "--output-dir", str(tmp_path / "o"), *options]
    assert main(words) == 1 and message in capsys.readouterr().err


# -- the baseline and the breakdown -----------------------------------------------------------------------------------


def test_baseline_finds_a_motif(gue, tmp_path):
    """k-mers tell sequences with three copies of a motif from others; the same every time."""
    for name in ("a", "b"):
        run_kmers(str(gue / "mouse" / "2"), tmp_path / name)
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["test"]["mcc"] > 0.8 and report["k"] in (3, 4, 5, 6, 7)
    assert (tmp_path / "a" / "predictions.csv").read_bytes() == (tmp_path / "b" / "predictions.csv").read_bytes()


def test_breakdown_by_ngrams_is_a_loop_over_rows(tmp_path):
    """Counts of the first model that has some, for all models; every sequence of every seed in one bin."""
    rng = np.random.default_rng(0)
    labels, counts = rng.integers(0, 2, 60), rng.integers(0, 25, 60)
    results, said = [], {}
    for model, seed in (("base", 0), ("kmer-lr", 0), ("ours", 0), ("ours", 1)):
        predictions = said[model, seed] = rng.integers(0, 2, 60)
        rows = [{"label": label, "prediction": p} for label, p in zip(labels, predictions)]
        if model == "ours":
            rows = [{**row, "ngrams": count} for row, count in zip(rows, counts)]
        folder = tmp_path / model / str(seed)
        folder.mkdir(parents=True)
        with open(folder / "predictions.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        results.append({"dataset": "mouse/2", "model": model, "seed": seed, "folder": folder})
    found = list(score_by_density(results))
    for model, seeds in (("base", 1), ("kmer-lr", 1), ("ours", 2)):
        mine = [row for row in found if row["model"] == model]
        assert sum(row["sequences"] for row in mine) == 60 and sum(row["ngrams"] for row in mine) == counts.sum()
        for row in mine:
            last = row["to"] if row["to"] != "" else 99
            chosen = [i for i in range(60) if row["from"] <= counts[i] <= last]
            right = [labels[i] == said[model, seed][i] for seed in range(seeds) for i in chosen]
            assert row["sequences"] == len(chosen) and row["accuracy"] == pytest.approx(np.mean(right))
