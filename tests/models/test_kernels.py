"""The model through Triton kernels against the same through plain PyTorch."""

import copy
import math

import pytest
import torch

from dnazen.models import DNAZenForMaskedLM

STEPS = 2
RUNS = {
    "fp32": dict(dtype=torch.float32),
    "bf16": dict(dtype=torch.bfloat16),
    "autocast": dict(dtype=torch.float32, autocast=True),
}


def train(model, batch, impl, dtype, autocast=False):
    """Losses of some steps of gradient descent, the last logits, and how far every parameter has moved; all in fp64."""
    model = copy.deepcopy(model).to(dtype)
    model.config.impl = impl
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=autocast):
            output = model(**batch)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.detach().double())
    moved = torch.nn.utils.parameters_to_vector(model.parameters()).detach().double() - start.double()
    return {"losses": torch.stack(losses), "logits": output.logits.detach().double(), "moved": moved}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_training_through_kernels_is_as_exact_as_through_pytorch(run, config, make_batch, device):
    """Against fp64: at most twice the error of plain PyTorch in the same dtype, plus a budget."""
    batch = make_batch([6, 3, 4], [3, 0, 2])
    batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    model = DNAZenForMaskedLM(config).to(device)
    truth = train(model, batch, "reference", torch.float64)
    assert truth["losses"][-1] < 0.8 * truth["losses"][0]
    eager, ours = (train(model, batch, impl, **RUNS[run]) for impl in ("reference", "triton"))
    # A number passes through our kernels 2 * 3 + 2 * 2 times forward and as often backward in each step, and each time
    # is rounded to the dtype once; independent roundings add up as a random walk.
    passes = 2 * 10 * STEPS
    dtype = torch.float32 if run == "fp32" else torch.bfloat16
    for name, expected in truth.items():
        eager_error, error = ((result[name] - expected).norm() / expected.norm() for result in (eager, ours))
        bound = 2 * eager_error + math.sqrt(passes) * torch.finfo(dtype).eps
        assert error <= bound, f"{name}: error {error:.3g}, plain PyTorch's {eager_error:.3g}"


@pytest.mark.slow
def test_the_same_is_dropped_through_kernels_and_through_pytorch(config, make_batch, device):
    """And so loss and gradients differ by fp32 rounding alone; see `LOGITS` and `GRADIENTS` in test_modeling.py."""
    config.hidden_dropout_prob = 0.3
    batch = make_batch([6, 3, 4], [3, 0, 2])
    batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    plain = DNAZenForMaskedLM(config).to(device).train()
    results = []
    for impl in ("auto", "triton"):
        model = copy.deepcopy(plain)
        model.config.impl = impl
        torch.manual_seed(3)
        loss = model(**batch).loss
        loss.backward()
        results.append({"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    torch.testing.assert_close(*results, rtol=1e-5, atol=2e-5)
    model.eval()
    assert abs(model(**batch).loss - loss) > 0.01, "drop-out must matter for the test to tell"
