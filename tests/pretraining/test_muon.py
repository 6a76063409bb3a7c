"""Muon: its update against plain numpy, what it is for, and what it is refused for."""

import copy
import json
import math

import numpy as np
import pytest
import torch

from dnazen.models import DNAZenConfig, DNAZenForMaskedLM
from dnazen.pretraining.muon import MOMENTUM, MuonAdamW, count_parts
from tests.helpers.launch import log_history
from tests.pretraining.test_resume import optimizer_state


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Five steps of x <- a x + b (x x') x + c (x x')^2 x, from the matrix over its Frobenius norm; fp64."""
    x = matrix / np.sqrt((matrix**2).sum())
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x


SHAPES = {"Wqkv": ((36, 12), 3), "gated_layers": ((40, 12), 2), "wo": ((12, 20), 1), "dense": ((12, 12), 1)}


def test_update_is_that_of_plain_numpy():
    """Three steps with momentum and decay, each part of a matrix by itself, beside AdamW's own for a bias."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, (shape, _) in SHAPES.items()}
    parameters = {name: torch.nn.Parameter(weight.clone()) for name, weight in weights.items()}
    bias = torch.nn.Parameter(torch.randn(5, generator=generator))
    adam_bias = copy.deepcopy(bias)
    adamw = {"lr": 0.01, "betas": (0.9, 0.98), "weight_decay": 0.3, "fused": True}
    optimizer, adam = MuonAdamW([bias], **adamw), torch.optim.AdamW([adam_bias], **adamw)
    parts = [count for _, count in SHAPES.values()]
    optimizer.add_param_group({"params": list(parameters.values()), "parts": parts, "lr": 0.02, "weight_decay": 0.1})
    expected = {name: weight.double().numpy() for name, weight in weights.items()}
    momenta = {name: np.zeros(weight.shape) for name, weight in weights.items()}
    for _ in range(3):
        bias.grad = torch.randn(5, generator=generator)
        adam_bias.grad = bias.grad.clone()
        for name, parameter in parameters.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            gradient, momentum = parameter.grad.double().numpy(), momenta[name]
            momentum += (1 - MOMENTUM) * (gradient - momentum)
            ahead = gradient + MOMENTUM * (momentum - gradient)
            updates = []
            for part in np.split(ahead, SHAPES[name][1]):
                updates.append(0.2 * math.sqrt(max(part.shape)) * newton_schulz(part))
                # an update as large as AdamW's
                assert 0.1 < np.sqrt((updates[-1] ** 2).mean()) < 0.25
            expected[name] = expected[name] * (1 - 0.02 * 0.1) - 0.02 * np.concatenate(updates)
        optimizer.step()
        adam.step()
    for name, parameter in parameters.items():
        # fp32: the iteration makes small singular values, and errors with them, up to 3.4445^5 = 485 times larger
        np.testing.assert_allclose(parameter.detach(), expected[name], rtol=0, atol=3 * 0.02 * 485 * 2**-24 * 5)
    assert torch.equal(bias, adam_bias)


def test_it_is_for_the_matrices_of_the_layers_alone():
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 36}
    config = DNAZenConfig(vocab_size=64, ngram_vocab_size=32, num_hidden_ngram_layers=1, neighbor_window=2, **sizes)
    named = dict(DNAZenForMaskedLM(config).named_parameters())
    found = {name: count for name, parameter in named.items() if (count := count_parts(name, parameter))}
    token, ngram = "bert.encoder.layer.0.", "bert.encoder.ngram_layers.0."
    assert found == {
        f"{token}attention.self.Wqkv.weight": 3,
        f"{token}attention.output.dense.weight": 1,
        f"{token}mlp.gated_layers.weight": 2,
        f"{token}mlp.wo.weight": 1,
        **{f"{ngram}attention.self.{name}.weight": 1 for name in ("query", "key", "value")},
        f"{ngram}attention.output.dense.weight": 1,
        f"{ngram}intermediate.dense.weight": 1,
        f"{ngram}output.dense.weight": 1,
    }
    # each part has as many columns as the model is wide, or rows
    assert all(24 in (named[name].shape[0] // count, named[name].shape[1]) for name, count in found.items())


@pytest.mark.slow
def test_groups_rates_and_schedule_of_a_run(straight_run):
    """8 steps: one of warm-up (6 %), five at the full rate, two of decay (20 %) along half a cosine."""
    checkpoint = straight_run("zero2-1") / "checkpoint-8"
    (file,) = checkpoint.rglob("*optim_states.pt")
    groups = torch.load(file, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]
    # decayed and not, the ways out apart at half the rate; Muon's at a rate of their own
    rates = [(group["initial_lr"], group["weight_decay"], group["parts"] and sum(group["parts"])) for group in groups]
    # two token layers (Wqkv, gated_layers) and one of the G-grams (query, key, value, intermediate); and their ways out
    matrices, ways_out = 2 * (3 + 2) + 4, 2 * 2 + 2
    muons = [(2e-3, 0.01, matrices), (1e-3, 0.01, ways_out)]
    assert sorted(rates, key=str) == sorted(
        [(5e-4, 0.01, None), (5e-4, 0.0, None), (2.5e-4, 0.0, None), *muons], key=str
    )
    assert all(group["fused"] for group in groups)
    logged = [entry["learning_rate"] for entry in log_history(checkpoint) if "loss" in entry]
    shares = [0, 1, 1, 1, 1, 1, 1, 0.5]
    np.testing.assert_allclose(logged, [5e-4 * share for share in shares], rtol=1e-12)
    run = json.loads((checkpoint.parent / "run.json").read_text())
    assert run["training"]["lr_scheduler_kwargs"] == {"num_decay_steps": 2} and run["training"]["optim"] == "muon"
    names = {name.rsplit("/", 1)[-1] for name in optimizer_state(checkpoint)}
    assert {"exp_avg", "step"} < names


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "zero3-2"])
def test_adamw_is_the_fused_one(straight_run, layout):
    """One kernel for all weights, not a loop over them; on a CPU too."""
    checkpoint = straight_run(layout) / "checkpoint-8"
    for file in sorted(checkpoint.rglob("*optim_states.pt")) or [checkpoint / "optimizer.pt"]:
        state = torch.load(file, weights_only=False)
        if "optimizer_state_dict" in state:
            state = state["optimizer_state_dict"]["optimizer_state_dict"]
        assert state["param_groups"] and all(group["fused"] for group in state["param_groups"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"optim": "muon", "deepspeed": "zero3"},
            "use ZeRO-1 or ZeRO-2 without offloading, or no DeepSpeed, got ZeRO-3",
        ),
        (
            {"optim": "muon", "deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}},
            "got ZeRO-2 with an optimizer that is offloaded",
        ),
        ({"muon_learning_rate": 0.01}, "--muon-learning-rate must be above 0 and go with --optim muon, got 0.01"),
        ({"optim": "muon", "muon_learning_rate": 0.0}, "--muon-learning-rate must be above 0"),
    ],
)
def test_where_it_cannot_be_had_it_is_refused(prepared, refused, tmp_path, arguments, message):
    if isinstance(arguments.get("deepspeed"), dict):
        (tmp_path / "offload.json").write_text(json.dumps(arguments["deepspeed"]))
        arguments = arguments | {"deepspeed": tmp_path / "offload.json"}
    assert message in refused(**prepared.arguments(), **arguments)


def test_schedule_longer_than_the_run_is_refused(prepared, refused, tmp_path):
    schedule = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": '{"num_decay_steps": 3}'}
    line = refused(**prepared.arguments(), **schedule, warmup_steps=2, output_dir=tmp_path)
    assert "expected at most 4 steps, found 2 of warm-up and 3 of decay" in line
