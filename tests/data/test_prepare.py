"""Preparing data under a work folder: what is reused, what is refused, and who waits for whom."""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from dnazen.files import InputError
from dnazen.pretraining.prepare import genome_name, prepare_data
from tests.helpers.launch import environment
from tests.helpers.warm import WarmProgram

# prepares with a heart that beats fast, and little patience
PROCESS = """\
import sys
from pathlib import Path
from dnazen.files import InputError
from dnazen.pretraining import prepare
prepare.BEAT_SECONDS, prepare.PATIENCE_SECONDS = 0.1, float(sys.argv[1])
print("ready", flush=True)
try:
    prepare.prepare_data(sys.argv[3:], Path(sys.argv[2]))
except InputError as error:
    sys.exit(f"dnazen: error: {error}")
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


class Process(WarmProgram):
    """One of two processes that prepare data."""

    def __init__(self, rank: int, work_dir: Path, *fasta: str, patience: float = 60) -> None:
        script, self.output = work_dir.parent / "process.py", work_dir.parent / f"output-{rank}.txt"
        script.write_text(PROCESS)
        self.output.write_text("")
        variables = {**environment(), "RANK": str(rank), "WORLD_SIZE": "2"}
        super().__init__([script, patience, work_dir, *fasta], [variables], self.output)

    def wait_until_ready(self) -> None:
        while not self.output.read_text().startswith("ready\n"):
            assert self.poll() is None, self.output.read_text()
            time.sleep(0.01)


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
    waiting = Process(1, tmp_path / "work", fasta)
    waiting.wait_until_ready()
    time.sleep(0.5)
    preparing = Process(0, tmp_path / "work", fasta)
    for process in (preparing, waiting):
        assert process.wait(120) == 0, process.output.read_text()
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["corpus", "ngrams", "tokenizer"]


@pytest.mark.slow
def test_failure_reaches_those_who_wait(fasta, tmp_path):
    waiting = Process(1, tmp_path / "work", fasta)
    (tmp_path / "protein.fa").write_text(">p\nMEEPQSDPSV\n")
    waiting.wait_until_ready()
    time.sleep(0.5)  # it looks ten times by then
    preparing = Process(0, tmp_path / "work", str(tmp_path / "protein.fa"))
    assert preparing.wait(120) == 1 and "Is it protein?" in preparing.output.read_text()
    assert waiting.wait(120) == 1
    error = waiting.output.read_text().splitlines()[-1]
    assert error.startswith("dnazen: error: process 0 could not prepare the data") and "Is it protein?" in error

    # the message of that try does not stop the next
    waiting = Process(1, tmp_path / "work", fasta)
    waiting.wait_until_ready()
    time.sleep(0.5)
    assert Process(0, tmp_path / "work", fasta).wait(120) == 0
    assert waiting.wait(120) == 0


@pytest.mark.slow
def test_killed_process_is_not_waited_for(tmp_path):
    (tmp_path / "genome.fa").write_text(genome(1, words=20_000))
    preparing = Process(0, tmp_path / "work", str(tmp_path / "genome.fa"))
    waiting = Process(1, tmp_path / "work", str(tmp_path / "genome.fa"), patience=5)
    while not (tmp_path / "work" / "tokenizer").exists():
        assert preparing.poll() is None, preparing.output.read_text()
        time.sleep(0.005)
    os.kill(preparing.pids[0], signal.SIGKILL)
    assert preparing.wait(120) == -signal.SIGKILL
    assert waiting.wait(120) == 1
    error = waiting.output.read_text().splitlines()[-1]
    assert f"{tmp_path / 'work' / 'ngrams' / 'manifest.json'}: expected process 0 to make it" in error
    assert "for 5 s; was it killed" in error


def test_name_of_several_genomes():
    assert genome_name(["a/yeast.fa.gz"]) == "yeast"
    assert genome_name(["yeast.fa.gz", "b.fa", "c.fa"]) == "yeast-and-2-more"
