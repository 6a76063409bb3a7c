"""Slopes, bias, and the implementations of attention against each other."""

import pytest
import torch

from dnazen.layers.attention import alibi_bias, alibi_slopes, packed_attention


@pytest.mark.parametrize(
    ("num_heads", "exponents"),
    [
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
        (16, [0.5 * k for k in range(1, 17)]),
        (4, [2, 4, 6, 8]),
        (1, [8]),
    ],
)
def test_slopes_by_hand(num_heads, exponents):
    slopes = alibi_slopes(num_heads)
    assert slopes.dtype == torch.float32
    assert slopes.tolist() == torch.tensor([2.0**-e for e in exponents]).tolist()


def test_bias_is_bidirectional():
    bias = alibi_bias(8, 4)
    assert bias[1].tolist() == [
        [0, -0.25, -0.5, -0.75], [-0.25, 0, -0.25, -0.5], [-0.5, -0.25, 0, -0.25], [-0.75, -0.5, -0.25, 0]
    ]  # fmt: skip


@pytest.mark.parametrize("lengths", [[3, 3, 9, 0, 3], [0, 0], [1], [5, 0, 0, 5]])
@pytest.mark.parametrize("with_bias", [True, False])
def test_sdpa_equals_eager(lengths, with_bias):
    total, heads, longest = sum(lengths), 3, max(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    bias = alibi_bias(heads, longest) if with_bias else None
    results = []
    for implementation in ("sdpa", "eager"):
        torch.manual_seed(1)
        states = torch.randn(3, total, heads, 8, requires_grad=True)
        context, weights = packed_attention(implementation, cu_seqlens, longest, total, bias)(*states.unbind(0))
        (context * torch.arange(8.0)).sum().backward()
        results.append((context.detach(), states.grad))
        assert (weights is None) == (implementation == "sdpa")
    # fp32: sums of at most 9 terms in another order.
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_unknown_implementation():
    with pytest.raises(ValueError, match="attn_implementation: expected one of sdpa, eager, found 'fast'"):
        packed_attention("fast", torch.tensor([0, 1], dtype=torch.int32), 1, 1)


@pytest.mark.parametrize("bounds", [[0, 4], [1, 5], [0, 4, 2, 5], [0, 5, 5]])
def test_bounds_that_do_not_fit_the_tokens(bounds):
    with pytest.raises(ValueError, match="cu_seqlens: expected to ascend from 0 to 5 by at most 4"):
        packed_attention("sdpa", torch.tensor(bounds, dtype=torch.int32), 4, 5)
