"""The corpus on disk: how it is made, and how it is read."""

from dnazen.data.corpus.build import SPLITS, Corpus, TokenSplit, build_corpus, npy_header, summarize

__all__ = ["SPLITS", "Corpus", "TokenSplit", "build_corpus", "npy_header", "summarize"]
