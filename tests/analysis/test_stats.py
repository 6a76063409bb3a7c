"""`dnazen ngrams stats` against counting one by one in plain Python, on real data and on made-up data."""

import collections
import csv
import json
import math
import random

import numpy as np
import pytest

from dnazen.analysis import stats_counts
from dnazen.analysis.stats import build_statistics
from dnazen.analysis.stats_counts import collect_statistics, find_sources
from dnazen.cli.main import main
from dnazen.data.corpus import Corpus, build_corpus
from dnazen.data.tables import read_sequences
from dnazen.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from dnazen.files import InputError
from dnazen.ngram.vocab import NgramVocabulary, open_ngrams
from tests.helpers.sequences import write_sequences

PICTURES = ("lengths.png", "rank_frequency.png", "pmi.png", "coverage.png", "heatmap.png")


def make_sequences(seed: int, number: int) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices("ACGT", k=12)) for _ in range(20)]
    return ["".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(number)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(make_sequences(0, 200), vocab_size=100)


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("corpus")
    lines = (f">{i}\n{sequence}\n" for i, sequence in enumerate(make_sequences(0, 400)))
    (path / "genome.fa").write_text("".join(lines))
    options = {"max_tokens": 60, "min_length": 12, "validation_fraction": 0.1, "num_workers": 1}
    build_corpus([path / "genome.fa"], tokenizer, path / "corpus", **options)
    return path / "corpus"


@pytest.fixture(scope="module")
def ngrams_dir(tmp_path_factory, corpus_dir):
    path = tmp_path_factory.mktemp("ngrams") / "ngrams"
    assert main(["ngrams", "--corpus", str(corpus_dir), "--output-dir", str(path), "--min-pmi", "0.5"]) == 0
    return path


@pytest.fixture
def data_dir(tmp_path):
    """A folder like GUE's: two groups of data sets, three splits, some of them compressed."""
    for seed, (name, size) in enumerate({"tf/0": 50, "tf/1": 30, "mouse/0": 40}.items()):
        write_sequences(tmp_path / "gue" / name / "train.csv", make_sequences(seed, size))
        write_sequences(tmp_path / "gue" / name / "test.csv.gz", make_sequences(seed + 10, size // 2))
    (tmp_path / "gue" / "tf" / "0" / "train.csv.md5").write_text("no table")
    return tmp_path / "gue"


class Plain:
    """Everything that is counted, one token at a time."""

    def __init__(self, vocabulary: NgramVocabulary):
        self.vocabulary = set(vocabulary.ngrams)
        self.tokens, self.pairs = collections.Counter(), collections.Counter()

    def count(self, sequences: list[list[int]]) -> dict:
        per_ngram, covered = collections.Counter(), 0
        for ids in sequences:
            self.tokens.update(ids)
            self.pairs.update(zip(ids, ids[1:], strict=False))
            places = [
                (start, length)
                for start in range(len(ids))
                for length in range(2, 6)
                if start + length <= len(ids) and tuple(ids[start : start + length]) in self.vocabulary
            ]
            per_ngram.update({tuple(ids[start : start + length]) for start, length in places})
            covered += len({start + i for start, length in places for i in range(length)})
        return {
            "instances": len(sequences),
            "tokens": sum(map(len, sequences)),
            "covered_tokens": covered,
            "total": sum(per_ngram.values()),
            "distinct": len(per_ngram),
            "counts": per_ngram,
        }

    def pmi(self, ngram: tuple[int, ...]) -> float:
        """Of the weakest pair, in bits; nan where a pair was not seen."""
        bits = []
        for pair in zip(ngram, ngram[1:], strict=False):
            if not self.pairs[pair]:
                return math.nan
            p_a, p_b = (self.tokens[token] / self.tokens.total() for token in pair)
            bits.append(math.log2(self.pairs[pair] / self.pairs.total() / p_a / p_b))
        return min(bits)


def assert_equals_plain(found, sources, vocabulary, tokenizer):
    plain, counts = Plain(vocabulary), collections.defaultdict(collections.Counter)
    assert len(found.splits) == len(sources)
    for split, source in zip(found.splits, sources, strict=True):
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in read_sequences(source.path)]
        expected = plain.count(ids)
        counts[source.dataset] += expected.pop("counts")
        assert {name: getattr(split, name) for name in expected} == expected
        assert split.average == expected["total"] / expected["instances"]
        assert split.unknown_tokens == sum(sequence.count(tokenizer.unk_token_id) for sequence in ids)
    assert set(found.counts) == set(counts)
    for dataset, values in found.counts.items():
        assert dict(zip(vocabulary.ngrams, values.tolist(), strict=True)) == {
            ngram: counts[dataset][ngram] for ngram in vocabulary.ngrams
        }
    # a few logarithms below 20 in size, each to a few units of 2^-53 of its size
    expected = [plain.pmi(ngram) for ngram in vocabulary.ngrams]
    assert found.pmis.tolist() == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.slow
def test_real_data_equals_plain_counting(shared_data, tmp_path):
    """G-grams of human promoters in GUE's mouse sets and core promoters, with DNABERT-2's tokenizer."""
    tokenizer = load_tokenizer(shared_data / "tokenizer")
    promoters = read_sequences(shared_data / "gue" / "prom" / "prom_300_tata" / "train.csv.gz")
    (tmp_path / "a.fa").write_text("".join(f">{i}\n{sequence}\n" for i, sequence in enumerate(promoters)))
    build_corpus([tmp_path / "a.fa"], tokenizer, tmp_path / "corpus", num_workers=1)
    arguments = ["--corpus", str(tmp_path / "corpus"), "--output-dir", str(tmp_path / "ngrams")]
    assert main(["ngrams", *arguments]) == 0
    vocabulary, tokenizer = open_ngrams(tmp_path / "ngrams")
    gue = shared_data / "gue"
    sources = find_sources([gue / "mouse" / "3", gue / "mouse" / "2", gue / "prom" / "prom_core_tata"])
    assert [(source.dataset, source.split) for source in sources] == [
        (dataset, split) for dataset in ("2", "3", "prom_core_tata") for split in ("train", "dev", "test")
    ]
    found = collect_statistics(sources, vocabulary, tokenizer)
    assert sum(split.total for split in found.splits) > 5_000
    assert_equals_plain(found, sources, vocabulary, tokenizer)


@pytest.mark.parametrize("batch", [(1, 1), (7, 100), (2048, 1 << 18)], ids=str)
def test_made_up_data_equals_plain_counting(monkeypatch, data_dir, ngrams_dir, batch):
    monkeypatch.setattr(stats_counts, "_BATCH_SEQUENCES", batch[0])
    monkeypatch.setattr(stats_counts, "_BATCH_TOKENS", batch[1])
    write_sequences(data_dir / "tf" / "1" / "other.csv", ["AC", "A", "NNNNACGTNN", "acgtACGT", "ACGUACGU"])
    vocabulary, tokenizer = open_ngrams(ngrams_dir)
    sources = find_sources([data_dir])
    found = collect_statistics(sources, vocabulary, tokenizer)
    assert_equals_plain(found, sources, vocabulary, tokenizer)
    assert sum(split.unknown_tokens for split in found.splits) > 0


@pytest.mark.parametrize("batch_tokens", [1, 200, 1 << 18])
def test_corpus_equals_its_sequences_one_by_one(monkeypatch, corpus_dir, ngrams_dir, batch_tokens):
    monkeypatch.setattr(stats_counts, "_BATCH_TOKENS", batch_tokens)
    vocabulary, tokenizer = open_ngrams(ngrams_dir)
    found = collect_statistics(find_sources([corpus_dir]), vocabulary, tokenizer)
    corpus = Corpus.open(corpus_dir)
    plain, total = Plain(vocabulary), collections.Counter()
    for split, tokens in zip(found.splits, (corpus.train, corpus.validation), strict=True):
        expected = plain.count([tokens[i].tolist() for i in range(len(tokens))])
        total += expected.pop("counts")
        assert {name: getattr(split, name) for name in expected} == expected
    assert [split.split for split in found.splits] == ["train", "validation"]
    assert found.counts["corpus"].tolist() == [total[ngram] for ngram in vocabulary.ngrams]
    assert found.pmis.tolist() == pytest.approx([plain.pmi(n) for n in vocabulary.ngrams], abs=1e-12, nan_ok=True)


@pytest.mark.slow
def test_command_writes_tables_and_pictures(data_dir, corpus_dir, ngrams_dir, tmp_path, capsys):
    output = tmp_path / "stats"
    arguments = ["--ngrams", str(ngrams_dir), "--data", str(data_dir), str(corpus_dir), "--output-dir", str(output)]
    assert main(["ngrams", "stats", *arguments]) == 0
    printed = capsys.readouterr().out
    with open(output / "stats.csv") as file:
        rows = list(csv.DictReader(file))
    names = [(row["group"], row["dataset"], row["split"]) for row in rows]
    assert names == [
        ("corpus", "corpus", "train"),
        ("corpus", "corpus", "validation"),
        ("mouse", "mouse/0", "train"),
        ("mouse", "mouse/0", "test"),
        *(("tf", f"tf/{i}", split) for i in (0, 1) for split in ("train", "test")),
    ]
    lines = [line.split() for line in printed.splitlines()]
    for row in rows:
        (line,) = [line for line in lines if line[:2] == [row["dataset"], row["split"]]]
        numbers = [f"{int(row[name]):,}" for name in ("instances", "tokens", "total", "distinct")]
        assert line[2:] == [*numbers, f"{float(row['average']):.1f}", line[7], "%"]
        assert float(line[7]) == pytest.approx(100 * int(row["covered_tokens"]) / int(row["tokens"]), abs=0.051)
    with open(output / "ngrams.csv") as file:
        table = list(csv.DictReader(file))
    with open(ngrams_dir / "ngrams.tsv") as file:
        assert [row["tokens"] for row in table] == [row["tokens"] for row in csv.DictReader(file, delimiter="\t")]
    for dataset in ("corpus", "mouse/0", "tf/0", "tf/1"):
        total = sum(int(row["total"]) for row in rows if row["dataset"] == dataset)
        assert sum(int(row[dataset]) for row in table) == total > 0
    for name in PICTURES:
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["ngrams"]["num_ngrams"] == len(table)
    assert manifest["sources"][-1]["path"] == str(data_dir / "tf" / "1" / "test.csv.gz")


def test_pmi_in_the_corpus_itself_is_that_of_the_extraction(corpus_dir, ngrams_dir):
    """Where all data are the training split, PMI is what `dnazen ngrams` wrote, to its four decimals."""
    vocabulary, tokenizer = open_ngrams(ngrams_dir)
    found = collect_statistics(find_sources([corpus_dir])[:1], vocabulary, tokenizer)
    with open(ngrams_dir / "ngrams.tsv") as file:
        written = [float(row["pmi"]) for row in csv.DictReader(file, delimiter="\t")]
    assert found.pmis.tolist() == pytest.approx(written, abs=5.1e-5)


@pytest.mark.slow
def test_data_in_which_no_ngram_occurs(ngrams_dir, tmp_path):
    path = write_sequences(tmp_path / "a" / "b" / "train.csv", ["A", "AC"])
    found = build_statistics(ngrams_dir, [path], tmp_path / "stats")
    assert [(split.dataset, split.split, split.total, split.average) for split in found.splits] == [
        ("a/b", "train", 0, 0.0)
    ]
    assert np.isnan(found.pmis).all()
    assert all((tmp_path / "stats" / name).is_file() for name in PICTURES)


def test_refusals_leave_nothing_behind(data_dir, ngrams_dir, tmp_path, tokenizer):
    def message(*data, **options) -> str:
        with pytest.raises(InputError) as error:
            build_statistics(options.pop("ngrams", ngrams_dir), data, tmp_path / "stats", **options)
        assert not (tmp_path / "stats").exists()
        return str(error.value)

    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'absent'}: expected a CSV file, a folder of them, or a corpus" in message(tmp_path / "absent")
    assert f"{tmp_path / 'empty'}: expected CSV files in this folder" in message(tmp_path / "empty")
    twice = message(data_dir / "tf", data_dir / "mouse")
    assert "expected data sets of different names, found 0 " in twice and str(data_dir / "mouse" / "0") in twice
    bad = write_sequences(data_dir / "tf" / "9" / "train.csv", ["ACGT", "", "ACGT"])
    assert f"{bad}: line 3: expected a sequence, found nothing" in message(data_dir)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "ngram.json").write_bytes((ngrams_dir / "ngram.json").read_bytes())
    bare = {"ngrams": tmp_path / "bare" / "ngram.json"}
    assert "expected tokenizer.json beside the G-grams, or its folder named with --tokenizer" in message(bad, **bare)
    save_tokenizer(train_tokenizer(make_sequences(5, 50), 60), tmp_path / "other")
    assert "expected the tokenizer" in message(bad, tokenizer=tmp_path / "other")


@pytest.mark.slow
def test_bare_ngrams_with_a_named_tokenizer(data_dir, ngrams_dir, tmp_path):
    (tmp_path / "bare.json").write_bytes((ngrams_dir / "ngram.json").read_bytes())
    found = build_statistics(tmp_path / "bare.json", [data_dir], tmp_path / "a", tokenizer=ngrams_dir)
    assert found.splits == collect_statistics(find_sources([data_dir]), *open_ngrams(ngrams_dir)).splits


def test_corpus_of_another_tokenizer(ngrams_dir, tmp_path):
    other = train_tokenizer(make_sequences(5, 50), 60)
    (tmp_path / "a.fa").write_text(f">a\n{''.join(make_sequences(5, 50))}\n")
    build_corpus([tmp_path / "a.fa"], other, tmp_path / "c", max_tokens=50, validation_fraction=0.2, num_workers=1)
    with pytest.raises(InputError, match="c: expected a corpus with tokenizer .*, found"):
        build_statistics(ngrams_dir, [tmp_path / "c"], tmp_path / "stats")
