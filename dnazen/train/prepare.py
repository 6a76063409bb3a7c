"""From FASTA files to what pretraining reads: tokenizer, corpus and G-grams, each made once."""

import os
import time
from pathlib import Path

import dnazen.data
from dnazen.data import shards
from dnazen.data.fasta import read_fasta
from dnazen.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from dnazen.files import InputError, atomic_directory, sha256_file
from dnazen.ngram import extract

PACKAGED_GENOME = Path(dnazen.data.__file__).parent / "genomes" / "ecoli536_NC_008253.fna.gz"


def genome_name(fasta: list[str]) -> str:
    """A folder name for these FASTA files: the first one's name without its endings."""
    name = Path(fasta[0]).name.split(".")[0]
    return name if len(fasta) == 1 else f"{name}-and-{len(fasta) - 1}-more"


def prepare_data(fasta: list[str], work_dir: Path) -> tuple[Path, Path]:
    """Return the corpus' and the G-grams' folders under `work_dir`, making what is not there yet.

    Process 0 of the run does the work and the others wait for its last file: no collective operation waits with them,
    so no time-out of the process group applies.

    Raises:
        InputError: a FASTA file cannot be used, or `work_dir` was prepared from other files.
    """
    corpus_dir, ngrams_dir = work_dir / "corpus", work_dir / "ngrams"
    if int(os.environ.get("RANK", "0")) != 0:
        while not (ngrams_dir / "manifest.json").is_file():
            time.sleep(1.0)
        return corpus_dir, ngrams_dir

    if not (work_dir / "tokenizer").exists():
        print(f"Training a tokenizer on {', '.join(fasta)}", flush=True)
        started = time.perf_counter()
        tokenizer = train_tokenizer(record.sequence for path in fasta for record in read_fasta(path))
        with atomic_directory(work_dir / "tokenizer") as folder:
            save_tokenizer(tokenizer, folder)
        print(f"  {len(tokenizer)} tokens, {time.perf_counter() - started:.1f} s", flush=True)
    if not corpus_dir.exists():
        started = time.perf_counter()
        print("Cleaning and tokenizing", flush=True)
        print(shards.summarize(shards.build_corpus(fasta, load_tokenizer(work_dir / "tokenizer"), corpus_dir)), flush=True)
        print(f"  {time.perf_counter() - started:.1f} s", flush=True)
    corpus = shards.Corpus.open(corpus_dir)
    found = [source["sha256"] for source in corpus.manifest["sources"]]
    if found != [sha256_file(path) for path in fasta]:
        raise InputError(f"{work_dir} was prepared from other FASTA files; give another --work_dir or remove it")
    if not ngrams_dir.exists():
        print("Extracting G-grams", flush=True)
        print(extract.summarize(extract.build_ngrams(corpus, ngrams_dir)), flush=True)
    return corpus_dir, ngrams_dir
