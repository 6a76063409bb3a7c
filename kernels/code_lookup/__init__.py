"""The nearest code of a codebook for every row, and the sums that move the codes to the middle of their rows."""

from dnazen_kernels.code_lookup.op import code_lookup, code_sums

__all__ = ["code_lookup", "code_sums"]
