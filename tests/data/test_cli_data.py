"""`dnazen tokenizer` and `dnazen corpus` as a user runs them: results, errors, kills, full disks."""

import subprocess
import sys

import pytest

from dnazen.cli.main import main
from dnazen.data.corpus import Corpus
from dnazen.data.tokenizer import load_tokenizer, train_tokenizer
from tests.helpers.sequences import random_bases

FULL_DISK = """\
import resource, signal, sys
from dnazen.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A genome of 1.2 million bases, and a small tokenizer."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "genome.fa").write_text(f">chr1\n{random_bases(1_000_000)}\n>chr2\n{random_bases(200_000, 1)}\n")
    train_tokenizer([random_bases(20_000)], vocab_size=64).save_pretrained(folder / "tokenizer")
    return folder


def corpus_arguments(inputs, output_dir):
    fasta, tokenizer = str(inputs / "genome.fa"), str(inputs / "tokenizer")
    return ["corpus", "--fasta", fasta, "--tokenizer", tokenizer, "--output-dir", str(output_dir)]


def read_tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_from_fasta_to_corpus(inputs, tmp_path, capsys):
    tokenizer_dir, output_dir = tmp_path / "t", tmp_path / "c"
    fasta = str(inputs / "genome.fa")
    assert main(["tokenizer", "--fasta", fasta, "--output-dir", str(tokenizer_dir), "--vocab-size", "200"]) == 0
    assert "200 of 200 asked for" in capsys.readouterr().out
    assert len(load_tokenizer(tokenizer_dir)) == 200
    arguments = ["corpus", "--fasta", fasta, "--tokenizer", str(tokenizer_dir), "--output-dir", str(output_dir)]
    options = ["--max-tokens", "100", "--min-length", "50", "--reverse-complement", "--validation-fraction", "0.05"]
    assert main(arguments + options) == 0
    printed = capsys.readouterr()
    assert "2 records, 1,200,000 bases" in printed.out and "both strands" in printed.out and " s\n" in printed.out
    assert printed.err == ""  # no bars but on a terminal
    corpus = Corpus.open(output_dir)
    assert corpus.train.lengths.max() <= 100 and len(corpus.validation) > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "t"]


@pytest.mark.slow
def test_same_bytes_whatever_the_workers(inputs, tmp_path):
    trees = []
    for workers in ("1", "2"):
        command = [sys.executable, "-m", "dnazen.cli.main", *corpus_arguments(inputs, tmp_path / workers)]
        subprocess.run([*command, "--num-workers", workers, "--reverse-complement"], check=True, capture_output=True)
        trees.append(read_tree(tmp_path / workers))
    assert trees[0] == trees[1] and len(trees[0]) >= 9


def test_errors_are_one_line_and_status_1(inputs, tmp_path, capsys):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mine.txt").write_text("mine")
    fasta, absent, new = str(inputs / "genome.fa"), str(tmp_path / "absent"), str(tmp_path / "new")
    for arguments, message in (
        (["tokenizer", "--fasta", absent, "--output-dir", new], "absent: no such file"),
        (["tokenizer", "--fasta", fasta, "--output-dir", new, "--vocab-size", "5000"], "--vocab-size: expected 9"),
        (["tokenizer", "--fasta", fasta, "--output-dir", str(kept)], "already exists"),
        (["corpus", "--fasta", fasta, "--tokenizer", absent, "--output-dir", new], "expected a tokenizer"),
        (corpus_arguments(inputs, kept), "already exists"),
        (corpus_arguments(inputs, new) + ["--validation-fraction", "2"], "--validation-fraction: expected"),
        (corpus_arguments(inputs, new) + ["--num-workers", "0"], "--num-workers: expected"),
    ):
        assert main(arguments) == 1
        printed = capsys.readouterr()
        assert printed.err.splitlines()[-1].startswith("dnazen: error: ") and message in printed.err.splitlines()[-1]
        assert "Traceback" not in printed.err
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "mine.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["tokenizer", "corpus"])
def test_full_disk_leaves_nothing(inputs, tmp_path, command):
    arguments = corpus_arguments(inputs, tmp_path / "new")
    if command == "tokenizer":
        arguments = ["tokenizer", "--fasta", str(inputs / "genome.fa"), "--output-dir", str(tmp_path / "new")]
        arguments += ["--vocab-size", "4096"]  # a smaller file would fit
    result = subprocess.run([sys.executable, "-c", FULL_DISK, *arguments], capture_output=True, text=True)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("dnazen: error: ") and "File too large" in last and str(tmp_path / "new") in last
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr
    assert list(tmp_path.iterdir()) == []
