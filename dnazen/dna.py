"""The letters of DNA: the bases, the codes that stand for several of them, the other strand, and runs of bases."""

import re
from collections.abc import Iterator

from Bio.Data import IUPACData

BASES = "ACGT"
# the bases that each IUPAC code stands for; RNA's U is T
IUPAC_BASES = {
    code: "".join(sorted(bases)) for code, bases in IUPACData.ambiguous_dna_values.items() if code != "X"
} | {"U": "T"}
_COMPLEMENT = str.maketrans(
    IUPACData.ambiguous_dna_complement
    | {code.lower(): other.lower() for code, other in IUPACData.ambiguous_dna_complement.items()}
)
_STRETCH = re.compile(f"[{BASES}]+|[^{BASES}]+".encode())


def reverse_complement(sequence: str) -> str:
    """Complement every base (IUPAC codes included) and reverse their order: the other strand, 5' to 3'."""
    return sequence.translate(_COMPLEMENT)[::-1]


def is_clean(sequence: str) -> bool:
    """Whether there is no letter but upper-case A, C, G and T."""
    return not sequence.strip(BASES)


def split_stretches(sequence: bytes) -> Iterator[tuple[int, int, bool]]:
    """Split upper-case letters into the longest stretches of A, C, G, T alone and of other letters alone.

    Yields `[start, end)` and whether they are bases; `ACNNG` gives (0, 2, True), (2, 4, False), (4, 5, True).
    """
    for match in _STRETCH.finditer(sequence):
        start, end = match.span()
        yield start, end, sequence[start] in BASES.encode()
