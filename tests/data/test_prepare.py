"""Preparing data under a work folder: what is reused, what is refused, and who waits for whom."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from dnazen.files import InputError
from dnazen.pretraining.prepare import genome_name, prepare_data

# prepares with a heart that beats fast, and little patience
PROCESS = """\
import sys
from pathlib import Path
from dnazen.files import InputError
from dnazen.pretraining import prepare
prepare.BEAT_SECONDS, prepare.PATIENCE_SECONDS = 0.1, {patience}
print("ready", flush=True)
try:
    prepare.prepare_data(sys.argv[2:], Path(sys.argv[1]))
except InputError as error:
    sys.exit(f"dnazen: error: {{error}}")
"""


def genome(seed: int, words: int = 3000) -> str:
    """FASTA of 40 words of 100 bases between random bases, so that there are G-grams."""
    generator = random.Random(seed)
    lexicon = ["".join(generator.choices("ACGT", k=100)) for _ in range(40)]
    parts = (generator.choice(lexicon) + "".join(generator.choices("ACGT", k=20)) for _ in range(words))
    return f">genome {seed}\n{''.join(parts)}\n"


@pytest.fixture
def fasta(tmp_path):
    (tmp_path / "genome.fa").write_text(genome(1))
    return str(tmp_path / "genome.fa")


def start(rank: int, work_dir, *fasta: str, patience: float = 60) -> subprocess.Popen:
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}
    line = [sys.executable, "-c", PROCESS.format(patience=patience), str(work_dir), *fasta]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_tokenizer_from_other_files_is_refused(fasta, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # which is where bars are shown
    work_dir = tmp_path / "work"
    prepare_data([fasta], work_dir)
    printed = capsys.readouterr()
    for what in ("reading", "tokenizing", "counting pairs", "counting candidates"):
        assert f"{what}: " in printed.err
    assert "bases/s" in printed.err and "tokens/s" in printed.err
    assert sorted(path.name for path in work_dir.iterdir()) == ["corpus", "ngrams", "tokenizer"]

    (tmp_path / "other.fa").write_text(genome(2))
    with pytest.raises(InputError, match=f"{work_dir / 'corpus'} was prepared from other FASTA files"):
        prepare_data([str(tmp_path / "other.fa")], work_dir)
    shutil.rmtree(work_dir / "corpus")
    with pytest.raises(InputError, match=f"{work_dir / 'tokenizer'} was prepared from other FASTA files"):
        prepare_data([str(tmp_path / "other.fa")], work_dir)
    assert not (work_dir / "corpus").exists()
    capsys.readouterr()
    prepare_data([fasta], work_dir)  # its own files
    assert "Training a tokenizer" not in capsys.readouterr().out
    prepare_data([fasta], work_dir)
    assert capsys.readouterr().out == ""


def test_tokenizer_of_unknown_origin_is_refused(fasta, tmp_path):
    prepare_data([fasta], tmp_path / "work")
    shutil.rmtree(tmp_path / "work" / "corpus")
    (tmp_path / "work" / "tokenizer" / "sources.json").unlink()
    with pytest.raises(InputError, match="sources.json: no such file; expected the record of a tokenizer's training"):
        prepare_data([fasta], tmp_path / "work")


@pytest.mark.slow
def test_other_processes_wait_for_the_first(fasta, tmp_path):
    waiting = start(1, tmp_path / "work", fasta)
    time.sleep(1)
    preparing = start(0, tmp_path / "work", fasta)
    for process in (preparing, waiting):
        output = process.communicate(timeout=120)
        assert process.returncode == 0, output
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["corpus", "ngrams", "tokenizer"]


@pytest.mark.slow
def test_failure_reaches_those_who_wait(fasta, tmp_path):
    waiting = start(1, tmp_path / "work", fasta)
    (tmp_path / "protein.fa").write_text(">p\nMEEPQSDPSV\n")
    assert waiting.stdout.readline() == "ready\n"  # the other needs seconds to import, so this one waits by then
    preparing = start(0, tmp_path / "work", str(tmp_path / "protein.fa"))
    assert "Is it protein?" in preparing.communicate(timeout=120)[1]
    error = waiting.communicate(timeout=120)[1].splitlines()[-1]
    assert error.startswith("dnazen: error: process 0 could not prepare the data") and "Is it protein?" in error

    # the message of that try does not stop the next
    waiting = start(1, tmp_path / "work", fasta)
    assert waiting.stdout.readline() == "ready\n"
    assert start(0, tmp_path / "work", fasta).wait(120) == 0
    assert waiting.wait(120) == 0


@pytest.mark.slow
def test_killed_process_is_not_waited_for(tmp_path):
    (tmp_path / "genome.fa").write_text(genome(1, words=100_000))
    preparing = start(0, tmp_path / "work", str(tmp_path / "genome.fa"))
    waiting = start(1, tmp_path / "work", str(tmp_path / "genome.fa"), patience=5)
    while not (tmp_path / "work" / "tokenizer").exists():
        assert preparing.poll() is None, preparing.communicate()
        time.sleep(0.01)
    preparing.send_signal(signal.SIGKILL)
    preparing.communicate()
    error = waiting.communicate(timeout=120)[1].splitlines()[-1]
    assert f"{tmp_path / 'work' / 'ngrams' / 'manifest.json'}: expected process 0 to make it" in error
    assert "for 5 s; was it killed" in error
    assert waiting.returncode == 1


def test_name_of_several_genomes():
    assert genome_name(["a/yeast.fa.gz"]) == "yeast"
    assert genome_name(["yeast.fa.gz", "b.fa", "c.fa"]) == "yeast-and-2-more"
