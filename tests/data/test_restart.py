"""A corpus build that is killed and started again: same bytes as one that was not, nothing done twice."""

import errno
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from dnazen.cli.main import main
from dnazen.data.corpus import Corpus, build_corpus
from dnazen.data.corpus import build as shards
from dnazen.data.tokenizer import load_tokenizer, train_tokenizer

# Dies by SIGKILL the n-th time that something is written to a file whose name has a given suffix, half of it done.
KILLER = """\
import os, signal, sys
from dnazen.data.corpus import build as shards
suffix, count = sys.argv.pop(1), int(sys.argv.pop(1))
write_all = shards._write_all
def write(file, data):
    global count
    if str(file.name).endswith(suffix):
        count -= 1
        if count == 0:
            write_all(file, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
    write_all(file, data)
shards._write_all = write
shards._CHUNK_PIECES = 4
from dnazen.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def random_bases(n, seed=0):
    return "".join(random.Random(seed).choices("ACGT", k=n))


def read_tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Five files, the fourth a copy of the second under other record names, and a tokenizer."""
    folder = tmp_path_factory.mktemp("inputs")
    for i, seed in enumerate((0, 1, 2, 1, 4)):
        text = "".join(f">f{i}r{k}\n{random_bases(9_000, 10 * seed + k)}NN\n" for k in range(3))
        (folder / f"{i}.fa").write_text(text)
    train_tokenizer([random_bases(20_000)], vocab_size=64).save_pretrained(folder / "tokenizer")
    return folder


def arguments(inputs, output_dir):
    files = [str(inputs / f"{i}.fa") for i in range(5)]
    tokenizer = str(inputs / "tokenizer")
    return ["corpus", "--fasta", *files, "--tokenizer", tokenizer, "--output-dir", str(output_dir), "--dedup",
            "--max-tokens", "100", "--validation-fraction", "0.2", "--num-workers", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "corpus"
    assert main(arguments(inputs, folder)) == 0
    assert json.loads((folder / "manifest.json").read_text())["totals"]["duplicates"] == 3 * 23
    return read_tree(folder)


@pytest.mark.parametrize(
    ("suffix", "count", "files_done"),
    [
        ("train-00000.tokens.npy", 2, 0),
        ("train-00000.tokens.npy", 20, 1),
        ("train-00000.offsets.npy", 45, 2),
        ("train-00000.pieces.npy", 40, 2),
        ("journal", 4, 3),
        ("journal", 5, 4),
        ("validation-00000.pieces.npy", 40, None),
    ],
)
def test_killed_build_goes_on(inputs, whole, tmp_path, capsys, suffix, count, files_done):
    output_dir = tmp_path / "corpus"
    command = [sys.executable, "-c", KILLER, suffix, str(count), *arguments(inputs, output_dir)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".corpus.") and not (leftover / "manifest.json").exists()
    assert main(arguments(inputs, output_dir)) == 0
    printed = capsys.readouterr().out
    if files_done is not None:
        assert (f"behind {files_done} of 5 files" in printed) == (files_done > 0), printed
    assert read_tree(output_dir) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_build_killed_twice_and_then_asked_for_something_else(inputs, whole, tmp_path, caplog):
    output_dir = tmp_path / "corpus"
    for suffix, count in (("journal", 2), ("journal", 2)):
        command = [sys.executable, "-c", KILLER, suffix, str(count), *arguments(inputs, output_dir)]
        assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert len((leftover / ".state" / "journal").read_bytes().splitlines()) == 3  # two lines, and half of a third
    other = arguments(inputs, output_dir)
    other[other.index("0.2")] = "0.3"
    assert main(other) == 0
    assert f"removing {leftover}: the process that wrote it was killed" in caplog.text
    assert read_tree(output_dir) != whole
    assert main(arguments(inputs, tmp_path / "again")) == 0
    assert read_tree(tmp_path / "again") == whole


def test_changed_input_is_not_gone_on_with(inputs, tmp_path):
    output_dir = tmp_path / "corpus"
    command = arguments(inputs, output_dir)
    changed = tmp_path / "changed.fa"
    changed.write_bytes((inputs / "0.fa").read_bytes())
    command[2] = str(changed)
    killed = subprocess.run([sys.executable, "-c", KILLER, "journal", "4", *command], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    changed.write_text(f">other\n{random_bases(5_000, 99)}\n")
    assert main(command) == 0
    names = [record["name"] for record in Corpus.open(output_dir).manifest["sources"][0]["records"]]
    assert names == ["other"]


@pytest.mark.parametrize("batches", [25, 60, 85])
def test_shards_closed_before_and_after_the_stop(inputs, tmp_path, monkeypatch, batches):
    tokenizer = load_tokenizer(inputs / "tokenizer")
    files = [inputs / f"{i}.fa" for i in range(5)]
    options = dict(max_tokens=100, validation_fraction=0.2, shard_tokens=2500, num_workers=1)
    build_corpus(files, tokenizer, tmp_path / "whole", **options)
    assert len(list(tmp_path.glob("whole/train-*.tokens.npy"))) > 10

    def interrupt(self, *arguments):
        nonlocal batches
        take(self, *arguments)
        batches -= 1
        if not batches:
            raise KeyboardInterrupt

    take = shards._Builder._take
    monkeypatch.setattr(shards, "_CHUNK_PIECES", 4)
    monkeypatch.setattr(shards._Builder, "_take", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(files, tokenizer, tmp_path / "corpus", **options)
    monkeypatch.undo()
    assert len(list(tmp_path.glob(".corpus.*.tmp"))) == 1
    build_corpus(files, tokenizer, tmp_path / "corpus", **options)
    assert read_tree(tmp_path / "corpus") == read_tree(tmp_path / "whole")


def test_killed_worker_is_an_error_and_the_build_goes_on(inputs, tmp_path, whole, monkeypatch, capsys, caplog):
    def die(self, batch):
        return os.kill(os.getpid(), signal.SIGKILL) if batch.source == 3 else tokenize(self, batch)

    tokenize = shards._PieceTokenizer.__call__
    command = [*arguments(inputs, tmp_path / "corpus")[:-1], "2"]
    monkeypatch.setattr(shards, "_BYTES_PER_WORKER", 1)
    monkeypatch.setattr(shards, "_CHUNK_PIECES", 4)
    monkeypatch.setattr(shards._PieceTokenizer, "__call__", die)
    assert main(command) == 1
    printed = capsys.readouterr().err
    assert "error: a worker was killed, perhaps for want of memory: use a lower --num-workers" in printed
    assert "Traceback" not in printed
    (kept,) = tmp_path.iterdir()
    assert f"keeping {kept}" in caplog.text
    monkeypatch.setattr(shards._PieceTokenizer, "__call__", tokenize)
    assert main(command) == 0
    assert "going on     behind " in capsys.readouterr().out
    assert read_tree(tmp_path / "corpus") == whole


def test_bad_file_costs_nothing_but_itself(inputs, tmp_path, whole, capsys):
    command = arguments(inputs, tmp_path / "corpus")
    last = tmp_path / "4.fa"
    last.write_bytes((inputs / "4.fa").read_bytes() + b">bad\n!")
    command[6] = str(last)
    assert main(command) == 1
    assert "4.fa: cannot be read as FASTA: record 'bad' has '!'" in capsys.readouterr().err
    last.write_bytes((inputs / "4.fa").read_bytes())
    assert main(command) == 0
    assert "behind 4 of 5 files" in capsys.readouterr().out
    assert read_tree(tmp_path / "corpus") == whole


def test_full_disk_costs_nothing_that_is_finished(inputs, tmp_path, whole, capsys, monkeypatch):
    def write(file, data):
        if str(file.name).endswith("journal") and files_left.pop() == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(file, data)

    write_all, files_left = shards._write_all, [0, 1, 2]
    monkeypatch.setattr(shards, "_write_all", write)
    assert main(arguments(inputs, tmp_path / "corpus")) == 1
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(arguments(inputs, tmp_path / "corpus")) == 0
    assert "behind 2 of 5 files" in capsys.readouterr().out
    assert read_tree(tmp_path / "corpus") == whole


def test_workers_end_with_a_killed_build(inputs, tmp_path, caplog):
    (tmp_path / "genome.fa").write_text(f">chr1\n{random_bases(8_000_000)}\n")
    command = [sys.executable, "-m", "dnazen.cli.main", "corpus", "--fasta", tmp_path / "genome.fa", "--tokenizer",
               inputs / "tokenizer", "--output-dir", tmp_path / "corpus", "--num-workers", "2"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    workers, deadline = [], time.monotonic() + 60
    while len(workers) < 2 and process.poll() is None and time.monotonic() < deadline:
        workers = psutil.Process(process.pid).children()
        time.sleep(0.05)
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(workers, timeout=30)[1]
    assert not (tmp_path / "corpus").exists()
    running = tmp_path / f".corpus.{os.getppid()}@{socket.gethostname()}.tmp"
    elsewhere = tmp_path / f".corpus.{process.pid}@another-machine.tmp"
    running.mkdir(), elsewhere.mkdir()
    # What is left over does not stop the next run, which takes it up, and nobody else's.
    assert main([str(word) for word in command[3:]]) == 0
    Corpus.open(tmp_path / "corpus")
    assert sorted(tmp_path.glob(".*")) == sorted([running, elsewhere])
    assert f"{elsewhere}: of a process on another-machine, which may be running: not touched" in caplog.text
