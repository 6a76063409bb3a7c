"""The corpus on disk: how it is made, and how it is read."""

from dnazen.data.corpus.build import build_corpus, summarize
from dnazen.data.corpus.reader import SPLITS, Corpus, TokenSplit
from dnazen.data.corpus.shard import npy_header

__all__ = ["SPLITS", "Corpus", "TokenSplit", "build_corpus", "npy_header", "summarize"]
