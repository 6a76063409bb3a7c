"""On processes of a group: optimizer steps of all ZeRO stages, some with a gradient that is spoilt on one process.

Fails where the norm is not DeepSpeed's own, where a step with a spoilt gradient moves a weight, or where a good one
does not; where Muon's steps on ZeRO's flat tensors are not those on the matrices themselves; and where our model's
gradient is not that of all its work, done without DeepSpeed.
"""

import copy
import math

import deepspeed
import torch

from dnazen.layers import linear
from dnazen.models import DNAZenConfig, DNAZenForMaskedLM
from dnazen.pretraining.muon import MuonAdamW, count_parts
from dnazen.training.script import exit_process, leave_process_group
from tests.helpers.zero_engine import build_engine, take_norm_at_once


def two_layers(stage: int, accumulation: int, bf16: bool, with_norm: bool = True) -> deepspeed.DeepSpeedEngine:
    """Two layers, one of them in a group of its own, by the configuration that is shipped."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "weight_decay": 0.0}]
    # several parts, and a matrix that is larger than one
    return build_engine(
        model, torch.optim.AdamW(groups, lr=0.1), stage, 4, accumulation, bf16, float(with_norm),
        reduce_bucket_size=200, compute_grad_norm=with_norm,
    )  # fmt: skip


def step(engine: deepspeed.DeepSpeedEngine, seed: int, spoilt_by: float | None, on_this: bool) -> float:
    """One optimizer step, whose norm is returned; in one micro-batch a number on the way back may become inf or NaN."""
    generator = torch.Generator().manual_seed(100 * seed + torch.distributed.get_rank())
    accumulation = engine.gradient_accumulation_steps()
    for micro_step in range(accumulation):
        input = torch.randn(4, 16, generator=generator).to(next(engine.module.parameters()).dtype)
        output = engine(input)
        if spoilt_by is not None and on_this and micro_step == seed % accumulation:
            spoilt = torch.zeros_like(output, dtype=torch.bool)
            spoilt[2, 1] = True
            output.register_hook(lambda gradient, spoilt=spoilt: gradient.masked_fill(spoilt, spoilt_by))
        engine.backward(output.float().square().mean())
        engine.step()
    norm = engine.get_global_grad_norm()
    return math.nan if norm is None else float(norm)


class Layer(torch.nn.Module):
    """Matrices of three shapes, one of them three in one, with the names that Muon knows; odd sizes, so that they lie
    across the borders of processes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        sizes = {"Wqkv": (7, 21), "gated_layers": (21, 18), "out": (18, 5), "wo": (5, 7)}
        self.encoder = torch.nn.ModuleDict({name: torch.nn.Linear(*size) for name, size in sizes.items()})

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        for layer in self.encoder.values():
            input = torch.tanh(layer(input))
        return input


def muon(model: torch.nn.Module) -> MuonAdamW:
    """Two groups of Muon's, one of AdamW's."""
    parts = {name: count_parts(name, parameter) for name, parameter in model.named_parameters()}
    assert sorted(parts.values()) == [0, 0, 0, 0, 1, 1, 2, 3]
    named = dict(model.named_parameters())
    first, second = [name for name, count in parts.items() if count][:3], ["encoder.wo.weight"]
    optimizer = MuonAdamW([named[name] for name, count in parts.items() if not count], lr=0.01, fused=True)
    for names in (first, second):
        matrices = {"params": [named[name] for name in names], "parts": [parts[name] for name in names]}
        optimizer.add_param_group({**matrices, "lr": 0.02, "weight_decay": 0.1})
    return optimizer


def compare_muon() -> None:
    """Three steps under ZeRO-1 and 2, whose processes see the same input, and three without DeepSpeed."""
    plain = Layer()
    optimizer = muon(plain)
    generator = torch.Generator().manual_seed(7)
    inputs = [torch.randn(4, 7, generator=generator) for _ in range(3)]
    for input in inputs:
        optimizer.zero_grad()
        plain(input).square().sum().backward()
        optimizer.step()
    begun = Layer().state_dict()
    for stage in (1, 2):
        model = Layer()
        engine = build_engine(model, muon(model), stage, 4, 1, False, 0.0)
        for input in inputs:
            engine.backward(engine(input).square().sum())
            engine.step()
        for name, found in model.state_dict().items():
            expected = plain.state_dict()[name]
            assert not torch.equal(expected, begun[name]), name
            # fp32; the iteration makes small singular values, and errors with them, up to 3.4445^5 = 485 times larger
            torch.testing.assert_close(found, expected, rtol=0, atol=3 * 0.02 * 485 * 2**-24 * 5)
        engine.destroy()


def check_model(stage: int) -> None:
    """The first process alone has masked tokens; the residuals' gradients are summed in the matrix products."""
    config = DNAZenConfig(
        vocab_size=50, ngram_vocab_size=20, num_hidden_layers=2, num_hidden_ngram_layers=1, hidden_size=24,
        num_attention_heads=2, intermediate_size=40, hidden_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DNAZenForMaskedLM(config)
    plain = copy.deepcopy(model)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    batches, losses = [], []
    for process in range(world_size):
        input_ids = torch.randint(5, 50, (14,), generator=torch.Generator().manual_seed(process))
        is_masked = (torch.arange(14) % 3 == 0) & (process == 0)
        cu_seqlens = torch.tensor([0, 9, 14], dtype=torch.int32)
        labels = torch.where(is_masked, input_ids, -100)
        batches.append(dict(input_ids=input_ids, labels=labels, cu_seqlens=cu_seqlens, max_seqlen=9))
        losses.append(plain(**batches[-1], output_hidden_states=True).loss)
    (sum(losses) / world_size).backward()
    expected = torch.stack([parameter.grad.norm() for parameter in plain.parameters()]).norm()
    small, linear.MIN_ELEMENTS = linear.MIN_ELEMENTS, 0
    engine = build_engine(model, torch.optim.AdamW(model.parameters()), stage, bf16=False)
    loss = engine(**batches[rank]).loss
    engine.backward(loss)
    engine.step()
    linear.MIN_ELEMENTS = small
    # sums of some 100 products and 30,000 squares in another order
    torch.testing.assert_close(loss, losses[rank], rtol=1e-5, atol=0)
    norm = torch.as_tensor(engine.get_global_grad_norm())
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0, check_dtype=False)
    engine.destroy()


def main() -> None:
    deepspeed.init_distributed("gloo")
    rank, last = torch.distributed.get_rank(), torch.distributed.get_world_size() - 1
    for stage in (1, 2, 3):
        check_model(stage)
        for accumulation in (1, 2):
            for bf16 in (False, True):
                engine = two_layers(stage, accumulation, bf16)
                zero = engine.optimizer
                name = "_get_norm_groups" if stage == 3 else "scaled_global_norm"
                own, norms = getattr(zero, name), []
                take_norm_at_once(engine)
                ours = getattr(zero, name)

                def both(own=own, ours=ours, norms=norms) -> object:
                    norms.append([torch.as_tensor(norm).norm() for norm in (own(), ours())])
                    return ours()

                setattr(zero, name, both)
                weights = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
                where = f"ZeRO-{stage}, {accumulation} micro-batches, bf16 {bf16}, process {rank}"
                for seed, spoilt_by in enumerate([None, math.inf, None, math.nan, -math.inf, None]):
                    before = [weight.detach().clone() for weight in weights]
                    norm = step(engine, seed, spoilt_by, on_this=rank == last)
                    moved = [not torch.equal(*pair) for pair in zip(before, weights, strict=True)]
                    if spoilt_by is None:
                        assert math.isfinite(norm) and all(moved), f"{where}, step {seed}: norm {norm}, moved {moved}"
                        # sums of at most 650 squares in another order
                        torch.testing.assert_close(*norms[-1], rtol=650 * 2**-24, atol=0, check_dtype=False)
                    else:
                        assert norm == math.inf and not any(moved), f"{where}, step {seed}: norm {norm}, moved {moved}"
                engine.destroy()
    compare_muon()
    engine = two_layers(2, 1, bf16=True, with_norm=False)  # then the search is all there is
    take_norm_at_once(engine)
    before = [weight.detach().clone() for weight in engine.optimizer.single_partition_of_fp32_groups]
    step(engine, 0, math.inf, on_this=rank == last)
    assert all(map(torch.equal, before, engine.optimizer.single_partition_of_fp32_groups)), "no norm: weights moved"
    print(f"process {rank}: all as it should be", flush=True)
    leave_process_group()


if __name__ == "__main__":
    main()
    exit_process(0)
