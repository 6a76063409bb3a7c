"""A part of the packaged genome, prepared as a user would."""

from pathlib import Path

from dnazen.data.corpus import Corpus, build_corpus
from dnazen.data.fasta import read_fasta
from dnazen.data.tokenizer import train_tokenizer
from dnazen.ngram.build import build_ngrams
from dnazen.pretraining.prepare import PACKAGED_GENOME


def prepare_part(folder: Path, num_bases: int, max_tokens: int) -> None:
    """`part.fa`, `corpus` and `ngrams` in `folder`: the genome's first bases, with a tokenizer of 256 tokens."""
    name, sequence = next(read_fasta(PACKAGED_GENOME))
    sequence = sequence[:num_bases]
    (folder / "part.fa").write_text(f">{name}\n{sequence}\n")
    tokenizer = train_tokenizer([sequence], vocab_size=256)
    build_corpus([folder / "part.fa"], tokenizer, folder / "corpus", max_tokens=max_tokens, validation_fraction=0.05)
    build_ngrams(Corpus.open(folder / "corpus"), folder / "ngrams", min_pmi=0.7)
