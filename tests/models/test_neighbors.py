"""The neighbors that enter a token's embedding, and why small models have them."""

import pytest
import torch

from dnazen.layers.encoder import Embeddings
from dnazen.models import DNAZenConfig, DNAZenForMaskedLM, DNAZenModel

SIZES = dict(
    vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
    num_hidden_ngram_layers=1, ngram_vocab_size=3, hidden_dropout_prob=0.0, initializer_range=0.3,
)  # fmt: skip
# sums of some hundred fp32 products of size about 1, in another order
TOLERANCE = dict(rtol=1e-4, atol=1e-5)


def pack(*sequences: list[int]) -> dict:
    lengths = torch.tensor([0, *map(len, sequences)])
    return {
        "input_ids": torch.tensor(sum(sequences, [])),
        "cu_seqlens": lengths.cumsum(0).to(torch.int32),
        "max_seqlen": max(map(len, sequences)),
    }


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 1, 2, 7])
def test_embedding_is_the_sum_over_the_neighbors_inside_the_sequence(window):
    torch.manual_seed(0)
    config = DNAZenConfig(**SIZES)
    embeddings = Embeddings(config, config.vocab_size, window)
    sequences = [[5, 6, 7, 8, 9], [10], [11, 12], [13, 14, 15, 16, 17, 18]]
    batch = pack(*sequences)
    found = embeddings(batch["input_ids"], batch["cu_seqlens"])
    words, rows = embeddings.word_embeddings.weight, []
    for sequence in sequences:
        for at, token in enumerate(sequence):
            state = words[token] + embeddings.token_type_embeddings.weight[0]
            for index, distance in enumerate([d for d in range(-window, window + 1) if d]):
                if 0 <= at + distance < len(sequence):
                    state = state + embeddings.neighbor_layers[index].weight @ words[sequence[at + distance]]
            rows.append(embeddings.LayerNorm(state))
    torch.testing.assert_close(found, torch.stack(rows), **TOLERANCE)


@torch.no_grad()
def test_without_neighbors_a_model_cannot_tell_left_from_right():
    """Symmetric ALiBi and no position: a reversed sequence has the reversed states, but for [CLS] and [SEP]."""
    sequence = [9, 21, 4, 33, 17, 8, 8, 30]
    for window, is_symmetric in ((0, True), (1, False)):
        torch.manual_seed(1)
        model = DNAZenModel(DNAZenConfig(**SIZES, neighbor_window=window)).eval()
        forward, backward = (model(**pack(tokens)).last_hidden_state for tokens in (sequence, sequence[::-1]))
        difference = (forward - backward.flip(0)).abs().max()
        assert (difference < 1e-4) == is_symmetric, difference


@torch.no_grad()
def test_padded_and_reference_give_the_states_of_packed():
    torch.manual_seed(2)
    model = DNAZenModel(DNAZenConfig(**SIZES, neighbor_window=2)).eval()
    sequences = [[1, 9, 8, 7, 2], [1, 30, 2], [1, 12, 13, 14, 15, 16, 2]]
    packed = model(**pack(*sequences)).last_hidden_state
    alone = torch.cat([model(**pack(sequence)).last_hidden_state for sequence in sequences])
    torch.testing.assert_close(packed, alone, **TOLERANCE)
    width = max(map(len, sequences))
    padded = torch.tensor([sequence + [3] * (width - len(sequence)) for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (width - len(sequence)) for sequence in sequences])
    states = model(padded, attention_mask=mask).last_hidden_state[mask.bool()]
    torch.testing.assert_close(states, packed, **TOLERANCE)
    model.config.impl = "reference"
    torch.testing.assert_close(model(**pack(*sequences)).last_hidden_state, packed, **TOLERANCE)


def test_weights_of_the_neighbors_are_saved_and_must_be_there(tmp_path):
    model = DNAZenForMaskedLM(DNAZenConfig(**SIZES, neighbor_window=1))
    names = {name for name, _ in model.named_parameters() if "neighbor" in name}
    assert names == {f"bert.embeddings.neighbor_layers.{i}.weight" for i in range(2)}
    model.save_pretrained(tmp_path)
    loaded = dict(DNAZenForMaskedLM.from_pretrained(tmp_path).named_parameters())
    assert all(torch.equal(loaded[name], parameter) for name, parameter in model.named_parameters())
    with pytest.raises(ValueError, match="missing: .*neighbor_layers.2.weight"):
        DNAZenForMaskedLM.from_pretrained(tmp_path, neighbor_window=2)
