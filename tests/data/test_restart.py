"""A corpus build that is killed and started again: same bytes as one that was not, nothing done twice."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from dnazen.cli.main import main
from dnazen.data.corpus import Corpus, build_corpus
from dnazen.data.tokenizer import load_tokenizer, train_tokenizer
from tests.helpers.forked import kill_at, limit_files, run_command, run_forked
from tests.helpers.sequences import random_bases, write_fasta

LARGEST = {"tokens": 20, "pieces": 5, "journal": 20}  # tokens a sequence with which a kind of file is the largest
RECORDS = {"tokens": 3, "pieces": 3, "journal": 300}  # of each FASTA file


def read_tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tokenizer and, with few long records or many short ones, five files, the fourth a copy of the second."""
    folder = tmp_path_factory.mktemp("inputs")
    for number, length in ((3, 30_000), (300, 80)):
        (folder / str(number)).mkdir()
        for i, seed in enumerate((0, 1, 2, 1, 4)):
            records = {f"f{i}r{k}": random_bases(length, 1000 * seed + k) + "NN" for k in range(number)}
            write_fasta(folder / str(number) / f"{i}.fa", records)
    train_tokenizer([random_bases(20_000)], vocab_size=64).save_pretrained(folder / "tokenizer")
    return folder


def arguments(inputs, output_dir, largest="tokens"):
    files = [str(inputs / str(RECORDS[largest]) / f"{i}.fa") for i in range(5)]
    tokenizer = str(inputs / "tokenizer")
    return ["corpus", "--fasta", *files, "--tokenizer", tokenizer, "--output-dir", str(output_dir), "--dedup",
            "--max-tokens", str(LARGEST[largest]), "--min-length", "20", "--validation-fraction", "0.2",
            "--num-workers", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """By the kind of file that is the largest, what a build that was not stopped wrote, and that file's size.

    A journal's size is a guess: that of a line is what the manifest says of a file, and some 300 bytes.
    """
    found = {}
    for largest in LARGEST:
        folder = tmp_path_factory.mktemp("whole") / largest
        assert main(arguments(inputs, folder, largest)) == 0
        manifest = json.loads((folder / "manifest.json").read_text())
        pieces = [sum(record["pieces"] for record in source["records"]) for source in manifest["sources"]]
        assert pieces[3] == 0 and manifest["totals"]["duplicates"] == pieces[1]
        assert largest == "journal" or min(pieces[:3]) > 1024  # so that each file is done in several steps
        said = len(json.dumps([manifest["sources"], manifest["validation"]])) + 5 * 300
        path = folder / f"train-00000.{largest}.npy"
        found[largest] = read_tree(folder), said if largest == "journal" else path.stat().st_size
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("largest", "share", "files_done"),
    [
        ("tokens", 0.1, 0),
        ("tokens", 0.24, 0),
        ("tokens", 0.4, 1),
        ("pieces", 0.6, 2),
        ("pieces", 0.99, 4),
        ("journal", 0.1, 0),
        ("journal", 0.5, 2),
        ("journal", 0.9, 4),
    ],
)
def test_build_killed_while_it_writes_goes_on(inputs, whole, tmp_path, caplog, largest, share, files_done):
    """It dies with a part of what it was about to write on disk."""
    tree, size = whole[largest]
    command = arguments(inputs, tmp_path / "corpus", largest)
    code = run_command(*command, before=lambda: limit_files(int(share * size), is_fatal=True))
    assert code == -signal.SIGXFSZ
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".corpus.") and not (leftover / "manifest.json").exists()
    cut = leftover / (".state/journal" if largest == "journal" else f"train-00000.{largest}.npy")
    assert cut.stat().st_size == int(share * size)
    assert main(command) == 0
    assert (f"going on behind {files_done} of 5 files" in caplog.text) == (files_done > 0), caplog.text
    assert read_tree(tmp_path / "corpus") == tree
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.slow
@pytest.mark.parametrize("at", ["manifest.json.tmp", "os.rename"])
def test_build_killed_when_all_files_are_done_goes_on(inputs, whole, tmp_path, caplog, at):
    command = arguments(inputs, tmp_path / "corpus")
    assert run_command(*command, before=lambda: kill_at(at)) == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert main(command) == 0
    assert ("going on behind 5 of 5 files" in caplog.text) == (at != "os.rename"), caplog.text
    assert read_tree(tmp_path / "corpus") == whole["tokens"][0]
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.slow
def test_build_killed_twice_and_then_asked_for_something_else(inputs, whole, tmp_path, caplog):
    output_dir, (tree, size) = tmp_path / "corpus", whole["journal"]
    command = arguments(inputs, output_dir, "journal")
    for share in (0.3, 0.5):
        code = run_command(*command, before=lambda: limit_files(int(share * size), is_fatal=True))
        assert code == -signal.SIGXFSZ
    (leftover,) = tmp_path.iterdir()
    assert len((leftover / ".state" / "journal").read_bytes().splitlines()) == 3  # two lines, and a part of a third
    other = [*command]
    other[other.index("0.2")] = "0.3"
    assert main(other) == 0
    assert f"removing {leftover}: the process that wrote it was killed" in caplog.text
    assert read_tree(output_dir) != tree
    assert main(arguments(inputs, tmp_path / "again", "journal")) == 0
    assert read_tree(tmp_path / "again") == tree


@pytest.mark.slow
def test_killed_build_of_filled_pieces_goes_on(inputs, tmp_path, caplog):
    """And not with pieces of another length."""
    filled = [*arguments(inputs, tmp_path / "corpus"), "--piece-length", "auto", "--min-length", "10"]
    assert main([*filled, "--output-dir", str(tmp_path / "whole")]) == 0
    tree = read_tree(tmp_path / "whole")
    size = int(0.5 * (tmp_path / "whole" / "train-00000.tokens.npy").stat().st_size)
    assert run_command(*filled, before=lambda: limit_files(size, is_fatal=True)) == -signal.SIGXFSZ
    (leftover,) = tmp_path.glob(".corpus.*")
    shutil.copytree(leftover, tmp_path / leftover.name.replace(".corpus.", ".other."))
    assert main(filled) == 0
    assert "going on behind " in caplog.text
    assert read_tree(tmp_path / "corpus") == tree
    caplog.clear()
    assert main([*filled, "--piece-length", "90", "--output-dir", str(tmp_path / "other")]) == 0
    assert "going on behind " not in caplog.text
    assert read_tree(tmp_path / "other") != tree


@pytest.mark.slow
def test_changed_input_is_not_gone_on_with(inputs, whole, tmp_path):
    output_dir = tmp_path / "corpus"
    command = arguments(inputs, output_dir, "journal")
    changed = tmp_path / "changed.fa"
    changed.write_bytes((inputs / "300" / "0.fa").read_bytes())
    command[2] = str(changed)
    size = int(0.7 * whole["journal"][1])
    assert run_command(*command, before=lambda: limit_files(size, is_fatal=True)) == -signal.SIGXFSZ
    write_fasta(changed, {"other": random_bases(5_000, 99)})
    assert main(command) == 0
    names = [record["name"] for record in Corpus.open(output_dir).manifest["sources"][0]["records"]]
    assert names == ["other"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("at", ["train-00010", "train-00025", "validation-00004"])
def test_shards_closed_before_and_after_the_stop(inputs, tmp_path, kind, at):
    """Killed, or stopped by Ctrl-C, where a shard begins."""
    tokenizer = load_tokenizer(inputs / "tokenizer")
    files = [inputs / "3" / f"{i}.fa" for i in range(5)]
    options = dict(max_tokens=20, validation_fraction=0.2, shard_tokens=5000, num_workers=1)
    build_corpus(files, tokenizer, tmp_path / "whole", **options)
    assert len(list(tmp_path.glob("whole/train-*.tokens.npy"))) > 25

    def build():
        kill_at(f"{at}.tokens.npy", kind, tears=False)
        try:
            build_corpus(files, tokenizer, tmp_path / "corpus", **options)
        except KeyboardInterrupt:
            return 130

    assert run_forked(build) == (130 if kind == signal.SIGINT else -signal.SIGKILL)
    assert len(list(tmp_path.glob(".corpus.*.tmp"))) == 1
    build_corpus(files, tokenizer, tmp_path / "corpus", **options)
    assert read_tree(tmp_path / "corpus") == read_tree(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "whole"]


@pytest.mark.slow
def test_killed_worker_is_an_error_and_the_build_goes_on(inputs, tmp_path, caplog):
    """The first file is small, so that it is done when a worker is killed, and the last large, so that it is not."""
    lengths = (60_000, 600_000, 1_500_000)
    files = [write_fasta(tmp_path / f"{i}.fa", {"r": random_bases(length, i)}) for i, length in enumerate(lengths)]
    command = ["corpus", "--fasta", *map(str, files), "--tokenizer", str(inputs / "tokenizer"), "--max-tokens", "100",
               "--num-workers", "2", "--output-dir"]  # fmt: skip
    program = [sys.executable, "-m", "dnazen.cli.main", *command, str(tmp_path / "corpus")]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    journals = []
    while not any(journal.stat().st_size for journal in journals):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
        journals = list(tmp_path.glob(".corpus.*.tmp/.state/journal"))
    psutil.Process(process.pid).children()[0].kill()
    printed = process.communicate()[1]
    assert process.returncode == 1
    assert "error: a worker was killed, perhaps for want of memory: use a lower --num-workers" in printed
    assert "Traceback" not in printed
    (kept,) = tmp_path.glob(".*")
    assert f"keeping {kept}" in printed
    assert main([*command, str(tmp_path / "corpus")]) == 0
    assert "going on behind " in caplog.text
    assert main([*command, str(tmp_path / "whole")]) == 0
    assert read_tree(tmp_path / "corpus") == read_tree(tmp_path / "whole")


@pytest.mark.slow
def test_bad_file_costs_nothing_but_itself(inputs, tmp_path, whole, capsys, caplog):
    command = arguments(inputs, tmp_path / "corpus")
    last, good = tmp_path / "4.fa", (inputs / "3" / "4.fa").read_bytes()
    last.write_bytes(good + b">bad\n!")
    command[6] = str(last)
    assert main(command) == 1
    assert "4.fa: cannot be read as FASTA: record 'bad' has '!'" in capsys.readouterr().err
    last.write_bytes(good)
    assert main(command) == 0
    assert "behind 4 of 5 files" in caplog.text
    assert read_tree(tmp_path / "corpus") == whole["tokens"][0]


@pytest.mark.slow
def test_full_disk_costs_nothing_that_is_finished(inputs, tmp_path, whole, capfd, caplog):
    tree, size = whole["journal"]
    command = arguments(inputs, tmp_path / "corpus", "journal")
    assert run_command(*command, before=lambda: limit_files(size // 2, is_fatal=False)) == 1
    assert "File too large" in capfd.readouterr().err
    assert main(command) == 0
    assert "behind 2 of 5 files" in caplog.text
    assert read_tree(tmp_path / "corpus") == tree


@pytest.mark.slow
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
