"""Reading FASTA: every way a file can be wrong, and what must make no difference."""

import bz2
import gzip
import lzma
import os
import random
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dnazen.data.fasta import FastaBlock, FastaRecord, cut_runs, read_fasta
from dnazen.files import InputError

PLAIN = b">chr1 the first\nACGT\nNNAC\n>chr2\nGGCC\n"
RECORDS = [FastaRecord("chr1", "ACGTNNAC"), FastaRecord("chr2", "GGCC")]
COMPRESSORS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def read(path, data):
    path.write_bytes(data)
    return list(read_fasta(path))


@pytest.mark.parametrize(
    "data",
    [
        PLAIN,
        PLAIN.replace(b"\n", b"\r\n"),
        PLAIN.rstrip(),
        PLAIN.lower().replace(b"t", b"u"),
        b"\n\n" + PLAIN.replace(b"\n", b"\n\n"),
        b">chr1\nACGTNNAC\n>chr2\nGGCC",
    ],
    ids=["plain", "CRLF", "no final newline", "lower-case RNA", "blank lines", "one line each"],
)
def test_layout_makes_no_difference(tmp_path, data):
    assert read(tmp_path / "a.fa", data) == RECORDS


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed(tmp_path, suffix):
    assert read(tmp_path / f"a.fa.{suffix}", COMPRESSORS[suffix](PLAIN)) == RECORDS


@pytest.mark.skipif(shutil.which("zstd") is None, reason="needs the zstd program to write a .zst file")
def test_zstandard(tmp_path):
    compressed = subprocess.run(["zstd", "-c"], input=PLAIN, capture_output=True, check=True).stdout
    assert read(tmp_path / "a.fa.zst", compressed) == RECORDS
    with pytest.raises(InputError, match="ended before"):
        read(tmp_path / "cut.fa.zst", compressed[:-5])


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_cut_compressed_file_is_an_error(tmp_path, suffix, kept):
    bases = bytes(random.Random(0).choices(b"ACGT", k=50_000))
    whole = COMPRESSORS[suffix](b">a\n" + bases + b"\n>b\nACGT\n")
    with pytest.raises(InputError, match=rf"a\.fa\.{suffix}: cannot be read as FASTA: .*ended before"):
        read(tmp_path / f"a.fa.{suffix}", whole[: int(len(whole) * kept)])


def test_bgzf_cut_between_blocks_is_an_error(tmp_path, shared_data):
    whole = (shared_data / "genomes" / "hg38_1m.fa.gz").read_bytes()
    assert sum(len(record.sequence) for record in read(tmp_path / "whole.fa.gz", whole)) == 1_000_000
    first_block = int.from_bytes(whole[16:18], "little") + 1
    # The premise: one block by itself decompresses without complaint.
    assert gzip.decompress(whole[:first_block]).startswith(b">")
    with pytest.raises(InputError, match="cut short"):
        read(tmp_path / "cut.fa.gz", whole[:first_block])


def test_one_very_long_line(tmp_path):
    (record,) = read(tmp_path / "a.fa", b">chr1\n" + b"ACGTNacgtu" * 1_000_000)
    assert record.sequence == "ACGTNACGTT" * 1_000_000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"\n\n", "no records"),
        (b"ACGT\n", "cannot be read as FASTA.*Expected '>'"),
        (b"@read\nACGT\n+\nIIII\n", "this is FASTQ"),
        (b"\xef\xbb\xbf>a\nACGT\n", "begins with a byte order mark .BOM.; expected plain text"),
        (b">a\n>b\nAC\n", "record 'a' has no sequence"),
        (b">a\nAC\n>b\n", "record 'b' has no sequence"),
        (b">a one\nAC\n>a two\nGG\n", "'a' occurs twice"),
        (b">a\nAC\n>\nGG\n", "record 2 has no name"),
        (b">p\nACGTMKVLE\n", "record 'p' has 'L' at position 8.*protein"),
        (b">p\nACG-N.X\nacgq\n", "record 'p' has 'q' at position 11"),
        (b">p\nAC GT\n", "record 'p' has ' ' at position 3"),
        (b">a\nAC\xffGT\n", "cannot be read as FASTA"),
        (b"\x00\x01\x02\x03" * 100, "cannot be read as FASTA"),
    ],
)
def test_bad_file_is_named(tmp_path, data, message):
    with pytest.raises(InputError, match=rf"(?s)^{tmp_path}/a\.fa: .*{message}"):
        read(tmp_path / "a.fa", data)


def test_gzip_of_nothing_has_no_records(tmp_path):
    with pytest.raises(InputError, match="no records"):
        read(tmp_path / "a.fa.gz", gzip.compress(b""))


def test_gz_that_is_not_gzip(tmp_path):
    with pytest.raises(InputError, match=r"a\.fa\.gz: cannot be read as FASTA"):
        read(tmp_path / "a.fa.gz", PLAIN)


def test_paths_that_are_no_file(tmp_path):
    for path, message in ((tmp_path / "absent.fa", "no such file"), (tmp_path, "not a regular file")):
        with pytest.raises(InputError, match=message):
            next(read_fasta(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user whom file permissions bind, not root")
def test_unreadable_file(tmp_path):
    path = tmp_path / "a.fa"
    path.write_bytes(PLAIN)
    path.chmod(0)
    with pytest.raises(InputError, match="Permission denied"):
        next(read_fasta(path))


@st.composite
def records_in_blocks(draw):
    """(records, the same in blocks of any size, a size to cut to)."""
    text = st.text(alphabet="ACGTACGTACGTNRX-", min_size=1, max_size=60)
    records = draw(st.lists(text, min_size=1, max_size=3))
    blocks = []
    for number, sequence in enumerate(records):
        ends = sorted(draw(st.sets(st.integers(1, len(sequence) - 1))) if len(sequence) > 1 else ())
        bounds = [0, *ends, len(sequence)]
        blocks += [FastaBlock(str(number), a, sequence[a:b].encode()) for a, b in zip(bounds, bounds[1:])]
    return records, blocks, draw(st.integers(1, 20))


@settings(deadline=None, max_examples=200)
@given(records_in_blocks())
def test_runs_against_a_walk_over_the_letters(drawn):
    """The same runs whatever the blocks: all letters once, in order, each block of bases as long as it can be."""
    records, blocks, size = drawn
    expected = []  # record, start and bases of each piece of a run
    for number, sequence in enumerate(records):
        length = 0
        for i, letter in enumerate(sequence):
            is_base = letter in "ACGT"
            if is_base and 0 < length < size:
                expected[-1][2] += letter
                length += 1
            elif is_base:
                expected.append([str(number), i, letter])
                length = 1
            else:
                length = 0
    parts = list(cut_runs(blocks, size))
    assert [[name, start, text.decode()] for name, start, text in parts if set(text) <= set(b"ACGT")] == expected
    assert not any(set(text) & set(b"ACGT") for _, _, text in parts if not set(text) <= set(b"ACGT"))
    for number, sequence in enumerate(records):
        mine = [part for part in parts if part.name == str(number)]
        assert b"".join(part.sequence for part in mine).decode() == sequence
        assert [part.start for part in mine] == [sum(len(p.sequence) for p in mine[:i]) for i in range(len(mine))]
