"""DNAZEN: DNA language models over BPE tokens and G-grams (frequent runs of 2 to 5 tokens)."""

from dnazen.auto_classes import register_on_import

__version__ = "0.1.0"

register_on_import()
