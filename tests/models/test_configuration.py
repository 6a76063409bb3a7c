"""DNAZenConfig: sizes, what is refused and how it is said, what published configurations carry."""

import json

import pytest
import torch

from dnazen.files import InputError
from dnazen.models import SIZES, DNAZenConfig, DNAZenForMaskedLM, DNAZenModel


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("hidden_size", 0, "an integer of at least 1"),
        ("hidden_size", 100, "a multiple of num_attention_heads 12"),
        ("num_hidden_layers", True, "an integer of at least 1"),
        ("num_attention_heads", 12.0, "an integer of at least 1"),
        ("vocab_size", "4096", "an integer of at least 1"),
        ("num_hidden_ngram_layers", 13, "at most num_hidden_layers 12"),
        ("max_ngram_count", 0, "None or an integer of at least 1"),
        ("hidden_dropout_prob", 1.0, "a number in [0, 1)"),
        ("hidden_dropout_prob", None, "a number in [0, 1)"),
        ("classifier_dropout", -0.1, "a number in [0, 1)"),
        ("attention_probs_dropout_prob", 0.1, "0 (no attention dropout)"),
        ("layer_norm_eps", 0, "a number above 0"),
        ("initializer_range", "0.02", "a number above 0"),
        ("mask_token_id", 4096, "None or an id below vocab_size 4096"),
        ("tie_word_embeddings", 1, "true or false"),
        ("impl", "cuda", "'auto', 'triton' or 'reference'"),
        ("hidden_act", "relu", "'gelu'"),
    ],
)
def test_a_bad_field_is_named_with_what_was_expected_and_found(field, value, expected):
    with pytest.raises(InputError) as error:
        DNAZenConfig(**{field: value})
    assert str(error.value) == f"configuration: {field}: expected {expected}, found {value!r}"


def test_unknown_keys_are_all_named(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"hidden_size": 768, "hiden_size": 768, "layers": 2}))
    with pytest.raises(InputError, match=r"model\.json: .* found unknown hiden_size, layers$"):
        DNAZenConfig.from_size(path)
    with pytest.raises(InputError, match="tiny: .* found unknown num_layers$"):
        DNAZenConfig.from_size("tiny", num_layers=2)


def test_neither_size_nor_file():
    with pytest.raises(InputError, match=r"huge: no such file; expected a model size \(tiny, base, large, xlarge\)"):
        DNAZenConfig.from_size("huge")


def test_published_configuration_is_accepted(tmp_path):
    published = {
        "_name_or_path": "", "alibi_starting_size": 512, "architectures": ["BertForMaskedLM"],
        "attention_probs_dropout_prob": 0.0, "auto_map": {"AutoConfig": "x"}, "classifier_dropout": None,
        "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
        "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_ngram_count": 30,
        "max_position_embeddings": 512, "model_type": "bert", "ngram_vocab_size": 162708, "num_attention_heads": 12,
        "num_hidden_layers": 12, "num_hidden_ngram_layers": 6, "pad_token_id": 0,
        "position_embedding_type": "absolute", "torch_dtype": "float32", "transformers_version": "4.28.0",
        "type_vocab_size": 2, "use_cache": True, "vocab_size": 4096,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(published))
    config = DNAZenConfig.from_size(path)
    assert (config.max_ngram_count, config.pad_token_id, config.model_type) == (30, 0, "dnazen")


def test_round_trip_keeps_every_field_but_impl(tmp_path):
    config = DNAZenConfig.from_size("tiny", max_ngram_count=30, num_labels=5, impl="reference")
    config.save_pretrained(tmp_path)
    loaded = DNAZenConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() | {"transformers_version": None} == config.to_dict() | {"transformers_version": None}
    assert (loaded.impl, loaded.num_labels) == ("auto", 5)
    assert DNAZenConfig.from_size(tmp_path / "config.json").to_dict() == loaded.to_dict()


@pytest.mark.parametrize(
    ("size", "count"), [("tiny", 22_163_200), ("base", 284_564_224), ("large", None), ("xlarge", None)]
)
def test_parameter_counts(size, count):
    config = DNAZenConfig.from_size(size)
    with torch.device("meta"):
        model = DNAZenForMaskedLM(config)
    hidden, intermediate = config.hidden_size, config.intermediate_size
    norm = 2 * hidden
    token_layer = 4 * hidden * hidden + 4 * hidden + norm + 3 * hidden * intermediate + hidden + norm
    ngram_layer = 4 * hidden * hidden + 4 * hidden + norm + 2 * hidden * intermediate + intermediate + hidden + norm
    embeddings = (4096 + 162708 + 2 * 2) * hidden + 2 * norm
    head = hidden * hidden + hidden + norm + 4096
    neighbors = 2 * config.neighbor_window * hidden * hidden
    layers = config.num_hidden_layers * token_layer + config.num_hidden_ngram_layers * ngram_layer
    by_hand = embeddings + neighbors + head + layers
    assert model.num_parameters() == by_hand == (count or by_hand)
    assert set(SIZES[size]) <= set(config.to_dict())
    # The sizes as the paper quotes them, to their precision.
    quoted = {"large": 650e6, "xlarge": 2.1e9}.get(size, by_hand)
    assert by_hand == pytest.approx(quoted, rel=0.05)


def test_the_reference_has_an_attention_of_its_own(config):
    config.impl, config._attn_implementation = "reference", "sdpa"
    message = "attn_implementation: expected 'eager' or none with impl 'reference', found 'sdpa'"
    with pytest.raises(InputError, match=message):
        DNAZenModel(config)
    for name in ("eager", None):
        config._attn_implementation = name
        model = DNAZenModel(config)
        assert model.select_attention(torch.device("cpu"), torch.float32).name == "eager"
    with pytest.raises(InputError, match=message):
        model.set_attn_implementation("sdpa")
