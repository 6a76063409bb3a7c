"""The corpus on disk: every sequence traced back to its bases, every count recounted, every fault named."""

import json
import math
import random
import re
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from dnazen.data.corpus import Corpus, build, build_corpus, summarize
from dnazen.data.fasta import read_fasta
from dnazen.data.tokenizer import load_tokenizer, tokenizer_checksum, train_tokenizer
from dnazen.files import InputError, sha256_file, write_json
from tests.helpers.sequences import other_strand, random_bases, write_fasta


def list_sequences(corpus):
    """(split, provenance, tokens) of every sequence, in the order on disk."""
    for name, split in (("train", corpus.train), ("validation", corpus.validation)):
        rows = np.concatenate(split.pieces)
        assert len(rows) == len(split)
        for i, row in enumerate(rows):
            yield name, tuple(int(value) for value in row), split[i]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([random_bases(20_000)], vocab_size=64)


@pytest.fixture(scope="module")
def genome(tmp_path_factory):
    sequences = [random_bases(9000, 1), "N" * 50 + random_bases(7000, 2) + "RYN" + random_bases(30, 3), "NNNN"]
    return write_fasta(tmp_path_factory.mktemp("genome") / "genome.fa", sequences)


@pytest.fixture
def corpus_dir(tmp_path, genome, tokenizer):
    build_corpus([genome], tokenizer, tmp_path / "corpus", max_tokens=20, validation_fraction=0.1, shard_tokens=500)
    return tmp_path / "corpus"


@st.composite
def genomes(draw):
    """One to four sequences of up to 600 bases, about one in 80 of them no base."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    lengths = draw(st.lists(st.integers(1, 600), min_size=1, max_size=4))
    return ["".join(rng.choices("ACGTacgtuN", weights=[9] * 9 + [1], k=length)) for length in lengths]


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    sequences=genomes(),
    max_tokens=st.integers(3, 12),
    min_length=st.integers(1, 12),
    reverse_complement=st.booleans(),
    validation_fraction=st.sampled_from([0.1, 0.37, 0.5, 0.9]),
    shard_tokens=st.sampled_from([1, 30, 2**27]),
    piece_length=st.none() | st.integers(1, 100),
)
def test_every_sequence_is_its_piece(
    tokenizer, sequences, max_tokens, min_length, reverse_complement, validation_fraction, shard_tokens, piece_length
):
    size = 4 * max_tokens if piece_length is None else piece_length
    assume(min_length <= size)
    # Independent of the code: pieces by regular expression, held-out ones by the rule in floating point.
    clean = [sequence.upper().replace("U", "T") for sequence in sequences]
    pieces = [
        (number, run.start() + start, min(run.start() + start + size, run.end()))
        for number, sequence in enumerate(clean)
        for run in re.finditer("[ACGT]+", sequence)
        for start in range(0, len(run[0]), size)
    ]
    kept = [piece for piece in pieces if piece[2] - piece[1] >= min_length]

    def count_sequences(text):
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= max_tokens:
            return 1
        return count_sequences(text[: len(text) // 2]) + count_sequences(text[len(text) // 2 :])

    held_out = [
        list(piece)
        for i, piece in enumerate(kept)
        if math.floor((i + 1) * validation_fraction + 0.5) > math.floor(i * validation_fraction + 0.5)
    ]
    options = {"min_length": min_length, "reverse_complement": reverse_complement, "piece_length": piece_length}
    with tempfile.TemporaryDirectory() as folder:
        fasta, output_dir = write_fasta(Path(folder) / "g.fa", sequences), Path(folder) / "corpus"
        arguments = ([fasta], tokenizer, output_dir)
        options |= {"max_tokens": max_tokens, "validation_fraction": validation_fraction, "shard_tokens": shard_tokens}
        if not held_out or len(held_out) == len(kept):
            with pytest.raises(InputError, match="1 or more of each"):
                build_corpus(*arguments, **options)
            assert list(Path(folder).iterdir()) == [fasta]
            return
        manifest = build_corpus(*arguments, **options)
        corpus = Corpus.open(output_dir)
        assert corpus.manifest == manifest and manifest["validation"] == held_out

        covered = {(strand, name): [] for strand in (False, True) for name in ("train", "validation")}
        for name, (number, start, length, reverse), tokens in list_sequences(corpus):
            bases = clean[number][start : start + length]
            text = other_strand(bases) if reverse else bases
            assert tokens.dtype == np.uint16 and 1 <= len(tokens) <= max_tokens
            assert tokens.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
            covered[bool(reverse), name] += [(number, i) for i in range(start, start + length)]
        for name in ("train", "validation"):
            chosen = [piece for piece in kept if (list(piece) in held_out) == (name == "validation")]
            expected = [(number, i) for number, start, end in chosen for i in range(start, end)]
            assert covered[False, name] == expected
            assert sorted(covered[True, name]) == (expected if reverse_complement else [])

        totals, records = manifest["totals"], manifest["sources"][0]["records"]
        assert [record["length"] for record in records] == list(map(len, sequences))
        assert sum(record["pieces"] for record in records) == totals["pieces"] == len(kept)
        assert totals["dropped_short"] == len(pieces) - len(kept)
        assert totals["length"] == totals["bases"] + totals["dropped_bases"] + totals["cut_bases"]
        assert totals["cut_runs"] == sum(len(re.findall("[^ACGT]+", sequence)) for sequence in clean)
        texts = [clean[number][start:end] for number, start, end in kept]
        texts += [other_strand(text) for text in texts] if reverse_complement else []
        num_sequences = sum(map(count_sequences, texts))
        assert len(corpus.train) + len(corpus.validation) == num_sequences
        assert totals["pieces_split"] == num_sequences - len(texts)
        for split, name in ((corpus.train, "train"), (corpus.validation, "validation")):
            assert totals[name]["sequences"] == len(split) == len(split.lengths)
            assert totals[name]["tokens"] == split.num_tokens == sum(len(split[i]) for i in range(len(split)))
            assert all(len(t) <= max(shard_tokens, max_tokens) for t, _ in split.shards)


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    max_tokens=st.integers(2, 9),
    min_length=st.integers(1, 4),
    reverse_complement=st.booleans(),
    dedup=st.booleans(),
)
def test_pieces_that_fill_their_tokens(tokenizer, seed, max_tokens, min_length, reverse_complement, dedup):
    """Runs of up to three stretches, of bases and of repeats, whose tokens are long on one strand only."""
    rng = random.Random(seed)
    min_length = min(min_length, max(1, max_tokens // 2))
    repeats = ["".join(rng.choices("ACGT", k=rng.randint(1, 7))) for _ in range(3)]
    run = [random_bases(rng.randint(1, 3000), seed), rng.choice(repeats) * rng.randint(1, 300), "N" * rng.randint(0, 2)]
    sequences = ["".join(rng.choices(run, k=4)) + "A" for _ in range(2)]
    options = {"max_tokens": max_tokens, "min_length": min_length, "reverse_complement": reverse_complement}
    with tempfile.TemporaryDirectory() as folder:
        fasta, output_dir = write_fasta(Path(folder) / "g.fa", sequences), Path(folder) / "corpus"
        options |= {"piece_length": "auto", "dedup": dedup, "validation_fraction": 0.4}
        manifest = build_corpus([fasta], tokenizer, output_dir, **options)
        covered: dict[bool, list] = {False: [], True: []}
        held_out = {(number, i) for number, start, end in manifest["validation"] for i in range(start, end)}
        counts = []
        for name, (number, start, length, reverse), tokens in list_sequences(Corpus.open(output_dir)):
            bases = sequences[number][start : start + length]
            text = other_strand(bases) if reverse else bases
            assert tokens.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
            assert 1 <= len(tokens) <= max_tokens
            places = [(number, i) for i in range(start, start + length)]
            assert all((place in held_out) == (name == "validation") for place in places)
            covered[bool(reverse)] += places
            counts.append(len(tokens))
        # every base once on each strand, but for runs, and ends of a stretch's length, that are under the minimum
        clean = {(number, i) for number, text in enumerate(sequences) for i, base in enumerate(text) if base != "N"}
        totals = manifest["totals"]
        assert len(covered[False]) == len(set(covered[False])) == totals["bases"] and set(covered[False]) <= clean
        assert sorted(covered[True]) == (sorted(covered[False]) if reverse_complement else [])
        duplicate_bases = totals["duplicate_bases"] if dedup else 0
        assert len(clean) == totals["bases"] + totals["dropped_bases"] + duplicate_bases
        assert totals["dropped_bases"] <= (min_length - 1) * totals["dropped_short"]
        assert totals["pieces"] == (len(counts) - totals["pieces_split"]) // (1 + reverse_complement)
        if not reverse_complement and not dedup:  # nothing is short but the end of a stretch, or its two last pieces
            stretches = sum(
                math.ceil(len(run) / (400 * max_tokens)) for text in sequences for run in re.findall("[ACGT]+", text)
            )
            assert sum(count < max_tokens for count in counts) <= 2 * stretches


@pytest.mark.slow
def test_pieces_of_human_that_fill_their_tokens(tmp_path, shared_data, monkeypatch):
    """The mean is over 500 of 510, and none of it depends on the number of processes."""
    tokenizer, raw = (load(shared_data / "tokenizer") for load in (load_tokenizer, load_raw))
    fasta = shared_data / "genomes" / "hg38_1m.fa.gz"
    options = {"piece_length": "auto", "reverse_complement": True}
    monkeypatch.setattr(build, "_BYTES_PER_WORKER", 1 << 16)
    manifests = [
        build_corpus([fasta], tokenizer, tmp_path / f"{workers}", num_workers=workers, **options) for workers in (1, 2)
    ]
    assert manifests[0] == manifests[1] and manifests[0]["parameters"]["piece_length"] == "auto"
    split = Corpus.open(tmp_path / "2").everything()
    mean = split.num_tokens / len(split)
    assert mean > 500 and max(split.lengths) == 510
    assert f"tokens a sequence: {mean:.1f}, {mean / 510:.1%} of 510 at most" in summarize(manifests[0])
    (record,) = read_fasta(fasta)
    rows = np.concatenate(split.pieces).tolist()
    texts = [record.sequence[start : start + length] for _, start, length, _ in rows]
    texts = [other_strand(text) if row[3] else text for text, row in zip(texts, rows)]
    assert [encoding.ids[1:-1] for encoding in raw.encode_batch(texts)] == [tokens.tolist() for tokens in split]


def load_raw(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_manifest_and_summary(corpus_dir, genome, tokenizer):
    corpus = Corpus.open(corpus_dir)
    manifest = corpus.manifest
    assert manifest["tokenizer"] == {"checksum": tokenizer_checksum(tokenizer), "vocab_size": 64}
    (source,) = manifest["sources"]
    assert source["path"] == "genome.fa" and source["sha256"] == sha256_file(genome)
    assert source["bytes"] == genome.stat().st_size
    assert [record["name"] for record in source["records"]] == ["record0", "record1", "record2"]
    second = source["records"][1]
    assert (second["length"], second["cut_runs"], second["cut_bases"]) == (7083, 2, 53)
    # 7,000 = 87 * 80 + 40, and the run of 30: both under the minimum of 64.
    assert (second["pieces"], second["dropped_short"], second["dropped_bases"]) == (87, 2, 30 + 40)
    assert corpus.checksum == sha256_file(corpus_dir / "manifest.json")
    for shard in manifest["shards"]:
        assert all(sha256_file(corpus_dir / name) == checksum for name, checksum in shard["files"].items())
    listed = {name for shard in manifest["shards"] for name in shard["files"]} | {"manifest.json", "tokenizer"}
    assert listed == {path.name for path in corpus_dir.iterdir()} and len(corpus.train.shards) > 2
    text = summarize(manifest)
    assert "3 records, 16,087 bases" in text and f"{manifest['totals']['train']['tokens']:,} tokens" in text


@pytest.mark.slow
def test_large_manifest_is_written_bit_by_bit(tmp_path):
    value = {"records": [{"name": f"r{i}", "length": i, "share": i / 7, "held_out": None} for i in range(20_000)]}
    text = json.dumps(value, indent=1) + "\n"
    tracemalloc.start()
    write_json(tmp_path / "a.json", value)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "a.json").read_text() == text
    assert peak < len(text) / 10


def test_reading_a_split(corpus_dir):
    split = Corpus.open(corpus_dir).train
    tokens, _ = split.shards[0]
    assert isinstance(tokens, np.memmap) and np.shares_memory(split[0], tokens)
    one_by_one, whole = np.concatenate(list(split)), np.concatenate([tokens for tokens, _ in split.shards])
    assert np.array_equal(one_by_one, whole)
    for index in (-1, len(split)):
        with pytest.raises(IndexError):
            split[index]
    with pytest.raises(ValueError):
        split[0][0] = 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: expected 1 or more, found 0"),
        ({"min_length": 0}, "min_length: expected 1 to 2040 bases"),
        ({"min_length": 2041}, "min_length: expected 1 to 2040 bases"),
        ({"piece_length": 0}, "piece_length: expected auto, or 1 to 204000 bases, found 0"),
        ({"piece_length": 204_001}, "piece_length: expected auto, or 1 to 204000 bases, found 204001"),
        ({"piece_length": 60}, r"min_length: expected 1 to 60 bases \(piece_length\), found 64"),
        ({"piece_length": "auto", "min_length": 256}, r"expected 1 to 255 bases \(half of max_tokens\), found 256"),
        ({"validation_fraction": 0.0}, "validation_fraction: expected more than 0"),
        ({"validation_fraction": 1.0}, "validation_fraction: expected more than 0 and less than 1, found 1.0"),
        ({"validation_fraction": math.nan}, "validation_fraction"),
        ({"num_workers": 0}, "num_workers: expected 1 or more, found 0"),
        ({"validation_fraction": 0.01}, "left 9 pieces to train on and 0 to validate on"),
        ({"validation_fraction": 0.99}, "left 0 pieces to train on and 9 to validate on"),
        ({"min_length": 2040, "max_tokens": 2000}, "left 2 pieces to train on and 0 to validate on"),
    ],
)
def test_bad_parameters_leave_nothing(tmp_path, genome, tokenizer, options, message):
    with pytest.raises(InputError, match=message):
        build_corpus([genome], tokenizer, tmp_path / "corpus", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sequences", "message"),
    [(["N" * 1000], "0 pieces to train on and 0"), (["ACGT" * 300, "MKVLE"], "'record1' has 'L'")],
    ids=["all N", "protein"],
)
def test_bad_genomes_leave_nothing(tmp_path, tokenizer, sequences, message):
    fasta = write_fasta(tmp_path / "a.fa", sequences)
    with pytest.raises(InputError, match=message):
        build_corpus([fasta], tokenizer, tmp_path / "corpus", max_tokens=20, validation_fraction=0.5)
    assert list(tmp_path.iterdir()) == [fasta]


def test_file_that_is_absent_or_given_twice(tmp_path, genome, tokenizer):
    with pytest.raises(InputError, match="absent.fa: no such file"):
        build_corpus([tmp_path / "absent.fa"], tokenizer, tmp_path / "corpus")
    copy = tmp_path / "copy.fa"
    copy.write_bytes(genome.read_bytes())
    with pytest.raises(InputError, match="copy.fa: given twice"):
        build_corpus([genome, copy], tokenizer, tmp_path / "corpus")
    assert list(tmp_path.iterdir()) == [copy]


def test_what_is_there_already_stays(tmp_path, genome, tokenizer):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        build_corpus([genome], tokenizer, tmp_path / "corpus")
    assert [path.name for path in tmp_path.rglob("*")] == ["corpus", "mine.txt"]


def test_tokenizer_that_does_not_cover_the_bases(tmp_path, genome):
    vocab = {token: i for i, token in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "A", "C", "G"])}
    Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="[UNK]")).save(f"{tmp_path}/tokenizer.json")
    with pytest.raises(InputError, match=r"does not spell every run of A, C, G, T: .*record 0.*\[UNK\]"):
        build_corpus([genome], load_tokenizer(tmp_path), tmp_path / "corpus", validation_fraction=0.5)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    ("model", "cutter", "found"),
    [
        (models.Unigram([("A", -1.0), ("C", -1.0), ("G", -1.0), ("T", -1.0)]), None, "Unigram"),
        (models.BPE(vocab=dict(zip("ACGT", range(4))), merges=[], ignore_merges=True), None, "BPE with ignore_merges"),
        (
            models.BPE(vocab=dict(zip("ACGT", range(4))), merges=[]),
            pre_tokenizers.FixedLength(6),
            "one that cuts its input",
        ),
    ],
)
def test_tokenizer_whose_pieces_cannot_be_filled(tmp_path, genome, model, cutter, found):
    """Another cut of the text, or another merge, and a piece by itself would have other tokens."""
    backend = Tokenizer(model)
    backend.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"])
    if cutter is not None:
        backend.pre_tokenizer = cutter
    backend.save(f"{tmp_path}/tokenizer.json")
    with pytest.raises(InputError, match=f"piece_length auto: expected a tokenizer of plain BPE, found {found}"):
        build_corpus([genome], load_tokenizer(tmp_path), tmp_path / "corpus", piece_length="auto")
    assert not (tmp_path / "corpus").exists()


def test_vocabulary_beyond_uint16(tmp_path, genome):
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "A", "C", "G", "T"]
    vocab = {token: i for i, token in enumerate(special + [f"x{i}" for i in range(2**16)])}
    Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="[UNK]")).save(f"{tmp_path}/tokenizer.json")
    with pytest.raises(InputError, match="tokenizer: expected at most 65536 tokens.*found 65545"):
        build_corpus([genome], load_tokenizer(tmp_path), tmp_path / "corpus")


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["tokens", "offsets", "pieces"])
@pytest.mark.parametrize(
    ("damage", "verify"), [(cut, False), (cut, True), (flip, True), (Path.unlink, False), (empty, False)]
)
def test_damaged_shard_is_named(corpus_dir, part, damage, verify):
    damage(corpus_dir / f"train-00001.{part}.npy")
    with pytest.raises(InputError, match=rf"train-00001\.{part}\.npy: .*(missing|cut short|altered)"):
        Corpus.open(corpus_dir, verify=verify)


def test_shard_of_another_corpus_is_named(corpus_dir):
    (corpus_dir / "train-00001.tokens.npy").write_bytes((corpus_dir / "train-00000.tokens.npy").read_bytes())
    with pytest.raises(InputError, match=r"train-00001\.tokens\.npy: altered"):
        Corpus.open(corpus_dir)


def edit_manifest(corpus_dir, **changes):
    manifest = json.loads((corpus_dir / "manifest.json").read_text())
    (corpus_dir / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_manifest_that_does_not_fit(corpus_dir, tmp_path):
    edit_manifest(corpus_dir, format_version=2)
    with pytest.raises(InputError, match=r"\(dnazen-corpus of version 1\), found dnazen-corpus of version 2"):
        Corpus.open(corpus_dir)
    edit_manifest(corpus_dir, format_version=1, shards=[{"split": "train"}])
    with pytest.raises(InputError, match="manifest.json: altered"):
        Corpus.open(corpus_dir)
    edit_manifest(corpus_dir, shards=[])
    with pytest.raises(InputError, match="manifest.json: altered"):
        Corpus.open(corpus_dir)
    cut(corpus_dir / "manifest.json")
    with pytest.raises(InputError, match="manifest.json: expected the manifest of a corpus"):
        Corpus.open(corpus_dir)
    with pytest.raises(InputError, match="no such file; expected the manifest of a corpus"):
        Corpus.open(tmp_path)


def test_tokenizer_that_is_not_the_corpus_own(corpus_dir):
    train_tokenizer([random_bases(20_000, 7)], vocab_size=64).save_pretrained(corpus_dir / "tokenizer")
    with pytest.raises(InputError, match="tokenizer: altered"):
        Corpus.open(corpus_dir)


@pytest.mark.slow
def test_yeast_against_a_plain_count(tmp_path, shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizer")
    fasta = shared_data / "genomes" / "sacCer3.fa.gz"
    manifest = build_corpus([fasta], tokenizer, tmp_path / "corpus")
    raw = Tokenizer.from_file(str(shared_data / "tokenizer" / "tokenizer.json"))
    pieces = [
        run[start : start + 2040]
        for record in read_fasta(fasta)
        for run in re.split("[^ACGT]+", record.sequence)
        for start in range(0, len(run), 2040)
    ]
    encoded = [encoding.ids[1:-1] for encoding in raw.encode_batch([piece for piece in pieces if len(piece) >= 64])]
    corpus = Corpus.open(tmp_path / "corpus")
    assert manifest["totals"]["length"] == 12_157_105 and manifest["totals"]["records"] == 17
    assert manifest["totals"]["pieces_split"] == 0
    assert len(corpus.train) + len(corpus.validation) == len(encoded)
    # f = 0.01: ordinals 49, 149, 249, ... are held out.
    assert [split.tolist() for split in corpus.validation] == encoded[49::100]
    del encoded[49::100]
    assert all(np.array_equal(tokens, ids) for tokens, ids in zip(corpus.train, encoded, strict=True))
