"""Initialisation, saving and loading of our own checkpoints; for published ones see test_published."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from dnazen.models import DNAZenConfig, DNAZenForMaskedLM, DNAZenForSequenceClassification, DNAZenModel


@pytest.mark.parametrize("spread", [0.02, 0.09])
def test_initialisation_is_berts(spread):
    """Normal, of the spread that the configuration names; 0.02 is BERT's own."""
    config = DNAZenConfig.from_size("tiny", ngram_vocab_size=2000, initializer_range=spread)
    assert DNAZenConfig().initializer_range == 0.02
    model = DNAZenForMaskedLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name.lower():
            assert (parameter == 1).all(), name
        elif parameter.numel() > 10_000:
            # The standard deviation of n draws has a relative error of 1 / sqrt(2 n): 5 sigma at 10,000 is 0.035.
            assert parameter.std().item() == pytest.approx(spread, rel=0.035), name
            assert parameter.mean().item() == pytest.approx(0, abs=spread * 5 / 100), name
    assert model.bert.ngram_embeddings.word_embeddings.weight[0].any()
    assert model.bert.embeddings.word_embeddings.weight[0].any()


def _load_with_another_seed(auto_class, path):
    torch.manual_seed(1234)
    return auto_class.from_pretrained(path)


@pytest.mark.parametrize(
    ("model_class", "auto_class"),
    [
        (DNAZenModel, AutoModel),
        (DNAZenForMaskedLM, AutoModelForMaskedLM),
        (DNAZenForSequenceClassification, AutoModelForSequenceClassification),
    ],
)
def test_round_trip_through_the_auto_classes(model_class, auto_class, config, make_batch, tmp_path):
    model = model_class(config).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file() and not list(tmp_path.glob("*.bin"))
    assert type(AutoConfig.from_pretrained(tmp_path)) is DNAZenConfig
    loaded = _load_with_another_seed(auto_class, tmp_path).eval()
    assert type(loaded) is model_class
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    batch = make_batch([9, 12], [2, 3], mask_rate=None)
    assert torch.equal(loaded(**batch)[0], model(**batch)[0])


def test_tied_weights_stay_tied(config, make_batch, tmp_path):
    def is_tied(model):
        return model.cls["predictions"].decoder.weight is model.bert.embeddings.word_embeddings.weight

    model = DNAZenForMaskedLM(config)
    assert is_tied(model)
    model(**make_batch([9], [2])).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert is_tied(model)
    model.save_pretrained(tmp_path)
    loaded = _load_with_another_seed(AutoModelForMaskedLM, tmp_path)
    assert is_tied(loaded)
    assert torch.equal(loaded.bert.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight)


def test_encoders_load_from_a_masked_lm_checkpoint(config, tmp_path):
    model = DNAZenForMaskedLM(config)
    model.save_pretrained(tmp_path)
    for auto_class in (AutoModel, AutoModelForSequenceClassification):
        loaded = _load_with_another_seed(auto_class, tmp_path)
        encoders = loaded if auto_class is AutoModel else loaded.bert
        for name, tensor in model.bert.state_dict().items():
            assert torch.equal(encoders.state_dict()[name], tensor), name


def test_vocabulary_can_be_resized(config, make_batch):
    model = DNAZenForMaskedLM(config)
    model.resize_token_embeddings(60)
    assert model.config.vocab_size == 60
    assert model(**make_batch([9], [2], vocab_size=60, mask_rate=None)).logits.shape == (9, 60)
