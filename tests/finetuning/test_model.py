"""From sequences to logits: batches, truncation, other models, adapters."""

import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from dnazen.data.tokenizer import load_tokenizer, save_tokenizer
from dnazen.files import InputError
from dnazen.finetuning.adapters import add_adapters
from dnazen.finetuning.data import Table
from dnazen.finetuning.loading import checksum_weights, load_model
from dnazen.finetuning.logits import compute_logits
from dnazen.finetuning.preprocessing import PaddedPreprocessor, open_preprocessor
from dnazen.finetuning.tasks import Classification, PerBase
from dnazen.inference.loading import load_for_inference
from dnazen.models import DNAZenForMaskedLM, DNAZenForSequenceClassification, DNAZenForTokenClassification
from tests.finetuning.conftest import motif_row
from tests.helpers.published import write_dnabert2
from tests.helpers.sequences import random_bases

TASK = Classification(2)


def table_of(*rows: tuple[str, ...]) -> Table:
    return Table("t.csv", list(rows), None, list(range(len(rows))), 0)


@pytest.fixture(scope="module")
def sequences():
    rng = random.Random(3)
    return [(motif_row(rng)["sequence"] + random_bases(rng.randrange(60), rng),) for _ in range(64)]


def make(folder, task=TASK, **options):
    torch.manual_seed(0)
    preprocessor = open_preprocessor(folder, **options)
    return preprocessor, load_model(preprocessor, task).eval()


@pytest.mark.slow
@pytest.mark.parametrize("task", [Classification(2), PerBase(2)], ids=lambda task: task.kind)
def test_logits_do_not_depend_on_the_batch(model_folder, sequences, task):
    """Batches of 1 and of 64 differ by rounding in fp32, no more."""
    preprocessor, model = make(model_folder, task)
    ids = preprocessor.encode(table_of(*sequences), task).input_ids
    together = compute_logits(model, preprocessor, task, ids)
    for row, expected in zip(ids, together):
        (alone,) = compute_logits(model, preprocessor, task, [row])
        np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-5)
    assert max(np.ptp([logits.ravel()[0] for logits in together]), 0) > 1e-2  # the sequences do differ


@pytest.mark.parametrize("use_ngrams", [True, False])
def test_packed_logits_are_the_padded_ones(model_folder, sequences, use_ngrams):
    """Our batches against the same input padded the Hugging Face way, G-grams found by a plain search."""
    preprocessor, model = make(model_folder, use_ngrams=use_ngrams)
    ids = preprocessor.encode(table_of(*sequences), TASK).input_ids
    special = preprocessor.tokenizer
    rows = [[special.cls_token_id, *row.tolist(), special.sep_token_id] for row in ids]
    width, vocabulary = max(map(len, rows)), dict(zip(preprocessor.vocabulary.ngrams, preprocessor.vocabulary.ids))
    matches = []
    for row in rows:
        found: dict[tuple[int, ...], set[int]] = {}
        for start in range(len(row)):
            for length in (2, 3):
                if (ngram := tuple(row[start : start + length])) in vocabulary:
                    found.setdefault(ngram, set()).update(range(start, start + length))
        matches.append(found if use_ngrams else {})
    most = max(1, *map(len, matches))
    padded = {
        "input_ids": torch.tensor([row + [special.pad_token_id] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "ngram_input_ids": torch.zeros(len(rows), most, dtype=torch.long),
        "ngram_attention_mask": torch.zeros(len(rows), most, dtype=torch.long),
        "ngram_position_matrix": torch.zeros(len(rows), width, most),
    }
    for i, found in enumerate(matches):
        for j, (ngram, positions) in enumerate(found.items()):
            padded["ngram_input_ids"][i, j], padded["ngram_attention_mask"][i, j] = vocabulary[ngram], 1
            padded["ngram_position_matrix"][i, list(positions), j] = 1
    assert preprocessor.count_ngrams(ids) == [len(found) for found in matches] or not use_ngrams
    with torch.no_grad():
        expected = model(**padded).logits.numpy()
    np.testing.assert_allclose(np.stack(compute_logits(model, preprocessor, TASK, ids)), expected, rtol=0, atol=1e-5)


def test_what_is_too_long_is_cut_and_counted(model_folder, caplog):
    preprocessor = open_preprocessor(model_folder, max_length=8)
    long, short = "ACGT" * 30, "AC"
    encoded = preprocessor.encode(table_of((long,), (short,)), TASK)
    whole = preprocessor.tokenizer(long, add_special_tokens=False)["input_ids"]
    assert encoded.input_ids[0].tolist() == whole[:6] and encoded.num_truncated == 1
    assert "1 of 2 sequences are longer than 8 tokens" in caplog.text


def test_pairs_are_joined_by_sep_and_the_longer_is_cut(model_folder):
    preprocessor = open_preprocessor(model_folder, max_length=11)  # room for 8 tokens beside [CLS] and two [SEP]
    long, short = "ACGT" * 30, "AC"
    ids = {text: preprocessor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (long, short)}
    sep, n = preprocessor.tokenizer.sep_token_id, len(ids[short])
    encoded = preprocessor.encode(table_of((long, short), (short, long), (long, long), (short, short)), TASK)
    expected = [
        [*ids[long][: 8 - n], sep, *ids[short]], [*ids[short], sep, *ids[long][: 8 - n]],
        [*ids[long][:4], sep, *ids[long][:4]], [*ids[short], sep, *ids[short]],
    ]  # fmt: skip
    assert [row.tolist() for row in encoded.input_ids] == expected and encoded.num_truncated == 3


def test_bases_of_tokens_add_up_to_the_sequence(model_folder, sequences):
    task = PerBase(2)
    preprocessor = open_preprocessor(model_folder)
    encoded = preprocessor.encode(table_of(*sequences), task)
    for (text,), ids, bases in zip(sequences, encoded.input_ids, encoded.bases):
        assert bases.sum() == len(text) and len(bases) == len(ids) + 2 and bases[0] == bases[-1] == 0
        tokens = preprocessor.tokenizer.convert_ids_to_tokens(ids.tolist())
        assert [len(token) for token in tokens] == bases[1:-1].tolist()


@pytest.mark.parametrize("length, expected", [(2, "at least 3"), (0, "at least 3")])
def test_length_without_room(model_folder, length, expected):
    with pytest.raises(InputError, match=f"--max-length: expected {expected} tokens"):
        open_preprocessor(model_folder, max_length=length)


@pytest.mark.slow
def test_dnabert2_sees_tokens_alone(model_folder, tmp_path, sequences):
    tokenizer = load_tokenizer(model_folder)
    write_dnabert2(tmp_path / "dnabert2", vocab_size=len(tokenizer))
    save_tokenizer(tokenizer, tmp_path / "dnabert2")
    preprocessor, model = make(tmp_path / "dnabert2")
    assert isinstance(model, DNAZenForSequenceClassification) and model.config.ngram_vocab_size == 1
    ids = preprocessor.encode(table_of(*sequences), TASK).input_ids
    assert np.isfinite(compute_logits(model, preprocessor, TASK, ids)).all()


@pytest.fixture
def bert(model_folder, tmp_path):
    tokenizer = load_tokenizer(model_folder)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path / "bert")
    save_tokenizer(tokenizer, tmp_path / "bert")
    return tmp_path / "bert"


def test_other_encoders_are_padded_and_cut_to_their_positions(bert, sequences):
    preprocessor, model = make(bert)
    assert isinstance(preprocessor, PaddedPreprocessor) and preprocessor.max_length == 40
    ids = preprocessor.encode(table_of(*sequences, ("ACGT" * 50,)), TASK).input_ids
    assert max(map(len, ids)) == 40
    together = compute_logits(model, preprocessor, TASK, ids)
    with torch.no_grad():
        for row, logits in zip(ids, together):
            np.testing.assert_allclose(model(torch.from_numpy(row)[None]).logits[0].numpy(), logits, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="--max-length: expected 3 to 40 tokens"):
        open_preprocessor(bert, max_length=41)
    with pytest.raises(InputError, match="pairs need DNAZEN or DNABERT-2"):
        preprocessor.encode(table_of(("ACGT", "ACGT")), TASK)


def test_tokenizer_that_does_not_know_bases_is_refused(bert, sequences):
    """Without its files, with words of six bases, and with files that are none."""
    for file in bert.glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match="expected a tokenizer"):
        open_preprocessor(bert).encode(table_of(*sequences), TASK)
    (bert / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ACGTAC", "CCCCCC"]))
    with pytest.raises(InputError, match="64 of the 64 tokens of t.csv are unknown"):
        open_preprocessor(bert).encode(table_of(*sequences), TASK)
    (bert / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="expected a tokenizer"):
        open_preprocessor(bert).encode(table_of(*sequences), TASK)


def test_weights_of_other_encoders_are_all_there_or_refused(bert, caplog):
    """Every tensor renamed; the file cut; a model of no known type."""
    make(bert)
    assert "new, with random weights: classifier.bias, classifier.weight" in caplog.text
    with pytest.raises(InputError, match="2 are missing: classifier.bias, classifier.weight"):
        load_model(open_preprocessor(bert), TASK, may_lack_head=False)
    file = bert / "model.safetensors"
    whole, weights = file.read_bytes(), load_file(file)
    save_file({f"x.{name}": tensor for name, tensor in weights.items()}, file, {"format": "pt"})
    with pytest.raises(InputError, match=f"are missing: bert.embeddings.*, .*, {re.escape('...')}$"):
        make(bert)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=f"{bert}: expected an encoder that transformers knows, found none: "):
        make(bert)
    (bert / "config.json").write_text('{"model_type": "unheard"}')
    with pytest.raises(InputError, match=f"{bert}: expected a"):
        make(bert)


def test_positions_that_begin_after_the_padding(bert):
    """RoBERTa's table is longer than its sequences; the longest that is taken runs."""
    tokenizer = load_tokenizer(bert)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(bert)
    preprocessor, model = make(bert)
    assert preprocessor.max_length == 40 - tokenizer.pad_token_id - 1
    ids = preprocessor.encode(table_of(("ACGT" * 50,)), TASK).input_ids
    assert len(ids[0]) == preprocessor.max_length and np.isfinite(compute_logits(model, preprocessor, TASK, ids)).all()


def test_adapters_sit_on_every_attention_and_the_head_is_trained_whole(model_folder, bert):
    _, model = make(model_folder)
    adapted = add_adapters(model, 4, 8, 0.0, None)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    layers = [f"encoder.layer.{i}.attention.self.Wqkv" for i in range(2)]
    layers += [f"encoder.ngram_layers.0.attention.self.{name}" for name in ("query", "key", "value")]
    for layer in layers:
        assert sum(f"{layer}.lora_" in name for name in trained) == 2, layer
    rest = {name for name in trained if "lora_" not in name}
    assert len(rest) == 4 and all("classifier" in name or "pooler" in name for name in rest)
    _, model = make(bert)
    trained = [name for name, p in add_adapters(model, 4, 8, 0.0, None).named_parameters() if p.requires_grad]
    assert sum("lora_" in name for name in trained) == 2 * 2 * 6  # two layers of six linear maps
    assert not any("classifier" in name and "lora_" in name for name in trained)
    with pytest.raises(InputError, match="--lora-target-modules: expected names of layers, found nothing"):
        add_adapters(make(model_folder)[1], 4, 8, 0.0, ["nothing"])


def test_checksum_is_of_all_that_makes_the_logits(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    found = {checksum_weights(model_folder)}
    for name in ("config.json", "tokenizer.json", "ngram.json", "model.safetensors"):
        with open(folder / name, "ab") as file:
            file.write(b" ")
        found.add(checksum_weights(folder))
    assert len(found) == 5


def test_token_classification(model_folder, tmp_path):
    preprocessor, model = make(model_folder, PerBase(3))
    assert isinstance(model, DNAZenForTokenClassification)
    ids = preprocessor.encode(table_of(("ACGTTGCA" * 5,), ("TTGACA",)), TASK).input_ids
    batch = preprocessor.make_collator()(ids)
    labels = torch.randint(0, 3, batch["input_ids"].shape)
    labels[batch["cu_seqlens"][:-1].long()] = -100
    outputs = model(**batch, labels=labels)
    expected = torch.nn.functional.cross_entropy(outputs.logits, labels)
    torch.testing.assert_close(outputs.loss, expected)
    model.save_pretrained(tmp_path / "saved")
    loaded = DNAZenForTokenClassification.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(loaded(**batch).logits, outputs.logits, rtol=0, atol=0)
    weights = model.state_dict()
    del weights["classifier.weight"], weights["classifier.bias"]
    model.save_pretrained(tmp_path / "headless", state_dict=weights)
    with pytest.raises(InputError, match="missing: classifier.bias, classifier.weight"):
        DNAZenForTokenClassification.from_pretrained(tmp_path / "headless")


def test_a_model_pretrained_without_ngrams_is_used_without(model_folder, sequences, tmp_path):
    """Whatever lies beside its weights, and whatever is asked for; and what is saved says so too."""
    shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "use_ngrams": False}))
    rows = table_of(*sequences[:8])
    (hidden, model), (never, its) = make(model_folder, use_ngrams=False), make(tmp_path / "model", use_ngrams=True)
    assert not never.use_ngrams and not its.config.use_ngrams and not model.config.use_ngrams
    ids = hidden.encode(rows, TASK).input_ids
    expected, found = compute_logits(model, hidden, TASK, ids), compute_logits(its, never, TASK, ids)
    np.testing.assert_array_equal(found, expected)
    seen, other = make(model_folder)
    assert not np.array_equal(compute_logits(other, seen, TASK, ids), expected)
    loaded = load_for_inference(str(tmp_path / "model"), DNAZenForMaskedLM)
    assert loaded.collator.use_ngrams is False
