"""`dnazen embed`: vectors against plain loops over the model, in every format, whatever the batch."""

import csv
import functools
import gzip
import resource
import time
import tracemalloc

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dnazen.batches.collator import PackedCollator
from dnazen.cli.main import main
from dnazen.data.tokenizer import load_tokenizer
from dnazen.dna import reverse_complement
from dnazen.inference.embed import POOLINGS, embed
from dnazen.models import DNAZenModel
from dnazen.ngram.vocab import NgramVocabulary
from tests.helpers.forked import run_forked, start_forked

# rounding of fp32 sums of some hundred terms in another order
ROUNDING = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def sequences(genome):
    rng = np.random.default_rng(1)
    lengths = [1, 2, 40, *rng.integers(60, 600, 67)]
    starts = rng.integers(0, len(genome) - 1000, len(lengths))
    return [genome[start : start + length] for start, length in zip(starts, lengths)]


@pytest.fixture(scope="module")
def fasta(sequences, tmp_path_factory):
    path = tmp_path_factory.mktemp("input") / "in.fa"
    path.write_text("".join(f">s{number}\n{sequence}\n" for number, sequence in enumerate(sequences)))
    return path


@pytest.fixture(scope="module")
def plain(model_folder):
    """States of one sequence at a time after a layer, [CLS] first, and the length of each token in bases.

    The model runs once for each sequence, whatever is asked of it.
    """
    model = DNAZenModel.from_pretrained(model_folder).eval()
    tokenizer = load_tokenizer(model_folder)
    collator = PackedCollator(tokenizer, NgramVocabulary.from_pretrained(model_folder, tokenizer))

    @functools.cache
    def run(sequence):
        ids = tokenizer(sequence, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            found = model(**collator([ids]), output_hidden_states=True).hidden_states
        lengths = [len(token) for token in tokenizer.convert_ids_to_tokens(ids)]
        return [states[:-1].numpy() for states in found], lengths

    def states(sequence, layer=-1):
        found, lengths = run(sequence)
        return found[layer], lengths

    return states


def pooled(states, lengths, pooling):
    if pooling == "cls":
        return states[0]
    if pooling == "base":
        return np.concatenate([np.tile(state, (length, 1)) for state, length in zip(states[1:], lengths)])
    return {"mean": states[1:].mean(0), "max": states[1:].max(0), "token": states[1:]}[pooling]


def read_tsv(path):
    with open(path) as file:
        return [(row["record"], int(row["start"]), int(row["end"])) for row in csv.DictReader(file, delimiter="\t")]


@pytest.mark.slow
@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_are_those_of_the_model_alone(model_folder, fasta, sequences, plain, tmp_path, pooling):
    for layer in (None, 0, 1):
        output = tmp_path / f"{layer}.npy"
        embed(str(model_folder), fasta, output, pooling=pooling, layer=layer)
        found, table = np.load(output), read_tsv(tmp_path / f"{layer}.tsv")
        assert found.dtype == np.float32 and len(found) == len(table)
        row = 0
        for number, sequence in enumerate(sequences):
            states, lengths = plain(sequence, -1 if layer is None else layer)
            expected = np.atleast_2d(pooled(states, lengths, pooling))
            np.testing.assert_allclose(found[row : row + len(expected)], expected, **ROUNDING)
            bounds = {"token": np.cumsum([0, *lengths]), "base": np.arange(len(sequence) + 1)}.get(
                pooling, np.array([0, len(sequence)])
            )
            spans = [(f"s{number}", start, end) for start, end in zip(bounds[:-1], bounds[1:])]
            assert table[row : row + len(expected)] == spans
            row += len(expected)
        assert row == len(found)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", POOLINGS)
def test_same_vectors_alone_and_in_batches_of_64(model_folder, fasta, tmp_path, pooling):
    found = []
    for size in (3, 64 * 200):
        embed(str(model_folder), fasta, tmp_path / f"{size}.npy", pooling=pooling, max_batch_tokens=size)
        found.append(np.load(tmp_path / f"{size}.npy"))
    np.testing.assert_allclose(*found, **ROUNDING)
    assert len(np.unique(found[0].round(3), axis=0)) > 50  # no two records alike


def test_every_format_says_the_same(model_folder, fasta, tmp_path):
    for name in ("a.npy", "a.parquet", "a.h5"):
        embed(str(model_folder), fasta, tmp_path / name, pooling="token")
    table, vectors = read_tsv(tmp_path / "a.tsv"), np.load(tmp_path / "a.npy")
    read = pq.read_table(tmp_path / "a.parquet")
    assert list(zip(*(read[name].to_pylist() for name in ("record", "start", "end")))) == table
    assert np.array_equal(read["vector"].combine_chunks().flatten().to_numpy().reshape(vectors.shape), vectors)
    assert read.schema.metadata[b"pooling"] == b"token" and read.schema.metadata[b"layer"] == b"3"
    with h5py.File(tmp_path / "a.h5") as file:
        rows = zip(file["record"].asstr()[:].tolist(), file["start"][:].tolist(), file["end"][:].tolist())
        assert list(rows) == table and np.array_equal(file["vector"][:], vectors)
        assert file.attrs["pooling"] == "token" and file.attrs["window"] == 2040 and not file.attrs["both_strands"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "a.npy", "a.parquet", "a.tsv"]


@pytest.mark.parametrize("pooling", ["mean", "max", "cls", "base"])
def test_both_strands_are_averaged(model_folder, genome, plain, tmp_path, pooling):
    sequence = genome[3000:3500]
    (tmp_path / "f.csv").write_text(f"sequence\n{sequence}\n{reverse_complement(sequence)}\n")
    embed(str(model_folder), tmp_path / "f.csv", tmp_path / "f.npy", pooling=pooling, both_strands=True)
    found = np.load(tmp_path / "f.npy")
    forward, reverse = (pooled(*plain(strand), pooling) for strand in (sequence, reverse_complement(sequence)))
    step = -1 if pooling == "base" else 1
    expected = (forward + reverse[::step]) / 2
    np.testing.assert_allclose(found[: len(found) // 2].squeeze(), expected, **ROUNDING)
    np.testing.assert_allclose(found[len(found) // 2 :].squeeze()[::step], expected, **ROUNDING)


@pytest.mark.parametrize("pooling", ["mean", "max", "cls", "base"])
def test_both_strands_of_long_sequences_agree(model_folder, genome, tmp_path, pooling):
    """Beyond the window, over even and odd numbers of bases and windows, and a run that ends at N."""
    lengths = (101, 140, 141, 161, 220, 333, 334, 1001)
    sequences = [genome[at : at + length] for at, length in zip(range(0, 80_000, 10_000), lengths)]
    sequences.append(genome[90_000:90_251] + "NN" + genome[91_000:91_150])
    for name, strands in (("f", sequences), ("r", map(reverse_complement, sequences))):
        (tmp_path / f"{name}.csv").write_text("sequence\n" + "".join(f"{strand}\n" for strand in strands))
        more = dict(pooling=pooling, window=100, stride=60, both_strands=True)
        embed(str(model_folder), tmp_path / f"{name}.csv", tmp_path / f"{name}.npy", **more)
    forward, reverse = np.load(tmp_path / "f.npy"), np.load(tmp_path / "r.npy")
    if pooling == "base":
        bases = [sum(map(sequence.count, "ACGT")) for sequence in sequences]
        reverse = np.concatenate([part[::-1] for part in np.split(reverse, np.cumsum(bases)[:-1])])
    np.testing.assert_allclose(forward, reverse, **ROUNDING)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_windows_and_letters_that_are_no_bases(model_folder, genome, plain, tmp_path, caplog, pooling):
    """A lower-case run of 250 bases in windows of 100, N, and a short run, against slices by hand."""
    runs = [genome[:250], genome[1000:1060]]
    record = runs[0].lower() + "N" * 7 + runs[1] + "R"
    with gzip.open(tmp_path / "in.csv.gz", "wt") as file:
        file.write(f"label,sequence\n0,{record}\n1,NNNN\n")
    more = dict(pooling=pooling, window=100, stride=60)
    counts = embed(str(model_folder), tmp_path / "in.csv.gz", tmp_path / "o.npy", **more)
    assert "in.csv.gz: records without A, C, G, T have" in caplog.text and caplog.text.rstrip().endswith(": 2")
    assert counts == {
        "records": 2, "rows": counts["rows"], "dimensions": 24, "windows": 5, "bases": 310, "other_letters": 12,
        "empty_records": 1,
    }  # fmt: skip
    # windows at 0, 50, 100, 150, for 60 would not end evenly; seams in the middle of what two share
    parts = []
    for offset, text, own in (
        (0, runs[0][:100], (0, 75)), (50, runs[0][50:150], (75, 125)), (100, runs[0][100:200], (125, 175)),
        (150, runs[0][150:250], (175, 250)), (257, runs[1], (257, 317)),
    ):  # fmt: skip
        states, lengths = plain(text)
        starts = offset + np.cumsum([0, *lengths])[:-1]
        if pooling == "base":
            parts.append(pooled(states, lengths, "base")[own[0] - offset : own[1] - offset])
        elif pooling == "cls":
            parts.append(states[:1])
        else:
            parts.append(states[1:][(starts >= own[0]) & (starts < own[1])])
    rows = np.concatenate(parts)
    found, table = np.load(tmp_path / "o.npy"), read_tsv(tmp_path / "o.tsv")
    if pooling in ("token", "base"):
        np.testing.assert_allclose(found, rows, **ROUNDING)
        assert {record for record, _, _ in table} == {"1"}
        if pooling == "base":
            assert [start for _, start, _ in table] == [*range(250), *range(257, 317)]
    else:
        np.testing.assert_allclose(found[0], rows.max(0) if pooling == "max" else rows.mean(0), **ROUNDING)
        assert np.isnan(found[1]).all() and table == [("1", 0, 318), ("2", 0, 4)]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(model_folder, genome, tmp_path):
    """Vectors of all bases of 120 kb take 11.5 MB, and are never held."""
    sizes = []
    for bases in (60_000, 120_000):
        (tmp_path / "in.fa").write_text(f">long\n{genome[:bases]}\n")
        tracemalloc.start()
        embed(str(model_folder), tmp_path / "in.fa", tmp_path / f"{bases}.npy", pooling="base", max_batch_tokens=512)
        sizes.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert np.load(tmp_path / "120000.npy", mmap_mode="r").shape == (120_000, 24)
    assert sizes[1] < sizes[0] + 2e6  # the letters, several times; the vectors of the second half take 5.8 MB


def test_published_folders_and_heads_of_other_kinds(dnabert2_folder, fasta, tmp_path):
    assert embed(str(dnabert2_folder), fasta, tmp_path / "o.npy")["rows"] == 70
    assert np.isfinite(np.load(tmp_path / "o.npy")).all()


def arguments(model_folder, input, output, *more):
    return ["embed", "--model", str(model_folder), "--input", str(input), "--output", str(output), *more]


def test_the_command_says_what_it_did(model_folder, tmp_path, capsys):
    (tmp_path / "in.csv").write_text("sequence,label\nACGTNACGT,0\nNNN,1\n")
    assert main(arguments(model_folder, tmp_path / "in.csv", tmp_path / "o.npy", "--both-strands")) == 0
    printed = capsys.readouterr().out
    assert "records     2, 1 of them without A, C, G, T" in printed and "left out    4 other letters" in printed
    assert "vectors     2 of 24 numbers" in printed and f"written to  {tmp_path / 'o.npy'} in" in printed


@pytest.mark.parametrize(
    "content, more, message",
    [
        (">a\nACGT\n", ["--layer", "4"], "layer: expected 0 (the embeddings) to 3, found 4"),
        (">a\nACGT\n", ["--layer", "-1"], "layer: expected 0 (the embeddings) to 3, found -1"),
        (">a\nACGT\n", ["--pooling", "token", "--both-strands"], "expected mean, max, cls or base with both strands"),
        (">a\nACGT\n", ["--stride", "3000"], "--window, --stride: expected 1 <= stride <= window, found 2040 and 3000"),
        (">a\nACGT\n", ["--max-batch-tokens", "2"], "--max-batch-tokens: expected at least 3, found 2"),
        (">a\nACGE\n", [], "record 'a' has 'E' at position 4; expected nucleotides"),
        (">a\n", [], "record 'a' has no sequence"),
        ("", [], "the file is empty"),
    ],
)
def test_what_is_refused(model_folder, tmp_path, capsys, content, more, message):
    (tmp_path / "in.fa").write_text(content)
    assert main(arguments(model_folder, tmp_path / "in.fa", tmp_path / "o.npy", *more)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dnazen: error: ") and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["in.fa"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("seq,label\nACGT,0\n", "expected a column 'sequence', found seq, label"),
        ("sequence,label\nACGT,0\n,1\n", "line 3: expected a sequence, found nothing"),
        ("sequence,label\nACGT,0\nACQT,1\n", "row 2 has 'Q' at position 3; expected nucleotides"),
        ("sequence\n", "expected a sequence in each row, found no rows"),
    ],
)
def test_what_is_refused_of_a_csv(model_folder, tmp_path, capsys, content, message):
    (tmp_path / "in.csv").write_text(content)
    assert main(arguments(model_folder, tmp_path / "in.csv", tmp_path / "o.h5")) == 1
    assert f"{tmp_path / 'in.csv'}: {message}" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


def test_outputs_are_never_overwritten(model_folder, fasta, tmp_path, capsys):
    for name, mine in (("o.parquet", "o.parquet"), ("o.npy", "o.tsv")):
        (tmp_path / mine).write_text("mine")
        assert main(arguments(model_folder, fasta, tmp_path / name)) == 1
        assert f"{tmp_path / mine}: already exists" in capsys.readouterr().err
        assert (tmp_path / mine).read_text() == "mine"
    assert main(arguments(model_folder, fasta, tmp_path / "o.pickle")) == 1
    assert "o.pickle: expected a name that ends in .npy, .parquet, .h5" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.parquet", "o.tsv"]


def check_full_disk(commands, capfd):
    """Each of the commands must fail, with one line that says why, where no file may have more than 20 kB."""

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        return [main(words) for words in commands] != [1] * len(commands)

    exit_code, printed = run_forked(run), capfd.readouterr().err
    assert exit_code == 0 and "Traceback" not in printed, printed
    errors = [text for text in printed.splitlines() if text.startswith("dnazen: error: ")]
    assert len(errors) == len(commands), errors
    for error, command in zip(errors, commands):
        assert command[-1] in error and ("File too large" in error or "is the disk full?" in error), error


def test_full_disk_leaves_nothing(model_folder, fasta, tmp_path, capfd):
    names = ("o.npy", "o.parquet", "o.h5")
    words = [*arguments(model_folder, fasta, "", "--pooling", "base"), "--output"]
    check_full_disk([[*words, str(tmp_path / name)] for name in names], capfd)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_killed_while_it_writes(model_folder, genome, tmp_path, caplog):
    """kill -9 leaves nothing under the name that was asked for; the next try removes what it leaves, and is whole."""
    (tmp_path / "in.fa").write_text(f">a\n{genome}\n")
    words = arguments(model_folder, tmp_path / "in.fa", tmp_path / "o.npy", "--pooling", "base")
    process = start_forked(lambda: main(words))
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size > 100_000 for path in tmp_path.glob(".o.npy.*.tmp")):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    left = sorted(path.name for path in tmp_path.iterdir() if path.name != "in.fa")
    assert len(left) == 2 and all(name.endswith(".tmp") for name in left)
    (tmp_path / "in.fa").write_text(f">a\n{genome[:300]}\n")
    assert main(words) == 0
    assert np.load(tmp_path / "o.npy").shape == (300, 24)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.fa", "o.npy", "o.tsv"]
    assert caplog.text.count("the process that wrote it was killed") == 2
