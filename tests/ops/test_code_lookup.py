"""Nearest codes against plain loops and fp64, sums by code against fp64; ties, empty input, the same bits again."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dnazen_kernels.code_lookup import code_lookup, code_sums, reference, triton_impl
from dnazen_kernels.code_lookup.triton_impl import CONSTANTS, ROWS_AT_ONCE

IMPLS = ["reference", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# rows, codes, columns: less than a block of each, exactly one, and more
SHAPES = [(1, 1, 1), (37, 5, 3), (64, 64, 32), (130, 150, 48), (70, 513, 64)]
UNIT = 2.0**-24  # of fp32's rounding


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_numbers_are_told_apart_exactly(shape, impl, device):
    """Their distances have no rounding in any order of sums; many are equal, and the first of those is taken."""
    num_rows, num_codes, size = shape
    states, codes = (torch.randint(-2, 3, (count, size)) for count in (num_rows, num_codes))
    codes[-(num_codes // 2) or num_codes :] = codes[: num_codes // 2].clone()
    expected = ((states[:, None] - codes[None]) ** 2).sum(2).numpy().argmin(1)  # numpy's is the first of several
    found = code_lookup(states.float().to(device), codes.float().to(device), impl=impl)
    assert found.dtype == torch.int64 and np.array_equal(found.cpu().numpy(), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_other_code_is_nearer_by_more_than_fp32_rounds(dtype, impl, device):
    """A score sums D products and a norm, each off by a unit; a product in TF32's parts by 12, three times 2^-22."""
    wide = torch.randn(90, 2 * 37).to(device, dtype)
    states, codes = wide[:, ::2], torch.randn(70, 37).to(device, dtype)
    found = code_lookup(states, codes, impl=impl)
    rows, centres = states.float().double(), codes.float().double()
    distances = (rows[:, None] - centres[None]).square().sum(2)
    terms = 2 * rows.abs() @ centres.abs().T + centres.square().sum(1)
    error = (37 + 2 + 12) * UNIT * terms.amax(1)
    chosen = distances.gather(1, found[:, None])[:, 0]
    assert (chosen <= distances.amin(1) + 2 * error).all()
    assert len(found.unique()) > 20


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("usage", ["even", "one code has all", "most have none"])
def test_sums_are_those_of_fp64(usage, dtype, impl, device, poisoned_memory):
    num_rows, num_codes, size = 3 * ROWS_AT_ONCE + 5, 11, 24
    states = torch.randn(num_rows, 2 * size).to(device, dtype)[:, ::2]
    indices = {
        "even": torch.randint(num_codes, (num_rows,)),
        "one code has all": torch.full((num_rows,), 7),
        "most have none": torch.randint(2, (num_rows,)) * 10,
    }[usage].to(device)
    counts, sums = code_sums(states, indices, num_codes, impl=impl)
    assert counts.tolist() == torch.bincount(indices, minlength=num_codes).tolist() and sums.dtype == torch.float32
    member = torch.nn.functional.one_hot(indices, num_codes).double()
    rows = states.float().double()
    budget = num_rows * UNIT * (member.T @ rows.abs())  # of any order of so many sums
    assert ((sums.double() - member.T @ rows).abs() <= budget).all()
    again = code_sums(states, indices, num_codes, impl=impl)
    assert torch.equal(again[1], sums)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(indices=st.lists(st.integers(0, 6), max_size=300))
def test_sums_of_whole_numbers_are_exact(indices, device):
    states = torch.arange(len(indices) * 3, dtype=torch.float32).reshape(-1, 3) % 17
    expected = np.zeros((7, 3))
    np.add.at(expected, np.array(indices, dtype=int), states.numpy())
    for impl in IMPLS:
        counts, sums = code_sums(states.to(device), torch.tensor(indices, dtype=torch.int64).to(device), 7, impl=impl)
        assert np.array_equal(sums.cpu().numpy(), expected)
        assert counts.tolist() == [indices.count(code) for code in range(7)]


@pytest.mark.parametrize("impl", IMPLS)
def test_no_row_has_no_code(impl, device):
    states, codes = torch.zeros(0, 5, device=device), torch.randn(3, 5, device=device)
    found = code_lookup(states, codes, impl=impl)
    assert found.shape == (0,) and found.dtype == torch.int64
    counts, sums = code_sums(states, found, 3, impl=impl)
    assert counts.tolist() == [0, 0, 0] and torch.equal(sums, torch.zeros(3, 5, device=device))


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_scores_of_all_rows_and_codes_are_never_there(device, monkeypatch):
    """Within an operator of Triton's, too, which is one to those who look from outside: so its launchers are called.

    Interpreted, they copy states as bytes, four for each number.
    """
    monkeypatch.setattr(reference, "_SCORES_AT_ONCE", 4 * 512 * 8)
    states, codes = torch.randn(512, 8, device=device), torch.randn(256, 8, device=device)
    for look_up, sum_up in (
        (reference.code_lookup_chunked, reference.code_sums_index_add), (triton_impl.code_lookup, triton_impl.code_sums)
    ):  # fmt: skip
        with Largest() as largest:
            sum_up(states, look_up(states, codes), 256)
        assert 512 * 8 <= largest.elements <= 4 * 512 * 8, look_up


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_does_not_round(impl, device):
    states, codes = torch.randn(60, 16, device=device), torch.randn(40, 16, device=device)
    codes[1:] = codes[:1] + 1e-4 * codes[1:]  # bf16 has three digits: all the same to it
    expected = code_lookup(states, codes, impl=impl)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(code_lookup(states, codes, impl=impl), expected)
    assert len(expected.unique()) > 5


def test_operators_keep_torch_s_rules(device):
    states, codes = torch.randn(20, 6, device=device), torch.randn(4, 6, device=device)
    indices = code_lookup(states, codes, impl="triton")
    torch.library.opcheck(torch.ops.dnazen.code_lookup, (states, codes))
    torch.library.opcheck(torch.ops.dnazen.code_sums, (states, indices, 4))


def test_gradients_do_not_pass(device):
    states = torch.randn(20, 6, device=device, requires_grad=True)
    codes = torch.randn(4, 6, device=device, requires_grad=True)
    for impl in IMPLS:
        counts, sums = code_sums(states, code_lookup(states, codes, impl=impl), 4, impl=impl)
        assert not sums.requires_grad and counts.sum() == 20


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: code_lookup(x.long(), x), TypeError, "states must be floating point, got torch.int64"),
        (lambda x: code_lookup(x[0], x), ValueError, r"states must have shape \[rows, D\], got \[4\]"),
        (lambda x: code_lookup(x, x[:, :2]), ValueError, r"codes must have shape \[3, 4\], got \[3, 2\]"),
        (lambda x: code_lookup(x, x[:0]), ValueError, "codes must hold at least one code, got none"),
        (lambda x: code_lookup(x, x, impl="cuda"), ValueError, "impl must be one of"),
        (lambda x: code_sums(x, torch.zeros(3), 2), TypeError, "indices must be torch.int64, got torch.float32"),
        (lambda x: code_sums(x, torch.zeros(2).long(), 2), ValueError, r"indices must have shape \[3\], got \[2\]"),
        (lambda x: code_sums(x, torch.zeros(3).long(), 0), ValueError, "num_codes must be at least 1, got 0"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 4))


def test_shapes_here_meet_the_edges_of_a_block():
    for number, block in enumerate(("BLOCK_N", "BLOCK_K", "BLOCK_D")):
        sizes = [shape[number] for shape in SHAPES]
        assert min(sizes) < CONSTANTS[block] < max(sizes) and CONSTANTS[block] in sizes
