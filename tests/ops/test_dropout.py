"""What the residual LayerNorm's drop-out drops: its numbers, their distribution, the same in every implementation."""

import itertools
import math

import pytest
import torch

from dnazen_kernels.ngram_fusion import residual_layer_norm
from dnazen_kernels.ngram_fusion.reference import keep_mask


def splitmix64(seed: int, position: int) -> int:
    """Of the sequence that a seed begins, as it is published."""
    number = (seed + (position + 1) * 0x9E3779B97F4A7C15) % 2**64
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
    return number ^ number >> 31


def signed_draws(seed: int, num_rows: int, hidden_size: int) -> torch.Tensor:
    """The 16 bits of every element, in plain Python."""
    numbers = -(-hidden_size // 4)
    draws = [
        [splitmix64(seed, row * numbers + column // 4) >> 16 * (column % 4) & 0xFFFF for column in range(hidden_size)]
        for row in range(num_rows)
    ]
    return torch.tensor([[draw - 2**16 * (draw >= 2**15) for draw in row] for row in draws])


def test_the_oracle_is_splitmix64():
    """The numbers that are published for seed 1234567."""
    assert [splitmix64(1234567, position) for position in range(5)] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821
    ]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1234567, 2**63 - 2])
@pytest.mark.parametrize("hidden_size", [37, 64])
def test_mask_is_splitmix64_s(seed, hidden_size, device):
    draws = signed_draws(seed, 11, hidden_size)
    for num_dropped in (1, 6554, 32768, 65535):
        for dtype in (torch.float32, torch.bfloat16):
            kept = keep_mask(torch.tensor(seed, device=device), 11, hidden_size, num_dropped, dtype)
            assert kept.dtype == dtype and torch.equal(kept.cpu().double(), (draws >= num_dropped - 32768).double())


@pytest.mark.slow
@pytest.mark.parametrize(
    "dropout_p, hidden_size, dtype",
    [
        (0.1, 64, torch.float32),
        (0.5, 37, torch.bfloat16),
        (0.37, 3, torch.float32),
        (0.1, 1030, torch.bfloat16),
        (1e-4, 768, torch.float32),
    ],
)
def test_kernels_drop_bit_for_bit_what_the_reference_drops(dropout_p, hidden_size, dtype, device, poisoned_memory):
    """Forward, ones are kept where the output is above the row's mean; backward, where the gradient is not zero."""
    seed = torch.tensor(2**61 + 99, device=device)
    expected = keep_mask(seed, 11, hidden_size, round(65536 * dropout_p), torch.bool)
    is_mixed = (expected.any(1) & ~expected.all(1))[:, None]
    assert is_mixed.any()
    x, residual = (value.to(device, dtype) for value in (torch.ones(11, hidden_size), torch.randn(11, hidden_size)))
    weight, bias, grad = torch.ones_like(x[0]), torch.zeros_like(x[0]), torch.randn(x.shape).to(residual)
    x.requires_grad_()
    for impl in ("triton", "reference"):
        more = dict(dropout_p=dropout_p, seed=seed, impl=impl)
        output = residual_layer_norm(x, torch.zeros_like(x), weight, bias, 1e-12, **more)
        assert torch.equal((output > 0) & is_mixed, expected & is_mixed)
        (gradient,) = torch.autograd.grad(residual_layer_norm(x, residual, weight, bias, 1e-12, **more), x, grad)
        assert torch.equal(gradient != 0, expected)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_scale_is_that_of_the_rounded_probability(impl, device):
    """x of zeros and one 1, so that the sums are exact: z is 0 or 65536 / (65536 - 6554)."""
    x = torch.eye(64, device=device)
    seed = torch.tensor(3, device=device)
    kept = keep_mask(seed, 64, 64, 6554, torch.float32)
    big = 1e6  # eps: then the norm is division by a number that does not depend on z
    output = residual_layer_norm(
        x, torch.zeros_like(x), torch.ones_like(x[0]), torch.zeros_like(x[0]), big, dropout_p=0.1, seed=seed, impl=impl
    )
    z = (x * kept).double() * 65536 / 58982
    expected = (z - z.mean(1, keepdim=True)) / (z.var(1, correction=0, keepdim=True) + big).sqrt()
    torch.testing.assert_close(output.double(), expected, rtol=1e-6, atol=1e-12)
    assert 40 < kept.diagonal().sum() < 64


# Of so many independent comparisons of normal numbers none exceeds 6 standard deviations but once in 10^6 times.
SIGMAS = 6


def test_draws_are_uniform(device):
    """Chi-square in 16 bins: 15 +- sqrt(2 * 15)."""
    seed, size, limits = torch.tensor(5, device=device), 512, range(4096, 65536, 4096)
    dropped = [size**2 - keep_mask(seed, size, size, limit, torch.float64).sum().item() for limit in limits]
    counts = torch.tensor([0, *dropped, size**2]).double().diff()
    expected = size**2 / 16
    assert abs(((counts - expected) ** 2 / expected).sum() - 15) < SIGMAS * math.sqrt(2 * 15)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_masks_are_independent(dropout_p, device):
    """Dropped together as often as by chance: neighbours in a row, in a column, and across seeds; and the sums of rows
    and columns vary as those of independent elements.
    """
    rows, columns = 2048, 768
    num_dropped = round(65536 * dropout_p)
    p = num_dropped / 65536

    def dropped(seed: int) -> torch.Tensor:
        return 1 - keep_mask(torch.tensor(seed, device=device), rows, columns, num_dropped, torch.float64)

    first = dropped(2**60)
    others = {f"seed + {step}": dropped(2**60 + step) for step in (1, 2, 2**32)}
    pairs = {name: (first, other) for name, other in others.items()}
    pairs |= {f"column + {step}": (first[:, step:], first[:, :-step]) for step in (1, 2, 3, 4, 8, 32)}
    pairs |= {f"row + {step}": (first[step:], first[:-step]) for step in (1, 2, 32)}
    pairs |= {f"diagonal {step}": (first[1:, step:], first[:-1, :-step]) for step in (1, 4)}
    for name, (left, right) in pairs.items():
        together, number = (left * right).sum().item(), left.numel()
        assert abs(together - number * p**2) < SIGMAS * math.sqrt(number * p**2), name
    for dim, size in ((0, columns), (1, rows)):
        # the variance of `size` sums, of a binomial's: relative spread sqrt(2 / size)
        variance = first.sum(dim).var().item() / (first.shape[dim] * p * (1 - p))
        assert abs(variance - 1) < SIGMAS * math.sqrt(2 / size), dim
    assert abs(first.mean().item() - p) < SIGMAS * math.sqrt(p * (1 - p) / first.numel())


def test_every_call_of_a_seed_s_stream_differs(device):
    """As `packed_add_norm` draws them."""
    torch.manual_seed(0)
    seeds = [torch.randint(2**63 - 1, (), device=device) for _ in range(4)]
    masks = [keep_mask(seed, 64, 64, 32768, torch.bool) for seed in seeds]
    for left, right in itertools.combinations(masks, 2):
        assert abs((left == right).double().mean() - 0.5) < SIGMAS * 0.5 / 64
    torch.manual_seed(0)
    again = torch.randint(2**63 - 1, (), device=device)
    assert torch.equal(keep_mask(again, 64, 64, 32768, torch.bool), masks[0])
