"""Tokenizers: trained like DNABERT-2's, loaded from disk, told apart by their models."""

import gzip
import hashlib
import json
import shutil
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers

from dnazen.data.corpus import Corpus, build_corpus
from dnazen.data.fasta import read_fasta
from dnazen.data.tokenizer import choose_vocab_size, load_tokenizer, tokenizer_checksum, train_tokenizer
from dnazen.files import InputError
from tests.helpers.sequences import random_bases, write_fasta


@pytest.fixture(scope="module")
def small_tokenizer():
    return train_tokenizer([random_bases(20_000)], vocab_size=64)


def test_trained_like_dnabert2(small_tokenizer, shared_data):
    ours = json.loads(small_tokenizer.backend_tokenizer.to_str())
    theirs = json.loads((shared_data / "tokenizer" / "tokenizer.json").read_text())
    for section in theirs.keys() - {"model", "normalizer"}:
        assert ours[section] == theirs[section], section
    assert theirs["normalizer"] is None
    for setting in ("type", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk"):
        assert ours["model"][setting] == theirs["model"][setting], setting
    assert list(ours["model"]["vocab"])[:9] == list(theirs["model"]["vocab"])[:9]


def test_roles_and_template(small_tokenizer):
    tokenizer = small_tokenizer
    assert [tokenizer.unk_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id] == [0, 1, 2]
    assert [tokenizer.pad_token_id, tokenizer.mask_token_id] == [3, 4]
    ids = tokenizer("ACGTACGT")["input_ids"]
    assert ids[0] == 1 and ids[-1] == 2 and "".join(tokenizer.convert_ids_to_tokens(ids[1:-1])) == "ACGTACGT"


def test_training_ignores_what_is_not_acgt():
    runs = [random_bases(3000, seed) for seed in range(4)]
    assert tokenizer_checksum(train_tokenizer(runs, 64)) == tokenizer_checksum(train_tokenizer(["NNNN".join(runs)], 64))


@pytest.mark.slow
def test_training_twice_gives_the_same_file(tmp_path, root):
    sequences = [record.sequence[:300_000] for record in read_fasta(next((root / "dnazen/data/genomes").glob("*.gz")))]
    for name in ("a", "b"):
        train_tokenizer(sequences, 512).save_pretrained(tmp_path / name)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


def test_tandem_repeats_do_not_grow_without_end():
    tokenizer = train_tokenizer(["ACGTTGCA" * 5000 + random_bases(50_000)], 512)
    assert max(map(len, set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))) <= 32


def test_large_text_is_sampled(monkeypatch):
    monkeypatch.setattr("dnazen.data.tokenizer._MAX_TRAINING_BASES", 2040 * 10)
    # Ten words fit, so of 150 every 16th is kept; the others, all T, would change the merges.
    words = [random_bases(2040, i) if i % 16 == 0 else "T" * 2040 for i in range(150)]
    sampled = train_tokenizer(["".join(words)], 64)
    assert tokenizer_checksum(sampled) == tokenizer_checksum(train_tokenizer(words[::16], 64))


def test_too_little_text_gives_fewer_tokens_and_says_so(caplog):
    assert len(train_tokenizer(["ACGTACGT"], 4096)) < 20
    assert "tokens of the 4096 asked for" in caplog.text


@pytest.mark.parametrize("vocab_size", [8, 4097])
def test_vocab_size_out_of_range(vocab_size):
    with pytest.raises(InputError, match=f"vocab_size: expected 9 .* to 4096 .*found {vocab_size}"):
        train_tokenizer(["ACGT"], vocab_size)
    assert len(train_tokenizer(["ACGTACGT"], 9)) == 9


@pytest.mark.parametrize(
    ("num_bases", "size"),
    [(0, 256), (30_000, 256), (1_800_000, 256), (1_820_000, 512), (4_938_920, 1024), (12_157_105, 2048), (10**8, 4096)],
)
def test_vocab_size_follows_the_length_of_the_text(num_bases, size):
    """The power of two whose ratio to a token for each 5,000 bases is nearest to 1; 256 and 512 meet at their mean."""
    assert choose_vocab_size(num_bases) == size


def test_vocab_size_by_default():
    assert len(train_tokenizer([random_bases(300_000)])) == 256


def test_nothing_to_train_on():
    with pytest.raises(InputError, match="no A, C, G or T"):
        train_tokenizer(["NNNN"])


def test_dnabert2_loads_as_it_is(shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizer")
    raw = Tokenizer.from_file(str(shared_data / "tokenizer" / "tokenizer.json"))
    sequence = random_bases(30_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer(sequence)["input_ids"] == raw.encode(sequence).ids
    assert len(tokenizer) == raw.get_vocab_size() == 4096 and tokenizer.mask_token_id == 4
    from_file = load_tokenizer(shared_data / "tokenizer" / "tokenizer.json")
    assert tokenizer_checksum(from_file) == tokenizer_checksum(tokenizer)


def test_checksum_survives_saving_and_tells_models_apart(tmp_path, shared_data, small_tokenizer):
    tokenizer = load_tokenizer(shared_data / "tokenizer")
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_checksum(load_tokenizer(tmp_path)) == tokenizer_checksum(tokenizer)
    assert tokenizer_checksum(small_tokenizer) != tokenizer_checksum(tokenizer)


def test_a_length_limit_in_the_file_does_not_cut(tmp_path, small_tokenizer):
    backend = Tokenizer.from_str(small_tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(8)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 8}')
    sequence = random_bases(500)
    assert load_tokenizer(tmp_path)(sequence)["input_ids"] == small_tokenizer(sequence)["input_ids"]


def test_missing_special_tokens_are_named(tmp_path):
    vocab = {"[UNK]": 0, "[SEP]": 1, "[PAD]": 2, "A": 3}
    Tokenizer(models.BPE(vocab=vocab, merges=[])).save(f"{tmp_path}/tokenizer.json")
    with pytest.raises(InputError, match=r"no cls_token \(\[CLS\]\), mask_token \(\[MASK\]\)"):
        load_tokenizer(tmp_path)


def test_bpe_dropout_is_refused(tmp_path, small_tokenizer):
    saved = json.loads(small_tokenizer.backend_tokenizer.to_str())
    saved["model"]["dropout"] = 0.1
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(InputError, match="without BPE dropout, found 0.1"):
        load_tokenizer(tmp_path)


def test_what_is_no_tokenizer(tmp_path, shared_data):
    with pytest.raises(InputError, match="no such file; expected a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        load_tokenizer("zhihan1996/DNABERT-2-117M")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="expected a tokenizer.json of the tokenizers library"):
        load_tokenizer(tmp_path)
    shutil.copy(shared_data / "tokenizer" / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match="tokenizer_config.json: expected a tokenizer's configuration"):
        load_tokenizer(tmp_path)


# --- lower case ------------------------------------------------------------------------------------------------------


def old_tokenizer(folder, tokenizer):
    """A tokenizer without a normalizer, as they used to be: the folder of its file, and how the library reads it."""
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    saved["normalizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    return folder, Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_soft_masked_genome_has_the_tokens_of_its_bases(shared_data):
    """Real text of UCSC, with repeats in lower case, on stretches without N, by DNABERT-2's published tokenizer."""
    tokenizer = load_tokenizer(shared_data / "tokenizer")
    raw = Tokenizer.from_file(str(shared_data / "tokenizer" / "tokenizer.json"))
    with gzip.open(shared_data / "genomes" / "ucsc.hg19.chr20.unittest.fasta.gz", "rt") as file:
        text = "".join(line.strip() for line in file if ">" not in line and "N" not in line)
    pieces = [text[i : i + 2000] for i in range(0, len(text), 2000)]
    pieces = [piece for piece in pieces if not set(piece) - set("ACGTacgt")][:100]
    masked = [piece for piece in pieces if not piece.isupper()]
    assert len(masked) > 20 and any(not piece.islower() for piece in masked)
    assert raw.token_to_id("[UNK]") in raw.encode(masked[0]).ids  # the premise
    for piece in pieces:
        found, expected = tokenizer.backend_tokenizer.encode(piece), raw.encode(piece.upper())
        assert (found.ids, found.offsets) == (expected.ids, expected.offsets)


@settings(deadline=None)
@given(st.text(alphabet="ACGTUacgtuNnRry-. ", max_size=80))
def test_letter_by_letter(small_tokenizer, text):
    """Lower case and U have the tokens and the offsets of upper case and T; other letters stay what they were."""
    plain = Tokenizer.from_str(small_tokenizer.backend_tokenizer.to_str())
    plain.normalizer = None
    upper = text.translate(str.maketrans("acgtuU", "ACGTTT"))
    found, expected = small_tokenizer.backend_tokenizer.encode(text), plain.encode(upper)
    assert (found.ids, found.offsets) == (expected.ids, expected.offsets)
    (fast,) = small_tokenizer.backend_tokenizer.encode_batch_fast([text])
    assert fast.ids == expected.ids


def test_special_tokens_between_lower_case(small_tokenizer):
    ids = small_tokenizer("acg[MASK]acg", add_special_tokens=False)["input_ids"]
    half = small_tokenizer("ACG", add_special_tokens=False)["input_ids"]
    assert ids == [*half, small_tokenizer.mask_token_id, *half]


def test_tokenizer_without_normalizer_gets_it(tmp_path, small_tokenizer):
    """Its file keeps its checksum and its tokens, and what is saved of it has the normalizer."""
    folder, raw = old_tokenizer(tmp_path, small_tokenizer)
    loaded = load_tokenizer(folder)
    assert tokenizer_checksum(loaded) == tokenizer_checksum(small_tokenizer)
    sequence = random_bases(3000, 5)
    assert loaded(sequence)["input_ids"] == loaded(sequence.lower())["input_ids"] == raw.encode(sequence).ids
    loaded.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "tokenizer.json").read_text())
    assert saved == json.loads(small_tokenizer.backend_tokenizer.to_str())


def test_checksum_is_the_one_that_was_always_recorded(shared_data):
    """SHA-256 of the file's model alone, so that what was made with an old tokenizer.json still fits."""
    raw = Tokenizer.from_file(str(shared_data / "tokenizer" / "tokenizer.json"))
    model = json.loads(raw.to_str())["model"]
    expected = hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()
    assert tokenizer_checksum(load_tokenizer(shared_data / "tokenizer")) == expected


def test_another_normalizer_stays(tmp_path, small_tokenizer):
    backend = Tokenizer.from_str(small_tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert isinstance(load_tokenizer(tmp_path).backend_tokenizer.normalizer, normalizers.NFC)


def test_corpus_of_an_old_tokenizer_is_read_and_gone_on_with(tmp_path, small_tokenizer):
    """Same tokens, same checksum, whether the corpus' own copy has the normalizer or not."""
    folder, _ = old_tokenizer(tmp_path, small_tokenizer)
    path = write_fasta(tmp_path / "a.fa", {"a": random_bases(9000, 3).lower()})
    for name, tokenizer in (("old", load_tokenizer(folder)), ("new", small_tokenizer)):
        build_corpus([path], tokenizer, tmp_path / name, max_tokens=50, validation_fraction=0.1)
    shutil.copy(folder / "tokenizer.json", tmp_path / "old" / "tokenizer" / "tokenizer.json")
    old, new = Corpus.open(tmp_path / "old"), Corpus.open(tmp_path / "new")
    assert old.checksum == new.checksum
