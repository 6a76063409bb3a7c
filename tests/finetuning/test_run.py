"""Fine-tuning from its arguments to its folder, in this process and as a command."""

import csv
import gzip
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dnazen.files import InputError
from dnazen.finetuning.arguments import FinetuningArguments, FinetuningDataArguments
from dnazen.finetuning.data import SPLITS, read_table
from dnazen.finetuning.finetuned import open_finetuned
from dnazen.finetuning.predict import predict
from dnazen.finetuning.run import finetune, main
from dnazen.models import DNAZenForSequenceClassification
from tests.finetuning.conftest import write_splits
from tests.helpers.launch import PROGRAMS, ROOT, environment, run
from tests.helpers.sequences import random_bases

SCRIPT = ROOT / "dnazen" / "finetune.py"
WITHOUT_SEARCH = PROGRAMS / "without_search.py"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = {"learning_rate": 3e-3, "num_train_epochs": 2, "warmup_steps": 0, "per_device_train_batch_size": 16}


def tune(model, data, output_dir, **arguments) -> dict:
    """Run in this process; returns the report."""
    names = FinetuningDataArguments.__dataclass_fields__
    ours = {name: value for name, value in arguments.items() if name in names}
    theirs = {name: value for name, value in arguments.items() if name not in names}
    args = FinetuningArguments(output_dir=str(output_dir), disable_tqdm=True, **{**FAST, **theirs})
    finetune(FinetuningDataArguments(model=str(model), data=str(data), **ours), args)
    return json.loads((output_dir / "report.json").read_text())


@pytest.fixture(scope="module")
def learnt(model_folder, data, tmp_path_factory):
    """A run that has learnt `data`, and its report. Tests only read it."""
    folder = tmp_path_factory.mktemp("learnt") / "run"
    return folder, tune(model_folder, data, folder, num_train_epochs=10)


def assert_same_file(one, other):
    assert one.read_bytes() == other.read_bytes()


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_learns_and_writes_a_folder_that_everything_reads(learnt, data, tmp_path):
    """The model is learnt; `from_pretrained`, `predict` and the run itself give the same logits for the test split."""
    folder, report = learnt
    assert report["test"]["mcc"] > 0.8, "three copies of a motif are easy"
    evaluations = [entry for entry in report["log"] if "eval_mcc" in entry]
    best = max(evaluations, key=lambda entry: entry["eval_mcc"])
    assert report["dev"]["mcc"] == best["eval_mcc"] and report["best_step"] == best["step"]
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))

    final = folder / "final"
    assert not list(final.glob("*.bin")) and (final / "ngram.json").is_file()
    finetuned = open_finetuned(final)
    encoded = finetuned.preprocessor.encode(read_table(data / "test.csv"), finetuned.task)
    logits = np.stack(finetuned.compute_logits(encoded))
    model = DNAZenForSequenceClassification.from_pretrained(final).eval()
    with torch.no_grad():
        batch = finetuned.preprocessor.make_collator()(encoded.input_ids)
        np.testing.assert_allclose(model(**batch).logits.numpy(), logits, rtol=0, atol=1e-5)
    count, metrics = predict(final, data / "test.csv", tmp_path / "predicted")
    assert count == 24 and metrics == report["test"]
    assert_same_file(tmp_path / "predicted" / "predictions.csv", folder / "predictions.csv")
    rows = read_rows(tmp_path / "predicted" / "predictions.csv")
    assert [int(row["prediction"]) for row in rows] == logits.argmax(-1).tolist()
    expected = torch.from_numpy(logits).double().softmax(-1)[:, 1].tolist()
    assert [float(row["probability_1"]) for row in rows] == pytest.approx(expected, abs=1e-6)
    assert [int(row["ngrams"]) for row in rows] == finetuned.preprocessor.count_ngrams(encoded.input_ids)


@pytest.mark.slow
def test_best_model_is_that_of_its_step(model_folder, data, tmp_path):
    """What is kept is the model as it was at the best evaluation, though training went on."""
    report = tune(model_folder, data, tmp_path / "long", max_steps=12, eval_strategy="steps", eval_steps=2)
    kept = open_finetuned(tmp_path / "long" / "final")
    table = read_table(data / "dev.csv")
    logits = np.stack(kept.compute_logits(kept.preprocessor.encode(table, kept.task)))
    assert kept.task.metrics(logits, np.array(kept.task.labels_of(table)))["mcc"] == pytest.approx(report["dev"]["mcc"])


@pytest.mark.slow
def test_early_stopping(model_folder, data, tmp_path):
    """With a learning rate of 0 nothing gets better."""
    report = tune(model_folder, data, tmp_path / "run", learning_rate=0.0, num_train_epochs=20, early_stopping=2)
    assert report["best_step"] == 4 and report["steps"] == 12


@pytest.mark.slow
def test_loss_that_is_not_finite_ends_the_run(model_folder, data, tmp_path):
    with pytest.raises(FloatingPointError, match="the loss on dev is nan; try a lower --learning-rate"):
        tune(model_folder, data, tmp_path / "run", learning_rate=1e30)
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.slow
def test_adapters_alone_are_saved_and_come_back(model_folder, data, tmp_path):
    report = tune(model_folder, data, tmp_path / "run", lora_rank=4, num_train_epochs=3)
    final = tmp_path / "run" / "final"
    with safe_open(final / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert names and all(re.search(r"lora_[AB]|classifier|pooler", name) for name in names)
    assert not (final / "model.safetensors").exists()
    _, metrics = predict(final, data / "test.csv", tmp_path / "predicted")
    assert metrics == report["test"]
    assert_same_file(tmp_path / "predicted" / "predictions.csv", tmp_path / "run" / "predictions.csv")


@pytest.mark.slow
def test_adapters_of_another_model_are_refused(model_folder, data, tmp_path):
    tune(model_folder, data, tmp_path / "run", lora_rank=2, max_steps=1)
    record = json.loads((tmp_path / "run" / "final" / "finetune.json").read_text())
    changes = {"expected weights with SHA-256 0": {"sha256": "0"}, "in gone, found nothing": {"folder": "gone"}}
    for message, change in changes.items():
        changed = {**record, "base": {**record["base"], **change}}
        (tmp_path / "run" / "final" / "finetune.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message):
            open_finetuned(tmp_path / "run" / "final")
    (tmp_path / "run" / "final" / "finetune.json").write_text(json.dumps(record))
    adapters = tmp_path / "run" / "final" / "adapter_model.safetensors"
    adapters.write_bytes(adapters.read_bytes()[:1000])
    with pytest.raises(InputError, match="final: expected LoRA adapters, found none that can be read"):
        open_finetuned(tmp_path / "run" / "final")


@pytest.mark.slow
def test_dev_and_test_are_computed_alike(model_folder, tmp_path):
    """Also where training computes in bf16: the same rows have the same figures, and `predict` gives them again."""
    data = write_splits(tmp_path / "data", regression_row)
    (data / "test.csv").write_bytes((data / "dev.csv").read_bytes())
    report = tune(model_folder, data, tmp_path / "run", task="regression", bf16=True, attn_implementation="eager")
    assert {name: report["dev"][name] for name in report["test"]} == report["test"]
    final, test = tmp_path / "run" / "final", data / "test.csv"
    _, metrics = predict(final, test, tmp_path / "predicted", attn_implementation="eager")
    assert metrics == report["test"]


def test_fasta_is_read_as_csv_is(learnt, data, tmp_path, caplog):
    """Each record is predicted as a row of the same sequence, in lines of any length and either case, and named."""
    texts = [row["sequence"] for row in read_rows(data / "test.csv")]
    lines = [f">record{i} of the test\n{text[:9]}\n{text[9:].lower()}\n" for i, text in enumerate(texts)]
    (tmp_path / "test.fa.gz").write_bytes(gzip.compress("".join(lines).encode()))
    count, metrics = predict(learnt[0] / "final", tmp_path / "test.fa.gz", tmp_path / "predicted")
    assert count == 24 and metrics == {} and not (tmp_path / "predicted" / "metrics.json").exists()
    found = read_rows(tmp_path / "predicted" / "predictions.csv")
    assert [row.pop("name") for row in found] == [f"record{i}" for i in range(24)]
    for row, expected in zip(found, read_rows(learnt[0] / "predictions.csv"), strict=True):
        del expected["label"]
        assert row == expected
    (tmp_path / "unclear.fa").write_text(">one\nACGTACGTNNTTGACA\n>two\nACGT\n")
    predict(learnt[0] / "final", tmp_path / "unclear.fa", tmp_path / "unclear")
    assert "2 letters other than A, C, G, T, in 1 of 2 records" in caplog.text
    (tmp_path / "none.fa").write_text("ACGT\n")
    with pytest.raises(InputError, match="Expected '>' at the start of a record"):
        predict(learnt[0] / "final", tmp_path / "none.fa", tmp_path / "none")


@pytest.mark.slow
def test_precision_that_is_asked_for_wins_over_that_of_training(learnt, data, tmp_path):
    """A record of training in bf16 gives what `bf16` gives; either name has its way with either record."""
    final, record = learnt[0] / "final", json.loads((learnt[0] / "final" / "finetune.json").read_text())
    copy = shutil.copytree(final, tmp_path / "copy")
    (copy / "finetune.json").write_text(json.dumps({**record, "autocast": {DEVICE: "bfloat16"}}))
    found = {}
    for name, folder, precision in (
        ("recorded", copy, None), ("asked", final, "bf16"), ("refused", copy, "fp32"), ("plain", final, "fp32")
    ):  # fmt: skip
        predict(folder, data / "test.csv", tmp_path / name, precision)
        found[name] = (tmp_path / name / "predictions.csv").read_bytes()
    assert found["recorded"] == found["asked"] != found["plain"] == found["refused"]
    with pytest.raises(InputError, match="precision: expected fp32 or bf16, found half"):
        predict(final, data / "test.csv", tmp_path / "other", "half")


@pytest.mark.parametrize("change, found", [({"kind": "ranking"}, "ranking"), ({"num_labels": None}, "num_labels")])
def test_record_of_no_task_is_refused(learnt, tmp_path, change, found):
    record = {**json.loads((learnt[0] / "final" / "finetune.json").read_text()), **change}
    kept = {name: value for name, value in record.items() if value is not None}
    (tmp_path / "finetune.json").write_text(json.dumps(kept))
    with pytest.raises(InputError, match=f"finetune.json: expected a task of this version, found none: '{found}'"):
        open_finetuned(tmp_path)


def test_columns_of_the_input_are_kept(learnt, tmp_path, caplog):
    """Also labels that some rows do not have, for which there are no metrics; ours win, and both are said."""
    (tmp_path / "in.csv").write_text("name,sequence,label,ngrams\none,ACGTACGT,1,x\ntwo,TTGACCAA,,y\n")
    _, metrics = predict(learnt[0] / "final", tmp_path / "in.csv", tmp_path / "predicted")
    rows = read_rows(tmp_path / "predicted" / "predictions.csv")
    assert metrics == {} and not (tmp_path / "predicted" / "metrics.json").exists()
    assert [(row["name"], row["sequence"], row["label"]) for row in rows] == [
        ("one", "ACGTACGT", "1"), ("two", "TTGACCAA", "")
    ]  # fmt: skip
    assert all(row["ngrams"].isdigit() and row["prediction"] in "01" for row in rows)
    assert "1 of 2 rows have a label" in caplog.text and "replaced in the predictions: columns ngrams" in caplog.text


def _is_longer(preprocessor, row, max_length):
    tokens = [preprocessor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in row]
    return sum(map(len, tokens)) + len(tokens) + 1 > max_length


def regression_row(rng):
    text = random_bases(30, rng)
    return {"sequence": text, "label": f"{text.count('G') / 30:.4f}"}


@pytest.mark.slow
def test_regression_does_not_depend_on_the_unit(model_folder, tmp_path):
    """Targets a, and 1000 + 100 a: the same correlation, and predictions in the unit of the labels."""
    plain = write_splits(tmp_path / "plain", regression_row)
    scaled = write_splits(
        tmp_path / "scaled", lambda rng: (row := regression_row(rng)) | {"label": 1000 + 100 * float(row["label"])}
    )
    one, other = (
        tune(model_folder, data, tmp_path / f"{data.name}-run", task="regression") for data in (plain, scaled)
    )
    # labels are fp32: of 1000 + 100 a, six digits after the first
    assert other["test"]["pearson"] == pytest.approx(one["test"]["pearson"], abs=1e-3)
    assert other["test"]["mse"] == pytest.approx(1e4 * one["test"]["mse"], rel=1e-2)
    found, expected = ([float(row["prediction"]) for row in read_rows(tmp_path / f"{name}-run" / "predictions.csv")]
                       for name in ("scaled", "plain"))  # fmt: skip
    np.testing.assert_allclose(found, 1000 + 100 * np.array(expected), rtol=0, atol=0.1)


def multi_label_row(rng):
    text = random_bases(30, rng)
    return {"sequence": text, "label": f"{int(text.count('G') > 7)} {int(text.count('A') > 7)}"}


def per_base_row(rng):
    text = random_bases(rng.randrange(20, 40), rng)
    return {"sequence": text, "label": "".join(str(int(base in "GC")) for base in text)}


def pair_row(rng):
    label = rng.randrange(2)
    first = random_bases(25, rng)
    return {"sequence1": first, "sequence2": first if label else random_bases(25, rng), "label": label}


@pytest.mark.slow
@pytest.mark.parametrize(
    "make_row, task, metrics",
    [
        (regression_row, "regression", {"pearson", "spearman", "mse"}),
        (multi_label_row, "multi-label", {"mcc", "accuracy", "f1", "auroc"}),
        (per_base_row, "per-base", {"mcc", "accuracy", "f1"}),
        (pair_row, "classification", {"mcc", "accuracy", "f1", "auroc"}),
    ],
)
def test_each_task_trains_and_predicts(model_folder, tmp_path, make_row, task, metrics):
    data = write_splits(tmp_path / "data", make_row)
    report = tune(model_folder, data, tmp_path / "run", task=task, max_length=12)
    assert set(report["test"]) == metrics
    preprocessor = open_finetuned(tmp_path / "run" / "final").preprocessor
    tables = {split: read_table(data / f"{split}.csv") for split in SPLITS}
    expected = {
        split: sum(_is_longer(preprocessor, row, 12) for row in table.sequences) for split, table in tables.items()
    }
    assert report["num_truncated"] == expected and expected["test"] > 0
    count, found = predict(tmp_path / "run" / "final", data / "test.csv", tmp_path / "predicted")
    assert count == 24 and found == report["test"]
    rows = read_rows(tmp_path / "predicted" / "predictions.csv")
    if task == "per-base":
        assert all(len(row["prediction"]) == len(row["sequence"]) for row in rows)
        assert any("." in row["prediction"] for row in rows) and {*"".join(r["prediction"] for r in rows)} <= {*"01."}


@pytest.mark.slow
def test_rare_class_is_found_with_weights(model_folder, tmp_path):
    """A fifth of the rows is of class 1, whatever their sequence: weighted heavily, the model says 1 for all."""
    data = write_splits(
        tmp_path / "data", lambda rng: {"sequence": random_bases(30, rng), "label": int(rng.random() < 0.2)}
    )
    for name, weights, expected in (("plain", None, 0), ("weighted", ["1", "1000"], 1)):
        tune(model_folder, data, tmp_path / name, class_weights=weights, num_train_epochs=3)
        predictions = {row["prediction"] for row in read_rows(tmp_path / name / "predictions.csv")}
        assert str(expected) in predictions and (expected == 0 or predictions == {"1"})


def test_pairs_and_single_sequences_are_not_confused(learnt, model_folder, data, tmp_path):
    pairs = write_splits(tmp_path / "pairs", pair_row)
    with pytest.raises(InputError, match="expected single sequences, as the model was trained on, found pairs"):
        predict(learnt[0] / "final", pairs / "test.csv", tmp_path / "predicted")
    assert not (tmp_path / "predicted").exists()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "train.csv").symlink_to(data / "train.csv")
    (tmp_path / "mixed" / "dev.csv").symlink_to(pairs / "dev.csv")
    with pytest.raises(InputError, match=r"dev.csv: expected pairs in all splits or in none"):
        tune(model_folder, tmp_path / "mixed", tmp_path / "other")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"save_strategy": "epoch"}, "--save-strategy has no effect"),
        ({"resume_from_checkpoint": "x"}, "--resume-from-checkpoint is not supported"),
        ({"label_smoothing_factor": 0.1}, "--label-smoothing-factor is not supported"),
        ({"per_device_eval_batch_size": 4}, "evaluation packs by tokens"),
        ({"eval_delay": 2}, "--eval-delay is not supported"),
        ({"bf16_full_eval": True}, "--bf16-full-eval has no effect"),
        ({"do_train": True}, "--do-train has no effect"),
        ({"eval_strategy": "no"}, "--eval-strategy must be epoch or steps"),
        ({"metric_for_best_model": "speed"}, "--metric-for-best-model: expected accuracy, f1, loss, mcc"),
        ({"lora_alpha": 4}, "--lora-alpha needs --lora-rank"),
        ({"lora_rank": 0}, "--lora-rank must be at least 1"),
        ({"class_weights": ["1"]}, "--class-weights: expected `balanced` or 2 numbers above 0, found 1"),
        ({"class_weights": ["balanced"], "task": "regression"}, "--class-weights does not go with --task regression"),
    ],
)
def test_arguments_that_cannot_be_heeded_are_refused(model_folder, data, tmp_path, arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        tune(model_folder, data, tmp_path / "run", **arguments)


def test_results_are_not_overwritten_and_splits_are_needed(model_folder, data, tmp_path):
    (tmp_path / "run" / "final").mkdir(parents=True)
    with pytest.raises(InputError, match="already exists"):
        tune(model_folder, data, tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"expected train.csv or train.csv.gz, found neither"):
        tune(model_folder, tmp_path / "empty", tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_two_processes_under_deepspeed(model_folder, data, tmp_path, zero):
    """The command of the README; what it keeps is whole, also of a partitioned model. The norm is taken at once."""
    output = run(
        script=WITHOUT_SEARCH, entry="finetune.py", processes=2, zero=zero, model=model_folder, data=data,
        output_dir=tmp_path / "run", max_steps=4, eval_strategy="steps", eval_steps=2, disable_tqdm=True,
        learning_rate=1e-3,
    ).stdout  # fmt: skip
    assert "best on dev at step" in output
    _, metrics = predict(tmp_path / "run" / "final", data / "test.csv", tmp_path / "predicted")
    assert metrics == json.loads((tmp_path / "run" / "report.json").read_text())["test"]


@pytest.mark.slow
def test_the_command_reports_bad_input_in_one_line(model_folder, data, tmp_path):
    command = [sys.executable, SCRIPT, "--model", model_folder, "--data", tmp_path, "--output_dir", tmp_path / "run"]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"dnazen: error: {tmp_path}: expected train.csv")


@pytest.mark.parametrize("flag", ["--help", "--help-all"])
def test_help_has_ours_first_and_writes_flags_with_hyphens(monkeypatch, capsys, flag):
    monkeypatch.setattr("sys.argv", ["finetune.py", flag])
    assert main() == 0
    shown = re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, flags=re.MULTILINE)
    assert shown[:3] == ["--model", "--data", "--task"]
    assert shown.index("--attn-implementation") < shown.index("--learning-rate")
    assert len(shown) == len(set(shown)) and not any("_" in name for name in shown)
    assert ("--adam-beta1" in shown) == (flag == "--help-all") and "--save-steps" not in shown
