"""DNAZEN: DNA language models over BPE tokens and G-grams (frequent runs of 2 to 5 tokens)."""

__version__ = "0.1.0"
