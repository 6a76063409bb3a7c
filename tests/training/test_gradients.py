"""The end of a step under DeepSpeed: what is not finite stops it before the weights change, in few operations."""

import json
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dnazen.models import DNAZenConfig, DNAZenForMaskedLM
from dnazen.planning.cost import MICRO_LAUNCHES, STEP_LAUNCHES, TENSOR_LAUNCHES
from dnazen.pretraining.deepspeed import separate_steps
from dnazen.pretraining.training_arguments import PretrainingArguments
from tests.helpers.launch import PROGRAMS, ROOT, environment, run_program


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_gradient_that_is_not_finite_on_one_process_moves_no_weight(processes):
    """inf, NaN and -inf; ZeRO-1, 2 and 3; fp32 and bf16; with accumulation and without.

    Good steps have DeepSpeed's norm, and a step of our model has the norm of all its work done plainly.
    """
    assert run_program(PROGRAMS / "zero_steps.py", processes).count("all as it should be") == processes


@pytest.mark.slow
def test_operations_of_an_optimizer_step():
    """DeepSpeed's own search and norms take 15 for each of the model's tensors, under ZeRO-3 norms alone."""
    line = next(line for line in run_program(PROGRAMS / "step_operations.py", 1).splitlines() if line.startswith("{"))
    counts = json.loads(line)
    assert all(counts[stage][0] <= 100 < 3000 < counts[stage][2] for stage in ("ZeRO-1", "ZeRO-2")), counts
    assert counts["ZeRO-3"][0] <= 400 < 700 < counts["ZeRO-3"][2], counts
    for stage in (1, 2, 3):  # what the prediction of a step takes them to be
        step, backward, _ = counts[f"ZeRO-{stage}"]
        assert step == pytest.approx(STEP_LAUNCHES[stage], rel=0.1), counts
        in_tensors = TENSOR_LAUNCHES[1] if stage == 1 else MICRO_LAUNCHES[stage]
        summed = 36 if stage == 3 else 0  # biases at the ends of sub-layers: a layer with hooks sums their gradients
        assert backward == pytest.approx(in_tensors * 241 + summed, rel=0.05), counts


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_gradients_are_reduced_in_several_parts_while_the_backward_runs(zero):
    """Beside the table of G-grams, which is larger than a part and goes alone."""
    settings = json.loads((ROOT / "ds_configs" / f"zero{zero}.json").read_text())
    with torch.device("meta"):
        model = DNAZenForMaskedLM(DNAZenConfig.from_size("base", vocab_size=4096, ngram_vocab_size=162_708))
    bucket = settings["zero_optimization"]["reduce_bucket_size"]
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert sum(size for size in sizes if size <= bucket) / bucket > 3


@pytest.mark.parametrize("use_ngrams", [True, False])
@pytest.mark.parametrize("window", [0, 2])
def test_every_parameter_has_a_gradient_where_there_are_no_ngrams(use_ngrams, window):
    """Else data-parallel training, which is told not to look for unused ones, would wait for it."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = DNAZenConfig(
        vocab_size=64,
        ngram_vocab_size=32,
        num_hidden_ngram_layers=1,
        use_ngrams=use_ngrams,
        neighbor_window=window,
        **sizes,
    )
    model = DNAZenForMaskedLM(config)
    input_ids = torch.randint(5, 60, (20,), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(20) % 3 == 0, input_ids, -100)
    cu_seqlens = torch.tensor([0, 12, 20], dtype=torch.int32)
    model(input_ids=input_ids, cu_seqlens=cu_seqlens, max_seqlen=12, labels=labels).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert PretrainingArguments.__dataclass_fields__["ddp_find_unused_parameters"].default is False


@pytest.mark.slow
@pytest.mark.parametrize("script", ["pretrain.py", "finetune.py"])
def test_memory_segments_grow_and_threads_sleep_unless_the_user_says_otherwise(script):
    """By the time that torch is imported, which is kept from it here."""
    program = "import os, runpy, sys; sys.modules['torch'] = None\n"
    program += "try: runpy.run_path(sys.argv[1], run_name='__main__')\n"
    program += "except ImportError: print(os.environ.get('PYTORCH_ALLOC_CONF'), os.environ.get('OMP_WAIT_POLICY'))"
    for given, expected in (
        ({}, ["expandable_segments:True", "PASSIVE"]),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native", "OMP_WAIT_POLICY": "ACTIVE"}, ["None", "ACTIVE"]),
        ({"GOMP_SPINCOUNT": "5"}, ["expandable_segments:True", "None"]),
    ):
        line = [sys.executable, "-c", program, str(ROOT / "dnazen" / script)]
        result = subprocess.run(line, env={**environment(), **given}, capture_output=True, text=True)
        assert result.stdout.split() == expected, result.stderr


@pytest.mark.parametrize(("fused", "expected"), [(True, "cuda"), (False, "cpu")])
def test_step_counters_lie_where_the_optimizer_reads_them(fused, expected):
    """After DeepSpeed's loader, which leaves one on the CPU, shared by all parameters."""
    with FakeTensorMode():
        parameters = [torch.nn.Parameter(torch.zeros(3, device="cuda")) for _ in range(2)]
        optimizer = torch.optim.AdamW(parameters, fused=fused)
        step = torch.tensor(7.0)
        for parameter in parameters:
            optimizer.state[parameter] = {"step": step, "exp_avg": torch.zeros_like(parameter)}
        separate_steps(optimizer)
        first, second = (optimizer.state[parameter]["step"] for parameter in parameters)
    assert first.device.type == second.device.type == expected
    assert first is not second and first is not step and second is not step
