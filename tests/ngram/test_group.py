"""Extraction in several processes that exchange counts (gloo): the same file as from one, and what failures leave."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from dnazen.cli.main import main
from dnazen.data.corpus import build_corpus
from dnazen.data.tokenizer import train_tokenizer
from dnazen.ngram import count, extract
from dnazen.ngram.count import Runs, merge_runs
from dnazen.ngram.group import join_group
from tests.helpers.forked import kill_at, run_command, run_forked
from tests.helpers.launch import environment, free_port


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Repeats of words, so that runs of linked pairs of every length come up."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("ACGT"), rng.integers(8, 40))) for _ in range(60)]
    genome = "".join(words[i] for i in rng.integers(0, 60, 6000))
    (folder / "genome.fa").write_text(f">one\n{genome}\n")
    tokenizer = train_tokenizer([genome[:20_000]], vocab_size=256)
    build_corpus([folder / "genome.fa"], tokenizer, folder / "corpus", max_tokens=100, num_workers=1)
    return folder / "corpus"


def command(corpus, output_dir, *options):
    return ["ngrams", "--corpus", str(corpus), "--output-dir", str(output_dir), *options]


def read_ngrams(path):
    """The bytes of what is written, but for the manifest, which has the time."""
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != "manifest.json"}


@pytest.mark.parametrize("options", [(), ("--long-pieces", "split", "--min-pmi", "1", "--num-workers", "2")])
@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_processes_writes_the_same(corpus, tmp_path, capfd, monkeypatch, size, options):
    monkeypatch.setattr(count, "BLOCK_TOKENS", 5000)
    assert main(command(corpus, tmp_path / "one", *options)) == 0
    printed = capfd.readouterr().out
    assert run_command(size, *command(corpus, tmp_path / "many", *options)) == [0] * size
    assert capfd.readouterr().out.count("most frequent") == printed.count("most frequent") == 1
    assert read_ngrams(tmp_path / "many") == read_ngrams(tmp_path / "one")
    assert len(read_ngrams(tmp_path / "one")["ngrams.tsv"].splitlines()) > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "one"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        "-m torch.distributed.run --nproc_per_node 4 --master_port PORT -m dnazen.cli.main",
        "-m deepspeed.launcher.runner --num_gpus 2 --master_port PORT --no_local_rank --module dnazen.cli.main",
    ],
    ids=["torchrun", "deepspeed"],
)
def test_under_the_launchers_of_training(corpus, tmp_path, launcher):
    words = [sys.executable, *launcher.replace("PORT", str(free_port())).split(), *command(corpus, tmp_path / "many")]
    result = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("written to") == 1
    assert main(command(corpus, tmp_path / "one")) == 0
    assert read_ngrams(tmp_path / "many") == read_ngrams(tmp_path / "one")


@pytest.mark.parametrize("size, empty", [(2, [0]), (3, [1]), (4, [0, 1, 2, 3]), (4, [])])
def test_every_key_goes_to_one_process(tmp_path, size, empty):
    """Each has keys of its own and some in common, few of them or many, in the same place or not."""

    def make(rank):
        rng = np.random.default_rng(rank)
        keys = np.unique(rng.integers(0, 50 + 2000 * rank**3, 0 if rank in empty else 3000))
        return Runs(*map(torch.from_numpy, (keys, rng.integers(0, 9, len(keys)), rng.random(len(keys)) < 0.3)))

    def exchange(rank):
        with join_group() as group:
            np.savez(tmp_path / f"{rank}.npz", *(array.numpy() for array in group.exchange(make(rank))))

    assert run_forked(size, exchange) == [0] * size
    received = [list(np.load(tmp_path / f"{rank}.npz").values()) for rank in range(size)]
    expected = merge_runs([make(rank) for rank in range(size)])
    for arrays, whole in zip(zip(*received, strict=True), expected, strict=True):
        assert np.concatenate(arrays).tolist() == whole.tolist()
    if len(expected.keys) > 5000:
        assert all(len(arrays[0]) > 0.5 * len(expected.keys) / size for arrays in received)


def test_taken_folder_stops_all(corpus, tmp_path, capfd):
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "precious").touch()
    assert run_command(3, *command(corpus, tmp_path / "g")) == [1, 1, 1]
    printed = capfd.readouterr().err
    assert printed.count("g: already exists; choose another directory") == 3
    assert printed.count("process 0 of 3 failed: ") == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["g", "precious"]


@pytest.mark.parametrize("module, function", [(count, "_count_runs"), (extract, "choose_runs")])
def test_error_in_one_stops_all(corpus, tmp_path, capfd, monkeypatch, module, function):
    def fail(rank):
        if rank == 2:
            monkeypatch.setattr(module, function, lambda *arguments: open(tmp_path / "nowhere"))

    assert run_command(4, *command(corpus, tmp_path / "g"), before=fail) == [1] * 4
    printed = capfd.readouterr().err
    assert printed.count("process 2 of 4 failed: [Errno 2] No such file") == 3
    assert not list(tmp_path.iterdir())


def test_processes_with_different_corpora_are_refused(corpus, tmp_path, capfd):
    other = tmp_path / "other"
    build_corpus([corpus.parent / "genome.fa"], train_tokenizer(["ACGT" * 50]), other, max_tokens=50, num_workers=1)
    here = tmp_path / "here"

    def change_place(rank):  # each on a disk of its own
        folder = tmp_path / str(rank)
        folder.mkdir()
        os.symlink(other if rank == 1 else corpus, folder / "corpus")
        os.chdir(folder)

    assert run_command(2, *command("corpus", here), before=change_place) == [1, 1]
    assert "corpus: expected corpus with checksum" in capfd.readouterr().err
    assert not here.exists()


@pytest.mark.parametrize("stage", ["_count_pairs", "_count_runs"])
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process_stops_all(corpus, tmp_path, capfd, monkeypatch, victim, stage):
    def die(rank):
        if rank == victim:
            monkeypatch.setattr(count, stage, lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))

    codes = run_command(3, *command(corpus, tmp_path / "g"), before=die)
    assert codes == [-signal.SIGKILL if rank == victim else 1 for rank in range(3)]
    assert "another of the 3 processes has ended or cannot be reached" in capfd.readouterr().err
    assert not (tmp_path / "g").exists()
    assert len(list(tmp_path.iterdir())) == (victim == 0)  # that of the process that would have written
    assert run_command(3, *command(corpus, tmp_path / "g")) == [0] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["g"]


def test_killed_while_writing(corpus, tmp_path):
    codes = run_command(3, *command(corpus, tmp_path / "g"), before=lambda rank: kill_at("ngrams.tsv"))
    assert codes == [-signal.SIGKILL, 1, 1]
    assert not (tmp_path / "g").exists()
    assert run_command(3, *command(corpus, tmp_path / "g")) == [0] * 3
    assert main(command(corpus, tmp_path / "one")) == 0
    assert read_ngrams(tmp_path / "g") == read_ngrams(tmp_path / "one")
