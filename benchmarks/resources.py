"""What every kernel takes of a multiprocessor, found by compiling it for GPUs that need not be there.

    python -m benchmarks.resources

Prints the table of `kernels/README.md`. Triton compiles from the types of a kernel's arguments, and `cuobjdump`, which
lies in its wheel, reads registers and spills from the result. TRITON_INTERPRET must not be set.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

# Compute capability -> bytes of shared memory per multiprocessor; all three hold 64 warps, 65536 registers and 32
# thread blocks (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
MAX_WARPS, MAX_REGISTERS, MAX_BLOCKS = 64, 65536, 32
REGISTER_UNIT, WARP_UNIT, RESERVED_SHARED = 256, 4, 1024  # registers go to warps, and warps to blocks, in such units


@dataclass(frozen=True)
class KernelSpec:
    """A kernel, and the types of its arguments as a launch would find them."""

    kernel: triton.JITFunction
    variant: str  # shown beside the kernel's name
    types: dict[str, str | None]  # None for an argument that is None
    constants: dict  # those of the launch, `num_warps` among them


@dataclass(frozen=True)
class CompiledKernel:
    """What came of a KernelSpec on one architecture."""

    name: str
    capability: int
    registers: int  # per thread
    spilled: int  # bytes of stack and local memory per thread
    shared: int  # bytes per thread block
    warps: int  # that a multiprocessor can hold at once, of 64
    ttir: str
    ptx: str


def fusion_specs() -> Iterator[KernelSpec]:
    from dnazen_kernels.ngram_fusion import triton_impl

    row, edges = "*bf16", dict(values_ptr="*bf16", offsets_ptr="*i32", indices_ptr="*i32")
    statistics = dict(mean_ptr="*fp32", rstd_ptr="*fp32")
    inputs = dict(x_ptr=row, residual_ptr=row, weight_ptr=row)
    norm = dict(**inputs, bias_ptr=row, out_ptr=row, **statistics, eps="fp32")
    norm_gradient = dict(grad_ptr=row, **inputs, **statistics, dz_ptr=row, partial_ptr="*fp32", num_rows="i32")
    no_edges, no_dropout, dropout = dict.fromkeys(edges), dict(seed_ptr=None), dict(seed_ptr="*i64")
    fusion, forward, backward = (
        getattr(triton_impl, f"_{name}_kernel")
        for name in ("ngram_fusion", "residual_layer_norm", "residual_layer_norm_backward")
    )
    for hidden_size in (768, 1024, 1536, 4096):
        constants = triton_impl.row_constants(hidden_size, torch.float32)
        plain, dropped = (
            triton_impl.backward_constants(hidden_size, torch.float32, num_dropped, sums_x=True)
            for num_dropped in (0, 6554)
        )
        for kernel, variant, types, more in (
            (fusion, "forward", dict(hidden_ptr=row, **edges, out_ptr=row), {}),
            (fusion, "backward", dict(hidden_ptr=None, **edges, out_ptr=row), {}),
            (forward, "with G-grams", norm | edges | no_dropout, dict(NUM_DROPPED=0)),
            (forward, "without", norm | no_edges | no_dropout, dict(NUM_DROPPED=0)),
            (forward, "with G-grams and drop-out", norm | edges | dropout, dict(NUM_DROPPED=6554)),
            (backward, "", norm_gradient | no_dropout | dict(dx_ptr=None), plain),
            (backward, "with drop-out", norm_gradient | dropout | dict(dx_ptr=row), dropped),
        ):
            yield KernelSpec(kernel, f"{variant} H={hidden_size}".strip(), types, constants | more)


def masking_specs() -> Iterator[KernelSpec]:
    from dnazen_kernels.ngram_masking import triton_impl

    constants = dict(BLOCK=triton_impl.BLOCK, num_warps=4)
    sizes = dict.fromkeys(("num_rows", "num_tokens", "num_ngrams", "num_sequences", "num_edges"), "i32")
    flags = dict.fromkeys(("own_ptr", "flags_ptr", "out_ptr", "masked_ptr", "kept_ptr"), "*i8")
    wide = dict.fromkeys(("scan_ptr", "ids_ptr", "new_ids_ptr"), "*i64")
    for kernel, variant, change in (
        (triton_impl._any_kernel, "by token", {}),
        (triton_impl._any_kernel, "by G-gram", dict(own_ptr=None)),
        (triton_impl._survivors_kernel, "", {}),
        (triton_impl._token_counts_kernel, "", {}),
        (triton_impl._compact_ngrams_kernel, "", {}),
        (triton_impl._compact_tokens_kernel, "", {}),
    ):
        types = dict.fromkeys(kernel.arg_names, "*i32") | sizes | flags | wide | change
        yield KernelSpec(kernel, variant, types, constants)


def matching_specs() -> Iterator[KernelSpec]:
    from dnazen_kernels.ngram_matching import triton_impl

    pointers = dict(tokens_ptr="*i64", ends_ptr="*i64", prefilter_ptr="*u8", keys_ptr="*i64", slots_ptr="*i64")
    constants = dict(BLOCK=triton_impl.BLOCK, num_warps=4)
    sizes = dict.fromkeys(("num_positions", "prefilter_size", "bits", "hash_bits"), "i32")
    yield KernelSpec(triton_impl._look_up_kernel, "", pointers | sizes, triton_impl.CONSTANTS | constants)


def lookup_specs() -> Iterator[KernelSpec]:
    from dnazen_kernels.code_lookup import triton_impl
    from dnazen_kernels.ngram_fusion import triton_impl as fusion

    types = dict(codes_ptr="*fp32", norms_ptr="*fp32", out_ptr="*i64", num_rows="i32")
    for kind in ("bf16", "fp32"):
        for num_codes in (512, 1024):
            constants = dict(NUM_CODES=num_codes, D=384, **triton_impl.CONSTANTS)
            variant = f"{kind} K={num_codes} D=384"
            yield KernelSpec(triton_impl._code_lookup_kernel, variant, types | dict(states_ptr=f"*{kind}"), constants)
    # the sums by code
    types = dict(hidden_ptr=None, values_ptr="*fp32", offsets_ptr="*i64", indices_ptr="*i64", out_ptr="*fp32")
    yield KernelSpec(
        fusion._ngram_fusion_kernel, "of codes, fp32 H=384", types, fusion.row_constants(384, torch.float32)
    )


REGISTRY = (fusion_specs, masking_specs, matching_specs, lookup_specs)


def compile_kernel(spec: KernelSpec, capability: int) -> CompiledKernel:
    """Compile as the launcher would, with all pointers aligned to 16 bytes."""
    names = spec.kernel.arg_names
    constants = {name: value for name, value in spec.constants.items() if name in names}
    constants |= {name: None for name, kind in spec.types.items() if kind is None}
    signature = {name: "constexpr" if name in constants else spec.types[name] for name in names}
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        spec.kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(index,): aligned for index, name in enumerate(names) if signature[name].startswith("*")},
    )
    num_warps = spec.constants["num_warps"]
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    shared = compiled.metadata.shared  # asked for at the launch, so not in the cubin
    warps = resident_warps(capability, num_warps, registers, shared)
    name = f"{spec.kernel.__name__} {spec.variant}".strip()
    asm = compiled.asm
    return CompiledKernel(name, capability, registers, stack + local, shared, warps, asm["ttir"], asm["ptx"])


def resident_warps(capability: int, num_warps: int, registers: int, shared: int) -> int:
    """The theoretical occupancy, in warps per multiprocessor, of blocks of `num_warps`."""
    registers_per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = MAX_REGISTERS // registers_per_warp // WARP_UNIT * WARP_UNIT
    blocks = min(by_registers, MAX_WARPS) // num_warps
    return min(blocks, SHARED_MEMORY[capability] // (shared + RESERVED_SHARED), MAX_BLOCKS) * num_warps


def compile_all() -> Iterator[CompiledKernel]:
    """Every registered kernel on every architecture."""
    for specs in REGISTRY:
        for spec in specs():
            for capability in SHARED_MEMORY:
                yield compile_kernel(spec, capability)


def main() -> None:
    rows: dict[str, list[str]] = {}
    for kernel in compile_all():
        cell = f"{kernel.registers} / {kernel.spilled} / {kernel.shared} / {kernel.warps}"
        rows.setdefault(kernel.name, []).append(cell)
    print(f"| kernel | {' | '.join(f'sm_{capability}' for capability in SHARED_MEMORY)} |")
    print("|---" * (1 + len(SHARED_MEMORY)) + "|")
    for name, cells in rows.items():
        kernel, _, variant = name.partition(" ")
        print(f"| {' '.join(filter(None, (f'`{kernel}`', variant)))} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
