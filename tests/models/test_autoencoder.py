"""VQDNA's autoencoder against plain convolutions, its levels by their formula, and that it learns a text."""

import math

import pytest
import torch
import torch.nn.functional as F

from dnazen.layers.autoencoder import (
    ConvNeXtBlock,
    Convolution,
    Encoded,
    VocabularyAutoencoder,
    vocabulary_loss,
)
from dnazen.layers.neighbors import Neighbors

LENGTHS = [9, 1, 60, 3]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def one_hot(bases):
    return F.one_hot(bases, 4).float()


def ends(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def test_convolutions_are_pytorch_s_on_each_sequence_alone():
    states, block, dense = torch.randn(sum(LENGTHS), 8), ConvNeXtBlock(8), Convolution(8, 6, 5)
    torch.nn.init.normal_(block.bias)
    neighbors = Neighbors(ends(LENGTHS), len(states), 3)
    found = block(states, neighbors), dense(states, neighbors)
    depth_wise, kernel = block.weight.T.unsqueeze(1), dense.linear.weight.unflatten(1, (5, 8)).transpose(1, 2)
    for part, *outputs in zip(states.split(LENGTHS), *(output.split(LENGTHS) for output in found)):
        mixed = F.conv1d(part.T, depth_wise, block.bias, padding=3, groups=8).T
        expected = part + block.contract(F.gelu(block.expand(block.norm(mixed))))
        # fp32, sums of some 40 products
        torch.testing.assert_close(outputs[0], expected, rtol=1e-5, atol=1e-5)
        expected = F.conv1d(part.T, kernel, dense.linear.bias, padding=2).T
        torch.testing.assert_close(outputs[1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_codes", [(16,), (16, 32), (8, 16, 32)], ids=str)
def test_a_code_depends_on_the_receptive_field_and_on_no_more(num_codes):
    """And on its own sequence alone: 6 blocks of 7 and the stem's 5 reach 20 bases to either side."""
    model = VocabularyAutoencoder(16, 6, num_codes)
    assert model.receptive_field == 41
    inputs = one_hot(torch.randint(4, (100,))).requires_grad_()
    encoded = model.encode(inputs, Neighbors(ends([30, 70]), 100, 3))
    (reached,) = torch.autograd.grad(encoded.output[65].sum(), inputs)
    assert torch.equal(reached.abs().sum(1).nonzero()[:, 0], torch.arange(45, 86))
    (reached,) = torch.autograd.grad(model.encode(inputs, Neighbors(ends([30, 70]), 100, 3)).output[35].sum(), inputs)
    assert torch.equal(reached.abs().sum(1).nonzero()[:, 0], torch.arange(30, 56))


def test_levels_are_those_of_the_formula():
    """H1 = Z3, H2 = 2 Z6 - e(M1), and the output is the mean of e(M1) and e(M2)."""
    model = VocabularyAutoencoder(16, 6, (8, 12))
    inputs, neighbors = one_hot(torch.randint(4, (80,))), Neighbors(ends([80]), 80, 3)
    model.start(inputs, ends([80]))
    encoded = model.encode(inputs, neighbors)
    states = model.project(F.gelu(model.stem_norm(model.stem(inputs, neighbors))))
    looked_up = []
    for block in model.encoder:
        states = block(states, neighbors)
        looked_up.append(states)
    first, second = (codebook.codes for codebook in model.codebooks)
    expected = [looked_up[2], 2 * looked_up[5] - first[encoded.indices[0]]]
    for found, states in zip(encoded.states, expected):
        torch.testing.assert_close(found, states)
    output = (first[encoded.indices[0]] + second[encoded.indices[1]]) / 2
    torch.testing.assert_close(encoded.output, output)
    losses = [F.mse_loss(states, codes[i]) for states, codes, i in zip(expected, (first, second), encoded.indices)]
    torch.testing.assert_close(encoded.commitment, sum(losses) / 2)
    assert len(encoded.indices[1].unique()) > 6


def test_levels_pass_no_gradient_to_the_codes_before_them():
    """Half of the mean is Z3's code, whose gradient is Z3's; the other half, 2 Z6 less that, would take it back."""
    model = VocabularyAutoencoder(8, 2, (4, 4))
    inputs, neighbors = one_hot(torch.randint(4, (30,))), Neighbors(ends([30]), 30, 3)
    first = []
    model.encoder[0].register_forward_hook(lambda module, args, output: first.append(output))
    model.encoder[1].register_forward_hook(lambda module, args, output: output.detach())
    (gradient,) = torch.autograd.grad(model.encode(inputs, neighbors).output.sum(), first)
    assert torch.equal(gradient, torch.full_like(gradient, 0.5))


def test_loss_by_hand():
    """ln 4 where nothing is known, and half of the commitment."""
    encoded = Encoded(torch.zeros(3, 2), [], [], torch.tensor(0.6))
    loss = vocabulary_loss(torch.zeros(3, 4), torch.tensor([0, 1, 3]), encoded)
    assert float(loss) == pytest.approx(math.log(4) + 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("num_codes", [(16,), (16, 32)], ids=str)
def test_it_learns_to_spell_and_uses_its_codes(num_codes):
    """Bases of random text come back, of sequences that it has not seen, and by most of its codes."""
    model = VocabularyAutoencoder(24, 2, num_codes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    lengths = [40] * 12
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randint(4, (sum(lengths),), generator=generator)

    model.start(one_hot(draw()), ends(lengths))
    for _ in range(90):
        bases = draw()
        logits, encoded = model(one_hot(bases), ends(lengths))
        loss = vocabulary_loss(logits, bases, encoded)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update(encoded)
    bases = draw()
    logits, encoded = model(one_hot(bases), ends(lengths))
    assert (logits.argmax(1) == bases).float().mean() > 0.97  # 0.25 by chance
    for indices, count in zip(encoded.indices, num_codes):
        assert len(indices.unique()) > 0.7 * count


def test_levels_must_divide_the_blocks():
    with pytest.raises(ValueError, match="num_blocks must be a multiple of the number of levels, got 5 for 2"):
        VocabularyAutoencoder(16, 5, (8, 8))
