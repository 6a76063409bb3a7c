"""The vocabulary file: both forms, every refusal, and whether it belongs to a corpus."""

import csv
import gzip
import itertools
import json

import numpy as np
import pytest

from dnazen.cli.main import main
from dnazen.data.corpus import Corpus, build_corpus
from dnazen.data.tokenizer import load_tokenizer, train_tokenizer
from dnazen.files import InputError, sha256_file
from dnazen.ngram.extract import extract_ngrams
from dnazen.ngram.vocab import NgramVocabulary, load_ngrams
from dnazen.pretraining.prepare import PACKAGED_GENOME

SMALL = {"max_tokens": 100, "validation_fraction": 0.1, "num_workers": 1}


def make_genome(seed: int) -> str:
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("ACGT"), 12)) for _ in range(30)]
    return "".join(words[i] for i in rng.integers(0, 30, 2000))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([make_genome(0)], vocab_size=64)


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("corpus")
    (path / "genome.fa").write_text(f">one\n{make_genome(0)}\n")
    build_corpus([path / "genome.fa"], tokenizer, path / "corpus", **SMALL)
    return path / "corpus"


@pytest.fixture
def ngrams_dir(tmp_path, corpus_dir):
    assert main(["ngrams", "--corpus", str(corpus_dir), "--output-dir", str(tmp_path / "ngrams")]) == 0
    return tmp_path / "ngrams"


def write(path, content):
    (path / "ngram.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_round_trip(tmp_path, tokenizer):
    vocabulary = NgramVocabulary([(9, 10), (5, 6, 7, 8, 5), (10, 9)], [3, 1, 7], max_ngrams=30)
    vocabulary.save_pretrained(tmp_path / "new", tokenizer)
    again = NgramVocabulary.from_pretrained(tmp_path / "new", tokenizer)
    assert dict(zip(again.ids, again.ngrams, strict=True)) == dict(zip(vocabulary.ids, vocabulary.ngrams, strict=True))
    assert again.max_ngrams == 30 and again.vocab_size == 8
    assert again.checksum == vocabulary.checksum
    assert again.checksum != NgramVocabulary(again.ngrams, again.ids, None).checksum
    assert NgramVocabulary.from_pretrained(tmp_path / "new" / "ngram.json", tokenizer) == again
    data = json.loads((tmp_path / "new" / "ngram.json").read_text())
    assert [data[key] for key in ("min_ngram_len", "max_ngram_len", "max_ngram_count", "pad_ngram_id")] == [2, 5, 30, 0]
    a, b = tokenizer.convert_ids_to_tokens([9, 10])
    assert data["vocab"][f"{a} {b}"] == 3


def test_published_form(tmp_path, shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizer")
    content = {"min_ngram_len": 2, "max_ngram_len": 5, "max_ngram_count": 30, "pad_ngram_id": 0}
    vocabulary = NgramVocabulary.from_pretrained(write(tmp_path, {**content, "vocab": {"TATAAA GG": 17}}), tokenizer)
    assert vocabulary.ngrams == [tuple(tokenizer.convert_tokens_to_ids(["TATAAA", "GG"]))]
    assert (vocabulary.ids, vocabulary.vocab_size, vocabulary.max_ngrams) == ([17], 18, 30)


def test_older_form(tmp_path, tokenizer, caplog):
    write(tmp_path, {"min_ngram_len": 2, "max_ngram_len": 5, "max_ngrams": 20, "vocab": {"9:10": 4, "5:6:7": 1}})
    vocabulary = NgramVocabulary.from_pretrained(tmp_path, tokenizer)
    assert vocabulary == NgramVocabulary([(9, 10), (5, 6, 7)], [4, 1], 20)
    assert not caplog.records


def test_older_form_with_id_0_is_shifted_and_says_so(tmp_path, tokenizer, caplog):
    write(tmp_path, {"max_ngrams": 20, "vocab": {"9:10": 0, "5:6:7": 1}})
    vocabulary = NgramVocabulary.from_pretrained(tmp_path, tokenizer)
    assert vocabulary == NgramVocabulary([(9, 10), (5, 6, 7)], [1, 2], 20)
    assert "every id of this older file is raised by one" in caplog.text


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "expected a G-gram vocabulary as JSON"),
        ({}, 'expected G-grams under "vocab", found None'),
        ({"vocab": {}}, 'expected G-grams under "vocab", found {}'),
        ({"vocab": [1]}, r'expected G-grams under "vocab", found \[1\]'),
        ({"vocab": {"A X": 1}}, "G-gram 'A X': expected tokens of the tokenizer, found another"),
        ({"vocab": {"A  C": 1}}, "G-gram 'A  C': expected tokens of the tokenizer"),
        ({"vocab": {"A [MASK]": 1}}, r"G-gram 'A \[MASK\]': expected ordinary tokens, found a special one"),
        ({"vocab": {"A": 1}}, "G-gram 'A': expected 2 to 5 tokens, found 1"),
        ({"vocab": {"A C A C A C": 1}}, "expected 2 to 5 tokens, found 6"),
        ({"vocab": {"A C": 1, "C A": 1}}, "G-gram 'C A': expected an id of its own, found 1, that of 'A C'"),
        ({"vocab": {"A C": 0}}, "G-gram 'A C': expected an id above 0, which is padding, found 0"),
        ({"vocab": {"A C": "1"}}, "expected an id above 0, which is padding, found '1'"),
        ({"vocab": {"A C": True}}, "expected an id above 0, which is padding, found True"),
        ({"vocab": {"A C": 1}, "pad_ngram_id": 1}, "expected pad_ngram_id 0, found 1"),
        ({"vocab": {"A C": 1}, "max_ngram_count": 0}, "a positive limit of G-grams per sequence or null, found 0"),
        ({"max_ngrams": 30, "vocab": {"5:99": 1}}, "G-gram '5:99': expected tokens of the tokenizer"),
        ({"max_ngrams": 30, "vocab": {"5:4": 1}}, "G-gram '5:4': expected ordinary tokens"),
        ({"max_ngrams": 30, "vocab": {"5:6": -1}}, "expected an id above 0, which is padding, found -1"),
    ],
)
def test_refusals_name_file_and_entry(tmp_path, tokenizer, content, message):
    with pytest.raises(InputError, match=message) as error:
        NgramVocabulary.from_pretrained(write(tmp_path, content), tokenizer)
    assert str(tmp_path / "ngram.json") in str(error.value)


def test_missing_file(tmp_path, tokenizer):
    with pytest.raises(InputError, match="no such file; expected a G-gram vocabulary"):
        NgramVocabulary.from_pretrained(tmp_path, tokenizer)


def test_table_of_too_large_a_tokenizer():
    with pytest.raises(InputError, match="need 68 bits, but a key has 63"):
        NgramVocabulary([(5, 6, 7, 8, 9)], [1]).table(5000)


def test_command_writes_what_extraction_finds(tmp_path, corpus_dir, tokenizer, capsys):
    ngrams_dir = tmp_path / "ngrams"
    assert main(["ngrams", "--corpus", str(corpus_dir), "--output-dir", str(ngrams_dir)]) == 0
    summary = capsys.readouterr().out
    corpus = Corpus.open(corpus_dir)
    extraction = extract_ngrams(corpus.train.shards, vocab_size=len(tokenizer))
    assert len(extraction.ngrams) > 5
    vocabulary = load_ngrams(ngrams_dir, corpus)
    assert vocabulary.ngrams == extraction.ngrams
    assert vocabulary.ids == list(range(1, len(extraction.ngrams) + 1))
    assert vocabulary.max_ngrams is None
    with open(ngrams_dir / "ngrams.tsv") as file:
        table = list(csv.DictReader(file, delimiter="\t"))
    assert [int(row["id"]) for row in table] == vocabulary.ids
    assert [int(row["count"]) for row in table] == extraction.counts
    assert [float(row["pmi"]) for row in table] == pytest.approx(extraction.pmis, abs=5e-5)  # four decimals
    for row, ngram in zip(table, extraction.ngrams, strict=True):
        assert row["tokens"].split() == tokenizer.convert_ids_to_tokens(ngram)
        assert row["bases"] == row["tokens"].replace(" ", "") and int(row["length"]) == len(ngram)
    manifest = json.loads((ngrams_dir / "manifest.json").read_text())
    assert manifest["parameters"]["min_pmi"] == 2.0
    assert manifest["corpus_checksums"] == [corpus.checksum]
    assert manifest["ngram_json_sha256"] == sha256_file(ngrams_dir / "ngram.json")
    assert manifest["statistics"]["num_tokens"] == corpus.train.num_tokens
    assert sum(manifest["statistics"]["num_ngrams_by_length"].values()) == len(table)
    assert f"{len(table):,} kept" in summary and table[0]["tokens"] in summary and "M tokens/s" in summary


def test_same_corpus_same_file(ngrams_dir, corpus_dir, tmp_path):
    arguments = ["ngrams", "--corpus", str(corpus_dir), "--output-dir", str(tmp_path / "again"), "--num-workers", "2"]
    assert main(arguments) == 0
    for name in ("ngram.json", "ngrams.tsv"):
        assert (tmp_path / "again" / name).read_bytes() == (ngrams_dir / name).read_bytes()


def test_command_options_reach_the_extraction(corpus_dir, tmp_path):
    options = "--min-pmi 1 --min-count 3 --min-pair-count 4 --min-len 3 --max-len 4 --long-pieces split".split()
    assert main(["ngrams", "--corpus", str(corpus_dir), "--output-dir", str(tmp_path / "n"), *options]) == 0
    expected = dict(min_pmi=1.0, min_count=3, min_pair_count=4, min_len=3, max_len=4, long_pieces="split")
    manifest = json.loads((tmp_path / "n" / "manifest.json").read_text())
    assert {name: manifest["parameters"][name] for name in expected} == expected
    corpus = Corpus.open(corpus_dir)
    extraction = extract_ngrams(corpus.train.shards, vocab_size=len(corpus.tokenizer), **expected)
    assert load_ngrams(tmp_path / "n", corpus).ngrams == extraction.ngrams


def test_no_ngrams_is_an_error_and_leaves_nothing(corpus_dir, tmp_path, capsys):
    target = tmp_path / "empty"
    assert main(["ngrams", "--corpus", str(corpus_dir), "--output-dir", str(target), "--min-count", "1000000"]) == 1
    assert "(now --min-pair-count 5 --min-count 1000000 --min-pmi 2.0)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_small_genome_is_told_what_to_do(tmp_path, capsys):
    """30 kb in 4,096 tokens: no pair of tokens is frequent. Each of the flags that the error names helps."""
    with gzip.open(PACKAGED_GENOME, "rt") as file:
        (tmp_path / "virus.fa").write_text("".join(itertools.islice(file, 430)))

    def dnazen(command: str) -> int:
        return main([str(tmp_path / word[1:]) if word.startswith("@") else word for word in command.split()])

    for size in ("4096", "512", "256"):
        assert dnazen(f"tokenizer --fasta @virus.fa --output-dir @t{size} --vocab-size {size}") == 0
        line = f"corpus --fasta @virus.fa --tokenizer @t{size} --output-dir @c{size} --validation-fraction 0.1"
        assert dnazen(line) == 0
    capsys.readouterr()
    assert dnazen("ngrams --corpus @c4096 --output-dir @n") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / 'c4096'}: none of 0 candidates from 5," in error
    assert "(now --min-pair-count 5 --min-count 5 --min-pmi 2.0)" in error
    assert "`dnazen tokenizer --vocab-size 256`" in error
    assert dnazen("ngrams --corpus @c512 --output-dir @n512") == 1
    assert dnazen("ngrams --corpus @c512 --output-dir @n512 --min-pair-count 2 --min-count 2") == 0
    assert dnazen("ngrams --corpus @c256 --output-dir @n256") == 0


def test_folder_that_holds_no_ngrams(corpus_dir, tmp_path):
    """A corpus given for the G-grams has a manifest too; it must not be taken for theirs."""
    corpus = Corpus.open(corpus_dir)
    nothing = "no ngram.json in it"
    for path, found in ((corpus_dir, nothing), (tmp_path, nothing), (tmp_path / "x", "no such file")):
        message = rf"{path}: expected G-grams \(a folder made by `dnazen ngrams`, or its ngram.json\), found {found}"
        with pytest.raises(InputError, match=message):
            load_ngrams(path, corpus)


def test_ngrams_given_for_the_corpus(ngrams_dir):
    with pytest.raises(InputError, match=f"{ngrams_dir}: expected a corpus made by `dnazen corpus`"):
        Corpus.open(ngrams_dir)


def test_existing_output_is_kept(ngrams_dir, corpus_dir, capsys):
    before = {file.name: file.read_bytes() for file in ngrams_dir.iterdir()}
    assert main(["ngrams", "--corpus", str(corpus_dir), "--output-dir", str(ngrams_dir)]) == 1
    assert "already exists" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in ngrams_dir.iterdir()} == before


def test_altered_file_is_refused(ngrams_dir, corpus_dir):
    data = json.loads((ngrams_dir / "ngram.json").read_text())
    data["vocab"].popitem()
    write(ngrams_dir, data)
    with pytest.raises(InputError, match="ngram.json: altered"):
        load_ngrams(ngrams_dir, Corpus.open(corpus_dir))


def test_another_tokenizer_is_refused(ngrams_dir, tmp_path):
    (tmp_path / "genome.fa").write_text(f">one\n{make_genome(1)}\n")
    build_corpus([tmp_path / "genome.fa"], train_tokenizer([make_genome(1)], 64), tmp_path / "other", **SMALL)
    with pytest.raises(InputError, match="expected a corpus with tokenizer .*, found .*other with"):
        load_ngrams(ngrams_dir, Corpus.open(tmp_path / "other"))


def test_another_corpus_with_the_same_tokenizer_is_taken(ngrams_dir, tmp_path, tokenizer, corpus_dir):
    (tmp_path / "genome.fa").write_text(f">one\n{make_genome(2)}\n")
    build_corpus([tmp_path / "genome.fa"], tokenizer, tmp_path / "other", **SMALL)
    other = load_ngrams(ngrams_dir, Corpus.open(tmp_path / "other"))
    assert other.checksum == load_ngrams(ngrams_dir, Corpus.open(corpus_dir)).checksum


def test_bare_file_is_taken(ngrams_dir, corpus_dir):
    corpus = Corpus.open(corpus_dir)
    assert load_ngrams(ngrams_dir / "ngram.json", corpus) == load_ngrams(ngrams_dir, corpus)
