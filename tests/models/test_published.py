"""Folders of published models: they load as they are, compute what the specification says, and hide nothing."""

import json
import logging
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from dnazen.files import InputError
from dnazen.models import DNAZenConfig, DNAZenForMaskedLM, DNAZenForSequenceClassification, DNAZenModel
from tests.helpers import plain
from tests.helpers.published import BASE, SMALL, random_weights, shapes, write_dnabert2, write_dnazen

HEADS = SMALL["num_attention_heads"]


@pytest.fixture
def said(caplog):
    """What the last load reported, one message a line."""
    caplog.set_level(logging.WARNING)
    return caplog


def names_of(part: str, table: dict) -> set[str]:
    return {name for name in table if part in name}


@pytest.fixture
def padded_batch(make_batch, pad_batch) -> dict:
    """Three sequences; the second has no G-gram, the third has a G-gram more than the first."""
    packed = make_batch(
        [17, 9, 12], [4, 0, 5], vocab_size=64, ngram_vocab_size=SMALL["ngram_vocab_size"], mask_rate=None
    )
    return pad_batch(packed)


def difference(found: torch.Tensor, expected: torch.Tensor, batch: dict) -> float:
    tokens = batch["attention_mask"].bool()
    return (found - expected)[tokens].abs().max().item()


# -- the same numbers as the specification ----------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "reference"])
def test_logits_of_dnazen_are_those_of_the_specification(implementation, padded_batch, tmp_path):
    weights = write_dnazen(tmp_path)
    options = {"impl": "reference"} if implementation == "reference" else {"attn_implementation": implementation}
    model = DNAZenForMaskedLM.from_pretrained(tmp_path, **options)
    expected = plain.masked_lm_logits(weights, HEADS, **padded_batch)
    assert expected.std() > 0.5
    # logits of size 1: both sides are within 5e-6 of fp64; a wrong formula is off by 1e-2 (see below)
    assert difference(model(**padded_batch).logits, expected, padded_batch) < 1e-5


def test_logits_of_dnabert2_are_those_of_the_specification(padded_batch, tmp_path):
    weights = write_dnabert2(tmp_path)
    model = DNAZenForMaskedLM.from_pretrained(tmp_path, num_hidden_ngram_layers=2, ngram_vocab_size=30)
    batch = {name: padded_batch[name] for name in ("input_ids", "attention_mask")}
    assert difference(model(**batch).logits, plain.masked_lm_logits(weights, HEADS, **batch), batch) < 1e-5


def test_logits_of_a_classifier_are_those_of_the_specification(padded_batch, tmp_path):
    weights = random_weights(shapes(**SMALL, head="classifier", num_labels=3))
    write_dnazen(tmp_path, weights)
    model = DNAZenForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    expected = plain.classifier_logits(weights, HEADS, **padded_batch)
    assert torch.allclose(model(**padded_batch).logits, expected, atol=1e-5, rtol=0)


def _swap(weights, name, order):
    chunks = weights[name].chunk(len(order))
    return {**weights, name: torch.cat([chunks[i] for i in order])}


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: _swap(weights, "bert.encoder.layer.1.mlp.gated_layers.weight", [1, 0]),
        lambda weights: _swap(weights, "bert.encoder.layer.1.attention.self.Wqkv.weight", [1, 0, 2]),
        lambda weights: _swap(weights, "bert.encoder.layer.1.attention.self.Wqkv.weight", list(range(1, 36)) + [0]),
        lambda weights: _swap(weights, "bert.embeddings.token_type_embeddings.weight", [1, 0]),
        lambda weights: _swap(weights, "bert.ngram_embeddings.token_type_embeddings.weight", [1, 0]),
        lambda weights: {k: v for k, v in weights.items() if "ngram_layers.1" not in k},
    ],
    ids=["halves of the GLU", "query and key", "heads", "token type", "G-gram token type", "a fused layer less"],
)
def test_the_comparison_notices(change, padded_batch, tmp_path):
    weights = write_dnazen(tmp_path)
    logits = DNAZenForMaskedLM.from_pretrained(tmp_path)(**padded_batch).logits
    assert difference(logits, plain.masked_lm_logits(change(weights), HEADS, **padded_batch), padded_batch) > 1e-2


# -- what loads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bin", "safetensors"])
@pytest.mark.parametrize("decoder", [True, False], ids=["decoder in the file", "decoder left out"])
def test_both_forms_with_and_without_the_tied_decoder(form, decoder, tmp_path, said):
    weights = random_weights(shapes(**SMALL))
    write_dnazen(tmp_path, weights)
    (tmp_path / "model.safetensors").unlink()
    stored = {name: tensor.clone() for name, tensor in weights.items() if decoder or "decoder.weight" not in name}
    if form == "bin":
        torch.save(stored, tmp_path / "pytorch_model.bin")
    else:
        save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = DNAZenForMaskedLM.from_pretrained(tmp_path)
    assert said.messages == []
    assert model.state_dict().keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_dnabert2_loads_as_it_is_and_says_what_is_new(tmp_path, said):
    weights = write_dnabert2(tmp_path, num_hidden_layers=6)
    model = DNAZenForMaskedLM.from_pretrained(tmp_path, ngram_vocab_size=500)
    assert "bert_layers" not in sys.modules
    new = {name: tensor for name, tensor in model.state_dict().items() if "ngram_" in name}
    assert len(new) == 4 + 6 * 16
    size = sum(tensor.numel() for tensor in new.values())
    assert said.messages == [
        f"{tmp_path}: newly initialised, because not in its weights: 100 tensors, {size:,} parameters "
        "(encoder.ngram_layers.*, ngram_embeddings.*)",
        f"{tmp_path}: not used: 2 tensors of its weights (pooler.*)",
    ]
    for name in weights.keys() - names_of("pooler", weights):
        assert torch.equal(model.state_dict()[name], weights[name]), name
    table = new["bert.ngram_embeddings.word_embeddings.weight"]
    assert table.shape == (500, 48)
    assert table.std().item() == pytest.approx(0.02, rel=0.035)  # 5 sigma of 24,000 draws is 0.023
    assert (new["bert.encoder.ngram_layers.5.output.LayerNorm.weight"] == 1).all()
    assert not new["bert.encoder.ngram_layers.5.output.dense.bias"].any()


def test_configuration_of_dnabert2(tmp_path, said):
    write_dnabert2(tmp_path, num_hidden_layers=6)
    config = DNAZenConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.pad_token_id, config.hidden_size) == ("dnazen", 0, 48)
    assert not hasattr(config, "auto_map") and said.messages == []
    assert DNAZenConfig.from_pretrained(tmp_path, ngram_vocab_size=7).ngram_vocab_size == 7
    with pytest.raises(InputError, match="num_hidden_ngram_layers: expected at most num_hidden_layers 6, found 7"):
        DNAZenConfig.from_pretrained(tmp_path, num_hidden_ngram_layers=7)


def test_a_model_that_came_from_dnabert2_saves_and_loads_as_dnazen(tmp_path, said):
    write_dnabert2(tmp_path / "source", num_hidden_layers=6)
    model = DNAZenForMaskedLM.from_pretrained(tmp_path / "source", ngram_vocab_size=20)
    model.save_pretrained(tmp_path / "saved")
    said.clear()
    assert type(AutoConfig.from_pretrained(tmp_path / "saved")) is DNAZenConfig
    loaded = DNAZenForMaskedLM.from_pretrained(tmp_path / "saved")
    assert said.messages == []
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_classifier_from_masked_lm_checkpoints(tmp_path, said):
    write_dnazen(tmp_path / "dnazen")
    DNAZenForSequenceClassification.from_pretrained(tmp_path / "dnazen", num_labels=3)
    new = 48 * 48 + 48 + 3 * 48 + 3
    folder = tmp_path / "dnazen"
    assert said.messages == [
        f"{folder}: newly initialised, because not in its weights: 4 tensors, {new:,} parameters "
        "(classifier.*, pooler.*)",
        f"{folder}: not used: 5 tensors of its weights (cls.predictions.*)",
    ]
    said.clear()
    # DNABERT-2 has a pooler, and it is used
    weights = write_dnabert2(tmp_path / "dnabert2", num_hidden_layers=6)
    model = DNAZenForSequenceClassification.from_pretrained(tmp_path / "dnabert2", ngram_vocab_size=20)
    assert torch.equal(model.bert.pooler.dense.weight, weights["bert.pooler.dense.weight"])
    assert "102 tensors" in said.messages[0] and "pooler" not in said.text


def test_encoders_alone_from_any_checkpoint(tmp_path, said):
    weights = write_dnabert2(tmp_path, num_hidden_layers=6)
    model = DNAZenModel.from_pretrained(tmp_path, ngram_vocab_size=20)
    assert torch.equal(model.encoder.layer[5].mlp.wo.weight, weights["bert.encoder.layer.5.mlp.wo.weight"])
    assert f"{tmp_path}: not used: 8 tensors of its weights (cls.predictions.*, pooler.*)" in said.messages


def test_a_name_of_the_hub(tmp_path, said):
    """From the hub's cache, so without a network; the code beside the weights is not asked for."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--zhihan1996--DNABERT-2-117M"
    weights = write_dnabert2(folder / "snapshots" / commit, num_hidden_layers=6)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    model = DNAZenForMaskedLM.from_pretrained(
        "zhihan1996/DNABERT-2-117M", cache_dir=tmp_path, local_files_only=True, ngram_vocab_size=20
    )
    name = "bert.encoder.layer.5.mlp.wo.weight"
    assert torch.equal(model.state_dict()[name], weights[name])
    assert said.messages[0].startswith("zhihan1996/DNABERT-2-117M: newly initialised")


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(model_class, folder, **options) -> str:
    with pytest.raises(InputError) as error:
        model_class.from_pretrained(folder, **options)
    return str(error.value)


@pytest.mark.parametrize(
    "lost",
    [
        ["bert.encoder.layer.3.mlp.wo.bias", "cls.predictions.transform.dense.weight"],
        ["bert.ngram_embeddings.word_embeddings.weight"],  # one of the G-gram part is not the G-gram part
        ["bert.encoder.ngram_layers.1.output.dense.weight"],
        ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"],
    ],
    ids=["encoder and head", "G-gram embeddings", "G-gram layer", "both tied weights"],
)
def test_missing_weights_are_all_named(lost, tmp_path):
    weights = random_weights(shapes(**SMALL))
    write_dnazen(tmp_path, {name: tensor for name, tensor in weights.items() if name not in lost})
    message = refused(DNAZenForMaskedLM, tmp_path)
    assert message.startswith(f"{tmp_path}: expected the weights of DNAZenForMaskedLM, found missing: ")
    assert all(name in message for name in lost)


@pytest.mark.parametrize(
    "model_class, part", [(DNAZenForMaskedLM, "ngram"), (DNAZenForSequenceClassification, "classifier")]
)
def test_a_part_that_the_configuration_promises_is_not_made_up(model_class, part, tmp_path):
    """DNABERT-2 has no G-grams and a pretrained model no classifier; these have, and lost theirs."""
    model_class(DNAZenConfig(**SMALL)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if part not in name}
    assert 0 < len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = refused(model_class, tmp_path)
    assert "missing: " in message and all(name in message for name in weights.keys() - kept.keys())


def test_unexpected_and_misshaped_weights_are_all_named(tmp_path):
    weights = random_weights(shapes(**SMALL))
    weights["bert.encoder.layer.0.mlp.wo.weight"] = torch.zeros(48, 81)
    weights["bert.encoder.layer.4.mlp.wo.bias"], weights["bert.odd"] = torch.zeros(48), torch.zeros(3)
    write_dnazen(tmp_path, weights)
    assert refused(DNAZenForMaskedLM, tmp_path) == (
        f"{tmp_path}: expected the weights of DNAZenForMaskedLM, found "
        "unexpected: bert.encoder.layer.4.mlp.wo.bias, bert.odd; "
        "misshaped: bert.encoder.layer.0.mlp.wo.weight (expected [48, 80], found [48, 81])"
    )


def test_misshaped_weights_may_be_named_new(tmp_path, said):
    write_dnazen(tmp_path, random_weights(shapes(**SMALL, head="classifier", num_labels=2)))
    assert "classifier.bias (expected [5], found [2])" in refused(
        DNAZenForSequenceClassification, tmp_path, num_labels=5
    )
    model = DNAZenForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model.classifier.weight.shape == (5, 48)
    assert said.messages == [
        f"{tmp_path}: newly initialised, because misshaped in its weights: 2 tensors, 245 parameters (classifier.*)"
    ]


@pytest.mark.slow
def test_another_number_of_ngrams_is_not_loaded_by_halves(tmp_path):
    write_dnazen(tmp_path)
    message = refused(DNAZenForMaskedLM, tmp_path, ngram_vocab_size=31)
    assert "bert.ngram_embeddings.word_embeddings.weight (expected [31, 48], found [30, 48])" in message


def test_a_classifier_is_no_masked_lm_and_half_a_head_is_none(tmp_path):
    weights = random_weights(shapes(**SMALL, head="classifier"))
    write_dnazen(tmp_path / "classifier", weights)
    message = refused(DNAZenForMaskedLM, tmp_path / "classifier")
    assert "missing: cls.predictions.decoder.bias" in message and "unexpected: classifier.bias" in message
    write_dnazen(tmp_path / "half", {name: tensor for name, tensor in weights.items() if "pooler" not in name})
    assert "missing: bert.pooler.dense.bias" in refused(DNAZenForSequenceClassification, tmp_path / "half")


def test_a_decoder_that_is_not_the_embeddings(tmp_path):
    weights = random_weights(shapes(**SMALL))
    weights["cls.predictions.decoder.weight"] = weights["cls.predictions.decoder.weight"] + 1
    write_dnabert2(tmp_path, weights, **SMALL)
    message = refused(DNAZenForMaskedLM, tmp_path, num_hidden_ngram_layers=2, ngram_vocab_size=30)
    assert "expected cls.predictions.decoder.weight to equal bert.embeddings.word_embeddings.weight" in message


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_a_file_cut_short_is_named(form, tmp_path):
    write_dnabert2(tmp_path, num_hidden_layers=6) if form == "bin" else write_dnazen(tmp_path)
    file = tmp_path / ("pytorch_model.bin" if form == "bin" else "model.safetensors")
    file.write_bytes(file.read_bytes()[:-5000])
    message = refused(DNAZenForMaskedLM, tmp_path)
    assert message.startswith(f"{file}: expected weights, found a damaged file or one cut short")


class Attack:
    """What an unpickler would run."""

    def __reduce__(self):
        return print, ("pickled code was run",)


def test_pickled_code_is_not_run(tmp_path, capsys):
    weights = write_dnabert2(tmp_path, num_hidden_layers=6)
    torch.save({**weights, "bert.odd": Attack()}, tmp_path / "pytorch_model.bin")
    assert str(tmp_path / "pytorch_model.bin") in refused(DNAZenForMaskedLM, tmp_path)
    assert "pickled code was run" not in capsys.readouterr().out


def test_another_models_configuration(tmp_path):
    write_dnazen(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "esm"}))
    assert "model_type: expected 'dnazen', or 'bert' as in published configurations, found 'esm'" in refused(
        DNAZenForMaskedLM, tmp_path
    )


# -- names and shapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_class", "head"), [(DNAZenForMaskedLM, "mlm"), (DNAZenForSequenceClassification, "classifier")]
)
def test_names_and_shapes_are_the_published_ones(model_class, head):
    with torch.device("meta"):
        model = model_class(DNAZenConfig(num_labels=3))
    expected = shapes(**BASE, head=head, num_labels=3)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    if head == "mlm":
        tied = expected.pop("cls.predictions.decoder.weight")
        assert tied == expected["bert.embeddings.word_embeddings.weight"]
        count = sum(torch.Size(shape).numel() for shape in expected.values())
        assert count == model.num_parameters() == 284_564_224
