"""A codebook against vector-quantize-pytorch's, and what that has not: several processes, resumption, other types."""

import copy

import pytest
import torch

from dnazen.layers.codebook import Codebook
from tests.helpers.launch import PROGRAMS, run_program
from tests.programs.codebook import rows, run


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.slow
def test_steps_are_those_of_vector_quantize_pytorch():
    """Indices, output, loss, gradient and codes of ten training steps; both are written from the same papers."""
    theirs_of = pytest.importorskip("vector_quantize_pytorch", reason="needs vector-quantize-pytorch").VectorQuantize
    size, num_codes = 8, 12
    theirs = theirs_of(
        size, num_codes, decay=0.9, eps=1e-3, kmeans_init=False, threshold_ema_dead_code=0, rotation_trick=False,
        commitment_weight=1.0,
    )  # fmt: skip
    ours = Codebook(num_codes, size, decay=0.9, epsilon=1e-3, min_count=0.0)
    codes = torch.randn(num_codes, size)
    for own, other in (("codes", "embed"), ("sums", "embed_avg")):
        getattr(ours, own).copy_(codes)
        getattr(theirs._codebook, other).copy_(codes[None])
    ours.counts.fill_(1.0)
    theirs._codebook.cluster_size.fill_(1.0)
    for _ in range(10):
        states = torch.randn(200, size)
        inputs = [states.clone().requires_grad_() for _ in range(2)]
        (output, indices, loss), (their_output, their_indices, their_loss) = ours(inputs[0]), theirs(inputs[1][None])
        assert torch.equal(indices, their_indices[0]) and len(indices.unique()) > 8
        weights = torch.randn(200, size)
        gradients = [
            torch.autograd.grad((out * weights).sum() + 0.5 * commitment.sum(), x)[0]
            for out, commitment, x in ((output, loss, inputs[0]), (their_output[0], their_loss, inputs[1]))
        ]
        ours.update(states, indices)
        pairs = [
            (output, their_output[0]), (loss, their_loss.squeeze()), gradients,
            (ours.codes, theirs._codebook.embed[0]), (ours.counts, theirs._codebook.cluster_size[0]),
            (ours.sums, theirs._codebook.embed_avg[0]),
        ]  # fmt: skip
        for own, other in pairs:
            # fp32 sums of some 17 rows, in another order, ten times over
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    assert (ours.codes - codes).abs().mean() > 0.1


def test_a_call_changes_nothing():
    """What gradient checkpointing calls twice is one step all the same."""
    codebook = Codebook(6, 4)
    codebook.start(torch.randn(50, 4))
    before = copy.deepcopy(codebook.state_dict())
    for _ in range(2):
        codebook(torch.randn(30, 4))
    assert all(torch.equal(before[name], value) for name, value in codebook.state_dict().items())


def test_start_finds_clusters():
    """k-means from states at even distances: each of eight tight clusters, in turn in the rows, has a code."""
    centres = 10 * torch.randn(8, 5)
    states = centres.repeat_interleave(40, 0) + 0.01 * torch.randn(320, 5)
    codebook = Codebook(8, 5)
    codebook.start(states)
    distances = torch.cdist(centres, codebook.codes)
    assert distances.amin(1).max() < 0.01 and codebook.counts.tolist() == [40] * 8
    torch.testing.assert_close(codebook.sums, codebook.codes * 40)


def test_a_dead_code_begins_anew_as_a_state_of_the_batch():
    codebook = Codebook(4, 3, decay=0.5, min_count=2.0)
    codebook.codes.copy_(torch.tensor([[0.0, 0, 0], [100, 0, 0], [0, 100, 0], [0, 0, 100]]))
    codebook.counts.fill_(10.0)
    codebook.sums.copy_(10 * codebook.codes)
    for _ in range(3):
        states = torch.rand(64, 3)
        codebook.update(states, codebook(states)[1])
        assert (codebook.counts >= 2).all()
    # of the three that no state is near to, 10 fell to 1.25 in three steps
    for code, total in zip(codebook.codes[1:], codebook.sums[1:]):
        assert (states == code).all(1).any() and torch.equal(total, 2 * code)
    assert not (states == codebook.codes[0]).all(1).any()
    codebook.update(states, codebook(states)[1])
    assert (codebook.counts[1:] > 2).any()  # and it has states now


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path):
    """Bit for bit, with rows divided unevenly: starts, averages, and which states dead codes become."""
    run_program(PROGRAMS / "codebook.py", 2, tmp_path)
    expected = run(slice(None))
    assert len(expected["codes"].unique(dim=0)) > 10 and (expected["counts"] == 4).sum() >= 2  # died
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items()), rank


def test_a_state_dict_is_all_that_is_needed_to_go_on():
    straight, resumed = (Codebook(16, 6, decay=0.5, min_count=4.0, seed=3) for _ in range(2))
    straight.start(rows(0))
    for step in (1, 2, 3, 4):
        if step == 3:
            resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
        for codebook in (straight, resumed)[: 1 + (step >= 3)]:
            codebook.update(rows(step), codebook(rows(step))[1])
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in straight.state_dict().items())


def test_what_is_drawn_follows_from_the_seed():
    codebooks = [Codebook(16, 6, seed=seed) for seed in (3, 3, 4)]
    for codebook in codebooks:
        codebook.start(rows(0))
    first, same, other = (codebook.codes for codebook in codebooks)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_a_process_may_have_no_state_of_a_step():
    codebook = Codebook(6, 4, decay=0.5, min_count=0.1)
    codebook.start(torch.randn(50, 4))
    codes, counts = codebook.codes.clone(), codebook.counts.clone()
    codebook.update(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert torch.equal(codebook.counts, counts / 2) and codebook.codes.isfinite().all()
    torch.testing.assert_close(codebook.codes, codes, rtol=1e-4, atol=0)  # Laplace's epsilon, of a count of some 4


def test_a_cast_leaves_it_in_fp32():
    """As DeepSpeed casts a module to bf16; its states are of that type then, and so is what it returns."""
    codebook = Codebook(5, 4)
    codebook.start(torch.randn(40, 4))
    codes = codebook.codes.clone()
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), codebook).bfloat16()
    assert torch.equal(codebook.codes, codes) and codebook.counts.dtype == torch.float32
    states = torch.randn(20, 4, dtype=torch.bfloat16)
    output, indices, loss = codebook(states)
    assert torch.equal(output, codes[indices].bfloat16())  # and nothing of the states
    assert torch.equal(loss, (states.float() - codes[indices]).square().mean())
    codebook.update(states, indices)
    assert codebook.codes.dtype == torch.float32 and not torch.equal(codebook.codes, codes)
    assert model.to("meta")[1].codes.is_meta


def test_a_default_type_leaves_it_in_fp32():
    """transformers builds models under the type that they will have."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        codebook = Codebook(5, 4)
        codebook.start(torch.randn(40, 4))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {buffer.dtype for buffer in codebook.buffers()} == {torch.float32, torch.int64}
