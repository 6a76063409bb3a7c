"""The letters of DNA: strands, codes and stretches, by hand and by their properties."""

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from dnazen.dna import BASES, IUPAC_BASES, is_clean, reverse_complement, split_stretches


@given(st.text(alphabet="ACGTRYSWKMBDHVNacgtryswkmbdhvnX-.", max_size=60))
def test_reverse_complement_is_an_involution(sequence):
    assert reverse_complement(reverse_complement(sequence)) == sequence


def test_reverse_complement_by_hand():
    assert reverse_complement("AACGTN") == "NACGTT" and reverse_complement("aacgtn-.X") == "X.-nacgtt"
    # IUPAC pairs: R=AG/Y=CT, K=GT/M=AC, B=CGT/V=ACG, D=AGT/H=ACT; S=CG and W=AT are their own.
    assert reverse_complement("RYKMBVDHSW") == "WSDHBVKMRY"


def test_codes_by_hand():
    """NC-IUB 1984."""
    assert IUPAC_BASES == {
        "A": "A", "C": "C", "G": "G", "T": "T", "U": "T", "R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT",
        "M": "AC", "B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT",
    }  # fmt: skip


def test_the_other_strand_of_a_code_stands_for_the_other_strands_of_its_bases():
    for code, bases in IUPAC_BASES.items():
        if code != "U":
            assert set(IUPAC_BASES[reverse_complement(code)]) == set(map(reverse_complement, bases))


@given(st.text(alphabet="ACGTNRX-acgt", max_size=60))
def test_stretches_against_a_walk_over_the_letters(sequence):
    stretches = []
    for i, letter in enumerate(sequence):
        if stretches and stretches[-1][2] == (letter in BASES):
            stretches[-1] = (stretches[-1][0], i + 1, stretches[-1][2])
        else:
            stretches.append((i, i + 1, letter in BASES))
    assert list(split_stretches(sequence.encode())) == stretches
    assert is_clean(sequence) == all(are_bases for _, _, are_bases in stretches)


def test_importing_it_is_light():
    code = "import sys, dnazen.dna; assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
