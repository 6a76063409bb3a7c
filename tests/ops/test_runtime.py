"""Choice of implementation."""

import subprocess
import sys

import pytest
import torch

from dnazen_kernels._runtime import resolve_impl

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_auto_is_triton_on_a_gpu_and_the_reference_elsewhere():
    assert resolve_impl("auto", CUDA) == "triton"
    assert resolve_impl("auto", CPU) == "reference"
    assert resolve_impl("reference", CUDA) == "reference"


def test_triton_by_name_on_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_impl("triton", CPU) == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert resolve_impl("triton", CUDA) == "triton"
    with pytest.raises(RuntimeError, match="impl='triton' needs CUDA tensors, or TRITON_INTERPRET=1 .*, got cpu"):
        resolve_impl("triton", CPU)


def test_unknown_impl():
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'triton', 'reference', got 'cuda'"):
        resolve_impl("cuda", CPU)


@pytest.mark.slow
def test_reference_runs_without_triton_and_flash_attn(root):
    """In a fresh interpreter in which neither can be imported."""
    code = """
import sys
sys.modules["triton"] = sys.modules["flash_attn"] = None
import torch
from dnazen.models import DNAZenConfig, DNAZenModel
from dnazen_kernels._runtime import resolve_impl
from dnazen_kernels.ngram_edges import NgramEdges
from dnazen_kernels.ngram_fusion import ngram_fusion

edges = [torch.tensor(values, dtype=torch.int32) for values in ([0, 0, 2], [0, 0], [0, 2], [1, 1])]
output = ngram_fusion(torch.zeros(2, 3), torch.ones(1, 3), NgramEdges(*edges))
assert output.tolist() == [[0, 0, 0], [2, 2, 2]]
DNAZenModel(DNAZenConfig.from_size("tiny", ngram_vocab_size=9))(torch.tensor([[1, 7, 2]]))
assert resolve_impl("auto", torch.device("cuda")) == "reference"
try:
    resolve_impl("triton", torch.device("cuda"))
except RuntimeError as error:
    assert "needs the package triton, which is not installed" in str(error)
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
