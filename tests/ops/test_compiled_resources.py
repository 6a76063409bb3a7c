"""Every kernel compiled for the GPUs we aim at, which need not be there."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.slow  # all wait for the compiler

COMPILE = """
import json
from dataclasses import asdict
from benchmarks.resources import compile_all
print(json.dumps([asdict(kernel) for kernel in compile_all()]))
"""
LOAD_OR_STORE = re.compile(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\b")
COPY_TO_SHARED = re.compile(r"\bcp\.async\.c[ag]\.shared\.global .*, 0x(\w+), ")
COPIES_LEFT = re.compile(r"\bcp\.async\.wait_group\s+(\d+);")


@pytest.fixture(scope="module")
def compiled(root) -> dict[str, dict]:
    """By name and architecture. In a process of its own, for here kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    output = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return {f"{kernel['name']} sm_{kernel['capability']}": kernel for kernel in json.loads(output)}


def of_fusion(compiled) -> dict[str, dict]:
    kernels = {name: kernel for name, kernel in compiled.items() if re.match("_ngram_fusion|_residual", name)}
    assert len(kernels) == (7 * 4 + 1) * 3  # kernels, hidden sizes, architectures; and sums by code
    return kernels


def test_no_kernel_spills(compiled):
    assert {name: kernel["spilled"] for name, kernel in compiled.items() if kernel["spilled"]} == {}
    assert all(0 < kernel["registers"] <= 255 for kernel in compiled.values())


def test_rows_are_read_and_written_16_bytes_at_a_time(compiled):
    """All of a row: the loads and stores of another width are as many as those of scalars in the source.

    Where rows come through shared memory, the copies stand three times: for the first two rows, and in the loop. The
    seed, of 8 bytes, is loaded once; so wide are the offsets and indices of the sums by code, too.
    """
    for name, kernel in of_fusion(compiled).items():
        scalars = [line for line in kernel["ttir"].splitlines() if re.search(r"tt\.(load|store) .*: !tt\.ptr<", line)]
        copies = [int(width, 16) for width in COPY_TO_SHARED.findall(kernel["ptx"])]
        widths = copies + [int(v or 1) * int(bits) // 8 for v, bits in LOAD_OR_STORE.findall(kernel["ptx"])]
        num_wide = sum("!tt.ptr<i64>" in line for line in scalars)
        expected = len(scalars) if "of codes" in name else int("drop-out" in name)
        assert num_wide == expected and set(widths) <= {4, 8, 16}, name
        assert widths.count(4) == (len(scalars) - num_wide) * (3 if copies else 1), name
        assert widths.count(8) == num_wide and widths.count(16) >= 8, name


def test_backward_loads_the_next_row_while_it_sums_one(compiled):
    """The wait for a row leaves the copies of the next under way: three inputs, mean and rstd."""
    kernels = {name: kernel for name, kernel in of_fusion(compiled).items() if "backward_kernel" in name}
    assert len(kernels) == 2 * 4 * 3
    for name, kernel in kernels.items():
        in_loop, behind = COPIES_LEFT.findall(kernel["ptx"])
        assert (in_loop, behind) == ("5", "0"), name


def test_offsets_are_int64(compiled):
    """Every product (row times row length, and those of random numbers) is of 64 bits, so no tensor is too large."""
    for name, kernel in (of_fusion(compiled) | of_lookup(compiled)).items():
        products = re.findall(r"arith\.muli .*: (?:tensor<(?:\d+x)+)?([a-z]\w*)", kernel["ttir"])
        assert products and set(products) == {"i64"}, name


def of_lookup(compiled) -> dict[str, dict]:
    kernels = {name: kernel for name, kernel in compiled.items() if name.startswith("_code_lookup")}
    assert len(kernels) == 4 * 3  # types and numbers of codes, architectures
    return kernels


def test_addresses_of_masking_and_matching_are_int64(compiled):
    others = of_fusion(compiled) | of_lookup(compiled)
    kernels = {name: kernel for name, kernel in compiled.items() if name not in others}
    assert len(kernels) == 7 * 3
    for name, kernel in kernels.items():
        offsets = re.findall(r"tt\.addptr .*, tensor<\d+x(\w+)>", kernel["ttir"])
        assert offsets and set(offsets) == {"i64"}, name


def test_backward_s_programs_are_all_resident(compiled):
    from dnazen_kernels.ngram_fusion import triton_impl

    kernels = {name: kernel for name, kernel in of_fusion(compiled).items() if "backward_kernel" in name}
    assert len(kernels) == 2 * 4 * 3
    for name, kernel in kernels.items():
        has_dropout, hidden_size = "drop-out" in name, int(re.search(r"H=(\d+)", name)[1])
        num_warps = triton_impl.backward_constants(hidden_size, torch.float32, has_dropout, True)["num_warps"]
        wanted = triton_impl.WARPS_PER_SM_WITH_DROPOUT if has_dropout else triton_impl.WARPS_PER_SM
        assert kernel["warps"] >= max(wanted // num_warps, 1) * num_warps, name


def test_codes_are_looked_up_by_tensor_cores(compiled):
    """Three products of TF32 for each of fp32, in which 2^-22 of it is left out; none in TF32 alone."""
    instructions = {80: r"mma\.sync\S*tf32", 90: r"wgmma\S*tf32", 100: r"tcgen05\.mma\S*tf32"}
    for name, kernel in of_lookup(compiled).items():
        assert re.search(instructions[kernel["capability"]], kernel["ptx"]), name
        assert re.findall(r"inputPrecision = (\w+)", kernel["ttir"]) == ["tf32x3"], name
