"""From FASTA files to what pretraining reads: tokenizer, corpus and G-grams, each made once."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dnazen.data
from dnazen.data.corpus import Corpus, build_corpus, summarize
from dnazen.data.fasta import describe_sources
from dnazen.data.tokenizer import SOURCES_FILE, build_tokenizer, load_tokenizer
from dnazen.files import InputError, read_json
from dnazen.ngram import build

PACKAGED_GENOME = Path(dnazen.data.__file__).parent / "genomes" / "ecoli536_NC_008253.fna.gz"
_VALIDATION_FRACTION = 0.05  # enough of a small genome for intervals that mean something
BEAT_SECONDS, PATIENCE_SECONDS = 5.0, 600.0
_FAILED = "failed: "


def genome_name(fasta: list[str]) -> str:
    """A folder name for these FASTA files: the first one's name without its endings."""
    name = Path(fasta[0]).name.split(".")[0]
    return name if len(fasta) == 1 else f"{name}-and-{len(fasta) - 1}-more"


def prepare_data(fasta: list[str], work_dir: Path) -> tuple[Path, Path]:
    """Return the corpus' and the G-grams' folders under `work_dir`, making what is not there yet.

    Process 0 of the run does the work. The others, on other machines too, wait for its last file: no collective
    operation waits with them, so no time-out of the process group applies.

    Raises:
        InputError: a FASTA file cannot be used; `work_dir` was prepared from other files; in the processes that wait,
            process 0 failed or has not been heard of for `PATIENCE_SECONDS`.
    """
    corpus_dir, ngrams_dir, heartbeat = work_dir / "corpus", work_dir / "ngrams", work_dir / ".preparing"
    if int(os.environ.get("RANK", "0")) != 0:
        _wait_for(ngrams_dir / "manifest.json", heartbeat)
        return corpus_dir, ngrams_dir
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    with contextlib.nullcontext() if alone else _beating(heartbeat):
        corpus = _prepare_corpus(fasta, work_dir / "tokenizer", corpus_dir)
        if not ngrams_dir.exists():
            print("Extracting G-grams", flush=True)
            print(build.summarize(build.build_ngrams(corpus, ngrams_dir)), flush=True)
    return corpus_dir, ngrams_dir


def _prepare_corpus(fasta: list[str], tokenizer_dir: Path, corpus_dir: Path) -> Corpus:
    sources = describe_sources(fasta)

    def check(folder: Path, recorded: list[dict[str, Any]]) -> None:
        if [source["sha256"] for source in recorded] != [source["sha256"] for source in sources]:
            raise InputError(
                f"{folder} was prepared from other FASTA files; give another --work-dir or remove {folder.parent}"
            )

    if not corpus_dir.exists():
        started = time.perf_counter()
        if not tokenizer_dir.exists():
            print(f"Training a tokenizer on {', '.join(fasta)}", flush=True)
            tokenizer = build_tokenizer(fasta, tokenizer_dir)
            print(f"  {len(tokenizer)} tokens, {time.perf_counter() - started:.1f} s", flush=True)
        check(tokenizer_dir, read_json(tokenizer_dir / SOURCES_FILE, "the record of a tokenizer's training")["sources"])
        started = time.perf_counter()
        print("Cleaning and tokenizing", flush=True)
        manifest = build_corpus(
            fasta, load_tokenizer(tokenizer_dir), corpus_dir, validation_fraction=_VALIDATION_FRACTION
        )
        print(summarize(manifest), flush=True)
        print(f"  {time.perf_counter() - started:.1f} s", flush=True)
    corpus = Corpus.open(corpus_dir)
    check(corpus_dir, corpus.manifest["sources"])
    return corpus


@contextlib.contextmanager
def _beating(heartbeat: Path) -> Iterator[None]:
    """Rewrite a file every few seconds while the block runs; leave the message in it if the block fails.

    A lock on the file would not do: on some shared file systems other machines do not see it, and one that is not held
    may be of a process that has not begun.
    """
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_SECONDS):
            heartbeat.write_text(str(time.time()))

    heartbeat.parent.mkdir(parents=True, exist_ok=True)
    heartbeat.write_text(str(time.time()))
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    failure = None
    try:
        yield
    except BaseException as error:
        failure = error
        raise
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(OSError):  # a full disk must not hide its cause
            heartbeat.unlink() if failure is None else heartbeat.write_text(f"{_FAILED}{failure}")


def _wait_for(file: Path, heartbeat: Path) -> None:
    """Wait until `file` exists, for as long as `heartbeat` keeps changing."""
    last, changed_at = _read(heartbeat), time.monotonic()  # perhaps of an earlier try
    while not file.is_file():
        time.sleep(1.0)
        beat = _read(heartbeat)
        if beat != last:
            last, changed_at = beat, time.monotonic()
            if beat.startswith(_FAILED):
                raise InputError(f"process 0 could not prepare the data: {beat.removeprefix(_FAILED)}")
        elif time.monotonic() - changed_at > PATIENCE_SECONDS:
            raise InputError(
                f"{file}: expected process 0 to make it, found no sign of that in {heartbeat} for "
                f"{PATIENCE_SECONDS:.0f} s; was it killed, or do the machines not share this folder?"
            )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
