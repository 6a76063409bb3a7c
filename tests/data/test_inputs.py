"""What a corpus takes in and leaves out: mangled FASTA, standard input, lists, duplicates, held-out records, leaks."""

import bz2
import csv
import gzip
import lzma
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dnazen.cli.corpus import read_list
from dnazen.cli.main import main
from dnazen.data import fasta
from dnazen.data.corpus import SPLITS, Corpus, build_corpus, leakage, summarize
from dnazen.data.fasta import FastaReader
from dnazen.data.tables import read_sequences
from dnazen.data.tokenizer import train_tokenizer
from dnazen.files import InputError
from tests.helpers.sequences import PAIRS, other_strand, random_bases, write_fasta, write_sequences


def list_bases(corpus, split):
    """(record, start, reverse, bases) of each sequence of a split."""
    spelling = {token_id: token for token, token_id in corpus.tokenizer.get_vocab().items()}
    part = getattr(corpus, split)
    rows = np.concatenate(part.pieces)
    return [
        (int(row["record"]), int(row["start"]), int(row["reverse"]), "".join(spelling[t] for t in tokens.tolist()))
        for row, tokens in zip(rows, part, strict=True)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([random_bases(20_000)], vocab_size=64)


@pytest.fixture
def tokenizer_dir(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


# --- mangled FASTA ---------------------------------------------------------------------------------------------------


def read_slowly(data):
    """{name: sequence} letter by letter, or None where the file must be refused."""
    lines = data.replace(b"\r", b"\n").split(b"\n")
    records, name = {}, None
    for line in lines:
        if line.startswith(b">"):
            words = line[1:].decode(errors="replace").split()
            if not words or words[0] in records or (name is not None and not records[name]):
                return None
            name = words[0]
            records[name] = ""
            continue
        for byte in line.strip(b" \t"):
            letter = chr(byte).upper() if byte < 128 else "?"
            if name is None or letter not in "ACGTURYSWKMBDHVN-.X":
                return None
            records[name] += "T" if letter == "U" else letter
    return records if records and records[name] else None


@st.composite
def mangled(draw):
    """FASTA of a few records, with bytes deleted, doubled, replaced or cut off."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    ends = draw(st.sampled_from([["\n"], ["\r\n"], ["\r"], ["\n", " \n", "\t \n\n", "\r\n", "\n  "]]))
    text = ""
    for i in range(draw(st.integers(1, 4))):
        text += f">r{i} a > b{rng.choice(ends)}"
        for _ in range(rng.randint(1, 4)):
            text += "".join(rng.choices("ACGTacgtuN", weights=[8] * 9 + [2], k=rng.randint(1, 90))) + rng.choice(ends)
    data = bytearray(text.encode())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        at = rng.randrange(len(data)) if data else 0
        data[at : at + rng.randint(0, 2)] = rng.choice(
            [b"", b">", b"\n", b"\n>", b"@", b"x", b"\x00", b"\xff", b" ", b"RYK", b"NNNN", b"E"]
        )
    return bytes(data[: draw(st.sampled_from([len(data), len(data), len(data) // 2]))])


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(data=mangled(), read_bytes=st.sampled_from([1, 2, 3, 7, 64, 1 << 20]))
def test_mangled_file_is_refused_or_read_as_it_is(data, read_bytes):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fasta, "_READ_BYTES", read_bytes)
        path = Path(folder) / "a.fa"
        path.write_bytes(data)
        expected = read_slowly(data)
        if expected is None:
            with pytest.raises(InputError, match=r"a\.fa: "):
                list(FastaReader(path))
            return
        found = {}
        for name, start, sequence in FastaReader(path):
            assert sequence and start == len(found.get(name, ""))
            found[name] = found.get(name, "") + sequence.decode()
        assert found == expected


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(data=mangled(), read_bytes=st.sampled_from([5, 64, 1 << 20]), dedup=st.booleans())
def test_mangled_file_gives_no_wrong_token(tokenizer, data, read_bytes, dedup):
    """Every letter is a base of one sequence, or is counted as cut, dropped or a duplicate."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fasta, "_READ_BYTES", read_bytes)
        path, output_dir = Path(folder) / "a.fa", Path(folder) / "corpus"
        path.write_bytes(data)
        options = dict(max_tokens=10, min_length=8, validation_fraction=0.5, dedup=dedup)
        try:
            manifest = build_corpus([path], tokenizer, output_dir, **options)
        except InputError as error:
            assert read_slowly(data) is None or "1 or more of each" in str(error)
            assert list(Path(folder).iterdir()) == [path]
            return
        records = list(read_slowly(data).items())
        corpus = Corpus.open(output_dir)
        covered = np.zeros(max(len(sequence) for _, sequence in records) * len(records)).reshape(len(records), -1)
        for split in SPLITS:
            for record, start, _, bases in list_bases(corpus, split):
                assert records[record][1][start : start + len(bases)] == bases
                covered[record, start : start + len(bases)] += 1
        totals = manifest["totals"]
        assert covered.max() == 1 and covered.sum() == totals["bases"]
        assert totals["cut_bases"] == sum(letter not in PAIRS for _, s in records for letter in s)
        dropped = totals["cut_bases"] + totals["dropped_bases"] + dedup * totals["duplicate_bases"]
        assert totals["bases"] + dropped == totals["length"] == sum(len(s) for _, s in records)
        for (name, sequence), entry in zip(records, manifest["sources"][0]["records"], strict=True):
            assert (entry["name"], entry["length"]) == (name, len(sequence))
        entries = manifest["sources"][0]["records"]
        for count in entries[0].keys() - {"name"}:
            assert totals[count] == sum(entry[count] for entry in entries)


# --- where the bases come from ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_standard_input(tmp_path, tokenizer_dir, compress, capsys):
    text = f">chr1\n{random_bases(30_000)}\n".encode()
    (tmp_path / "a.fa").write_bytes(text)
    arguments = ["--tokenizer", tokenizer_dir, "--max-tokens", "50", "--output-dir"]
    assert main(["corpus", "--fasta", str(tmp_path / "a.fa"), *arguments, str(tmp_path / "file")]) == 0
    command = [sys.executable, "-m", "dnazen.cli.main", "corpus", "--fasta", "-", *arguments, tmp_path / "piped"]
    subprocess.run(command, input=compress(text), check=True, capture_output=True)
    source = Corpus.open(tmp_path / "piped").manifest["sources"][0]
    expected = Corpus.open(tmp_path / "file").manifest["sources"][0]
    assert source == {**expected, "path": "-"}
    for path in (tmp_path / "file").glob("*.npy"):
        assert path.read_bytes() == (tmp_path / "piped" / path.name).read_bytes()


@pytest.mark.slow
def test_standard_input_that_is_empty_or_given_twice(tmp_path, tokenizer_dir):
    for files, message in ((["-"], b"error: -: no records"), (["-", "-"], b"standard input): given twice")):
        line = ["corpus", "--fasta", *files, "--tokenizer", tokenizer_dir, "--output-dir", tmp_path / "out"]
        result = subprocess.run([sys.executable, "-m", "dnazen.cli.main", *line], input=b"", capture_output=True)
        assert result.returncode == 1 and message in result.stderr


@pytest.mark.slow
def test_list_of_files(tmp_path, tokenizer_dir, capsys):
    files = [write_fasta(tmp_path / f"{i}.fa", {f"r{i}": random_bases(900, i)}) for i in range(300)]
    (tmp_path / "files.txt").write_text("\n".join(map(str, files)) + "\n\n")
    arguments = ["corpus", "--fasta-list", str(tmp_path / "files.txt"), "--tokenizer", tokenizer_dir]
    assert main([*arguments, "--output-dir", str(tmp_path / "c"), "--max-tokens", "50"]) == 0
    manifest = Corpus.open(tmp_path / "c").manifest
    assert [source["path"] for source in manifest["sources"]] == [path.name for path in files]
    assert manifest["totals"]["records"] == 300
    (tmp_path / "files.txt").write_text("\n")
    assert main([*arguments, "--output-dir", str(tmp_path / "d")]) == 1
    assert "files.txt: expected the path of a FASTA file on each line" in capsys.readouterr().err
    (tmp_path / "files.txt").write_text("absent.fa\n")
    assert main([*arguments, "--output-dir", str(tmp_path / "d")]) == 1
    assert "absent.fa: no such file" in capsys.readouterr().err


def test_closed_standard_input_is_one_line(tmp_path, tokenizer_dir, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    command = ["corpus", "--fasta", "-", "--tokenizer", str(tokenizer_dir), "--output-dir", str(tmp_path / "c")]
    assert main(command) == 1
    assert "error: -: standard input is closed; expected FASTA" in capsys.readouterr().err


def test_marks_of_windows_and_long_sequences_in_tables(tmp_path):
    long = random_bases(200_000)
    (tmp_path / "a.csv").write_text(f"sequence,label\r\n{long},0\r\n", encoding="utf-8-sig")
    assert list(read_sequences(tmp_path / "a.csv")) == [long]
    (tmp_path / "list.txt").write_text("a.fa\r\nb.fa\r\n", encoding="utf-8-sig")
    assert read_list(str(tmp_path / "list.txt")) == ["a.fa", "b.fa"]


def test_reading_tables_leaves_the_limit_of_the_csv_module_as_it_was(tmp_path):
    """That limit is everyone's: neither importing the reader nor reading with it, to the end or not, may change it."""
    before = csv.field_size_limit()
    rows = read_sequences(write_sequences(tmp_path / "a.csv", [random_bases(200_000), "ACGT"]))
    assert len(next(rows)) == 200_000 and csv.field_size_limit() == before == 131_072
    assert list(rows) == ["ACGT"] and csv.field_size_limit() == before


def test_fastq_is_refused_with_the_reason(tmp_path):
    (tmp_path / "a.fa").write_text("@read\nACGT\n+\nIIII\n")
    with pytest.raises(InputError, match="this is FASTQ; expected FASTA: assembled sequence, not reads, which overlap"):
        list(FastaReader(tmp_path / "a.fa"))


# --- what is left out ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from([4, 9, 30, 1023, 1024, 1025, 2500]),
    both=st.booleans(),
)
def test_duplicates_against_a_set_of_strings(tokenizer, seed, size, both):
    """Pieces come 1,024 at a time: there are fewer, as many and more. A palindrome is its own other strand."""
    rng = random.Random(seed)
    pool = [random_bases(40, rng) for _ in range(max(5, size // 2))]
    pool.append(random_bases(20, 9) + other_strand(random_bases(20, 9)))
    pieces = [rng.choice((str, other_strand))(rng.choice(pool)) for _ in range(size)]
    seen, unique = set(), []
    for piece in pieces:
        if min(piece, other_strand(piece)) not in seen:
            unique.append(piece)
        seen.add(min(piece, other_strand(piece)))
    with tempfile.TemporaryDirectory() as folder:
        path = write_fasta(Path(folder) / "a.fa", {"r": "N".join(pieces)})
        options = dict(max_tokens=40, min_length=40, validation_fraction=0.5, reverse_complement=both)
        for dedup, kept in ((False, pieces), (True, unique)):
            output_dir = Path(folder) / str(dedup)
            if len(kept) < 2:
                with pytest.raises(InputError, match="1 or more of each"):
                    build_corpus([path], tokenizer, output_dir, dedup=dedup, **options)
                continue
            totals = build_corpus([path], tokenizer, output_dir, dedup=dedup, **options)["totals"]
            assert totals["duplicates"] == len(pieces) - len(unique)
            assert totals["duplicate_bases"] == 40 * totals["duplicates"]
            assert (totals["pieces"], totals["bases"]) == (len(kept), 40 * len(kept))
            corpus = Corpus.open(output_dir)
            rows = sorted(row for split in SPLITS for row in list_bases(corpus, split))
            assert [bases for _, _, reverse, bases in rows if not reverse] == kept
            assert [bases for _, _, reverse, bases in rows if reverse] == [other_strand(b) for b in kept if both]


def test_records_held_out_whole(tmp_path, tokenizer_dir, capsys):
    records = {name: random_bases(3_000, i) for i, name in enumerate(("chr1", "chr2", "chrX", "chrY"))}
    path = write_fasta(tmp_path / "a.fa", records)
    arguments = ["corpus", "--fasta", str(path), "--tokenizer", tokenizer_dir, "--max-tokens", "50", "--output-dir"]
    assert main([*arguments, str(tmp_path / "c"), "--validation-records", "chrX,chr1"]) == 0
    corpus = Corpus.open(tmp_path / "c")
    assert {row[0] for row in list_bases(corpus, "validation")} == {0, 2}
    assert {row[0] for row in list_bases(corpus, "train")} == {1, 3}
    assert sum(end - start for _, start, end in corpus.manifest["validation"]) == 6_000
    assert corpus.manifest["parameters"]["validation_fraction"] is None
    assert main([*arguments, str(tmp_path / "d"), "--validation-records", "chr1,X"]) == 1
    assert "found X, which no file has; the first of 4 names are chr1, chr2, chrX" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "d"), "--validation-records", "chr1,chr2,chrX,chrY"]) == 1
    assert "left 0 pieces to train on" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, str(tmp_path / "d"), "--validation-records", "chr1", "--validation-fraction", "0.1"])


# --- leaks -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), both=st.booleans(), block=st.sampled_from([1, 40, 1 << 18]))
def test_leaks_against_a_search_in_strings(tokenizer, seed, both, block):
    rng = random.Random(seed)
    text = "".join(rng.choices("ACGT", k=1500))
    text += rng.choice(["", "N"]) + "AT" * 60 + text[200:300] + "N" + "".join(rng.choices("ACGT", k=700))
    cut = rng.randint(800, 1400)
    records = {"a": text, "held": "".join(rng.choices("ACGT", k=400)) + text[cut : cut + 60]}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(leakage, "_BLOCK_TOKENS", block)
        path = write_fasta(Path(folder) / "a.fa", records)
        sequences = []
        for _ in range(30):
            source = rng.choice(list(records.values()))
            start = rng.randrange(len(source) - 32)
            sequence = source[start : start + rng.randint(32, 300)]
            if rng.random() < 0.3:
                middle = rng.randrange(len(sequence))
                sequence = sequence[:middle] + "A" + sequence[middle + 1 :]
            if rng.random() < 0.5 and "N" not in sequence:
                sequence = other_strand(sequence)
            sequences.append(sequence)
        sequences += ["AT" * 20, "TA" * 16, "ACGTACGT", "ACGT" * 8 + "RYK"]
        target = write_sequences(Path(folder) / "b.csv.gz", [s.lower() for s in sequences])
        held_out = rng.choice([{"validation_records": ["held"]}, {"validation_fraction": 0.2}])
        options = dict(max_tokens=20, reverse_complement=both, shard_tokens=rng.choice([300, 2**27]), **held_out)
        manifest = build_corpus([path], tokenizer, Path(folder) / "c", check_against=[target], min_length=20, **options)
        corpus = Corpus.open(Path(folder) / "c")
        rows = [(*row, split) for split in ("train", "validation") for row in list_bases(corpus, split)]
        joined, split_of = "", ""
        previous = None
        for record, start, reverse, bases, split in sorted(rows):
            if not reverse:
                gap = "" if previous == (record, start) else "N"
                joined, split_of = joined + gap + bases, split_of + gap + split[0] * len(bases)
                previous = (record, start + len(bases))
        looked_for = [s for s in sequences if len(s) >= 32 and not set(s) - set(PAIRS)]
        lie_in = []
        for s in looked_for:
            pattern = f"(?=({s}|{other_strand(s)}))"
            lie_in.append({x for m in re.finditer(pattern, joined) for x in split_of[m.start() : m.end(1)]})
        expected = [sum(x in splits for splits in lie_in) for x in "tv"]
        (report,) = manifest["leakage"]
        assert [report["in_train"], report["in_validation"]] == expected
        assert report["sequences"] == len(looked_for) and report["skipped_short"] == 1
        assert report["skipped_ambiguous"] == len(sequences) - len(looked_for) - 1
        assert f"of {len(looked_for)} sequences {expected[0]} occur in train" in summarize(manifest)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seq,label\nACGT,0\n", "expected a column 'sequence', found seq, label"),
        ("sequence,label\n", "found no rows"),
        ("sequence,label\n,1\n", "line 2: expected a sequence, found nothing"),
        ("", "expected a column 'sequence', found none"),
        ("sequence,label\nACGT,0\nACGT\n", "line 3: expected 2 fields, found 1"),
        ('sequence,label\n"ACGT,0\n', "cannot be read as CSV"),
    ],
)
def test_bad_csv_is_named_before_anything_is_built(tmp_path, tokenizer, content, message):
    genome = write_fasta(tmp_path / "a.fa", {"a": random_bases(5000)})
    (tmp_path / "b.csv").write_text(content)
    with pytest.raises(InputError, match=rf"b\.csv: .*{message}"):
        build_corpus([genome], tokenizer, tmp_path / "c", check_against=[tmp_path / "b.csv"])
    with pytest.raises(InputError, match="absent.csv: no such file"):
        build_corpus([genome], tokenizer, tmp_path / "c", check_against=[tmp_path / "absent.csv"])
    assert not (tmp_path / "c").exists()
