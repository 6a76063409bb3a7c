"""What pretraining refuses: one line that names the fault, exit status 1, and nothing lost."""

import json
import re
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from dnazen.models import DNAZenForMaskedLM
from dnazen.pretraining.checkpoint import list_checkpoints
from tests.helpers.launch import SCRIPT, environment, flags, run


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / folder.name)


@pytest.mark.slow
def test_a_process_that_is_refused_ends_with_one_line_and_status_1(prepared):
    output = run(expect=1, launcher="python", corpus=prepared.corpus).stdout
    assert output == "dnazen: error: --corpus and --ngrams belong together: give both, or neither and --fasta\n"


@pytest.mark.parametrize(
    "name, value, reason",
    [
        ("per_device_train_batch_size", 4, "use --max-batch-tokens"),
        ("data_seed", 3, "--seed"),
        ("label_smoothing_factor", 0.1, "not supported"),
        ("save_strategy", "epoch", "no or steps"),
        ("seed", -1, "at least 0"),
        ("save_only_model", True, "cannot be resumed"),
        ("report_to", "paper", "expected one of all, "),
    ],
)
def test_trainer_flag_that_would_be_ignored(prepared, refused, name, value, reason):
    line = refused(**prepared.arguments(), **{name: value})
    assert re.search(f"--{name.replace('_', '-')}[ :]", line) and reason in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA, where they cannot run")
@pytest.mark.parametrize(
    "name, value, reason",
    [
        ("impl", "triton", "needs CUDA tensors"),
        ("attn_implementation", "flash_attention_2", "flash_attention_2 cannot run here: it needs a CUDA device"),
        ("attn_implementation", "fast", "expected one of auto, flash_attention_4"),
    ],
)
def test_what_was_asked_for_by_name_and_cannot_run(prepared, refused, tmp_path, monkeypatch, name, value, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert reason in refused(**prepared.arguments(), output_dir=tmp_path, **{name: value})


def test_budget_below_the_longest_sequence(prepared, refused, tmp_path):
    line = refused(**{**prepared.arguments(), "max_batch_tokens": 50}, output_dir=tmp_path)
    assert "--max-batch-tokens must hold the longest sequence" in line and "got 50" in line


def test_corpus_cut_short(prepared, refused, tmp_path):
    corpus = copy_of(prepared.corpus, tmp_path)
    (shard,) = corpus.glob("train-*.tokens.npy")
    shard.write_bytes(shard.read_bytes()[:-100])
    line = refused(**{**prepared.arguments(), "corpus": corpus}, output_dir=tmp_path / "out")
    assert shard.name in line and not (tmp_path / "out").exists()


def test_corpus_altered(prepared, refused, tmp_path):
    corpus = copy_of(prepared.corpus, tmp_path)
    (shard,) = corpus.glob("train-*.tokens.npy")
    tokens = np.load(shard)
    tokens[3] += 1
    np.save(shard, tokens)
    line = refused(**{**prepared.arguments(), "corpus": corpus}, output_dir=tmp_path / "out")
    assert shard.name in line and "altered" in line


def test_ngrams_of_another_tokenizer(prepared, refused, tmp_path):
    ngrams = copy_of(prepared.ngrams, tmp_path)
    manifest = json.loads((ngrams / "manifest.json").read_text())
    (ngrams / "manifest.json").write_text(json.dumps({**manifest, "tokenizer_checksum": "0" * 64}))
    line = refused(**{**prepared.arguments(), "ngrams": ngrams}, output_dir=tmp_path / "out")
    assert str(ngrams) in line and "tokenizer" in line


@pytest.mark.parametrize(
    "content, message",
    [('{"hidden_sise": 32}', "hidden_sise"), ("{", "JSON"), ('{"hidden_size": 33, "num_attention_heads": 2}', "33")],
    ids=["unknown key", "not JSON", "heads do not divide"],
)
def test_model_configuration(prepared, refused, tmp_path, content, message):
    (tmp_path / "model.json").write_text(content)
    line = refused(**{**prepared.arguments(), "model": tmp_path / "model.json"}, output_dir=tmp_path / "out")
    assert message in line


def test_model_size_that_does_not_exist(prepared, refused, tmp_path):
    line = refused(**{**prepared.arguments(), "model": "huge"}, output_dir=tmp_path / "out")
    assert "huge" in line and "tiny" in line and "xlarge" in line


def test_work_dir_prepared_from_another_genome(prepared, refused, tmp_path):
    arguments = {"work_dir": tmp_path, "model": prepared.model, "max_steps": 1}
    (tmp_path / "part").mkdir()
    for part in ("tokenizer", "corpus", "ngrams"):
        source = prepared.corpus / "tokenizer" if part == "tokenizer" else prepared.corpus.parent / part
        shutil.copytree(source, tmp_path / "part" / part)
    other = tmp_path / "part.fa"
    other.write_text(">x\n" + "ACGTTGCA" * 100 + "\n")
    assert "was prepared from other FASTA files" in refused(fasta=other, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"zero": 2, "bf16": True},
        {"zero": 1, "processes": 2, "gradient_accumulation_steps": 2},
        {"zero": 3, "processes": 2},
    ],
    ids=["plain", "zero2-bf16", "zero1-2", "zero3-2"],
)
def test_gradient_that_is_not_finite_stops_before_the_optimizer(prepared, tmp_path, layout):
    """Step 2 throws the weights out of range, step 3 sees it: its update is not made and nothing is saved after it."""
    arguments = {**prepared.arguments(), **layout, "output_dir": tmp_path, "save_steps": 1, "max_steps": 6}
    schedule = {"learning_rate": 1e38, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}
    output = run(expect=None, **arguments, **schedule).stdout
    assert "step 3: the gradient norm is" in output and "stopped before the optimizer step" in output
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-1"]
    assert not (tmp_path / "final").exists()
    model = DNAZenForMaskedLM.from_pretrained(tmp_path / "checkpoint-1")
    assert all(parameter.abs().max() < 10 for parameter in model.parameters())


@pytest.mark.slow
def test_full_disk_keeps_the_last_checkpoint(prepared, finished):
    """A limit on file sizes stands for the full disk: the optimizer's file does not fit."""
    shutil.rmtree(finished / "checkpoint-4")
    arguments = {**prepared.arguments(), "output_dir": finished, "save_steps": 2}
    largest = max(path.stat().st_size for path in (finished / "checkpoint-2").iterdir())

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1000, largest - 1000))

    line = [sys.executable, SCRIPT, *flags(**arguments)]
    result = subprocess.run(line, env=environment(), preexec_fn=limit, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("dnazen: error:") and str(finished / "checkpoint-4") in line
    assert [path.name for path in list_checkpoints(finished)] == ["checkpoint-2"]
    assert "resuming from checkpoint-2" in run(**arguments).stdout
