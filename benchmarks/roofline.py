"""What the kernels must move and compute at base size, and the time that takes at best on two GPUs: predicted.

    python -m benchmarks.roofline [--fasta FILE --tokenizer DIR]

Prints the tables of README.md here, in Markdown. Needs no GPU: bytes and operations follow from a real batch's sizes.
Bytes of kernels are those of `registry.py`, each element of each operand once; of PyTorch's operations, their inputs
and outputs, as if every one of them went to memory and back.
"""

import argparse
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks import registry
from benchmarks.batches import Batch, add_genome_arguments, load_genomes, make_batch, ngrams_of
from benchmarks.registry import ROOM, FusionInputs, Sizes

BANDWIDTHS = {"3.3 TB/s": 3.3e12, "4.3 TB/s": 4.3e12}  # measured copies of an H100 and an H200
MATMUL_FLOPS = {torch.float32: 67e12, torch.bfloat16: 790e12}  # per second: H100's datasheet, without TF32; measured
TF32_FLOPS = 495e12  # H100's datasheet
LAUNCH_SECONDS = 5e-6  # the host's time to launch one operation of PyTorch, about
STEP_TOKENS_PER_SECOND = 600e3  # of the base model, which we aim at
NUM_TOKENS, SEQUENCE_LENGTH, HIDDEN_SIZE = 262_144, 512, 768
RADIX_PASSES = 8  # of a sort of 64-bit keys by 8 bits at a time; each reads and writes keys and positions

# No kernel of PyTorch: views, allocations, and what Triton's interpreter does to hand over a tensor.
FREE = {
    "alias", "copy_", "detach", "empty", "empty_like", "expand", "new_empty", "permute", "promote_types",
    "scalar_tensor", "select", "set_", "slice", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
    "_unsafe_view",
}  # fmt: skip
GATHERS = {"embedding", "index", "index_select", "gather"}
SCATTERS = {"index_add_"}
LAUNCHES = {"dnazen::ngram_masking": 8, "dnazen::residual_layer_norm_backward": 2}  # as op.py says; of others 1


class Row(NamedTuple):
    """Operations launched, bytes and floating-point operations of something."""

    name: str
    launches: int
    num_bytes: int
    flops: int = 0
    multiplying: float = 0.0  # seconds of matrix products

    def seconds(self, bandwidth: float) -> float:
        """Moving the bytes and multiplying matrices; at least the host's time if launched as several operations."""
        on_device = self.num_bytes / bandwidth + self.multiplying
        return on_device if self.launches == 1 else max(on_device, self.launches * LAUNCH_SECONDS)


class Traffic(TorchDispatchMode):
    """Counts launched operations, the bytes of their inputs and outputs, and the time of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.num_bytes, self.multiplying = 0, 0, 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in FREE:
            return result
        inputs, outputs = (
            [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)] for values in ((args, kwargs), result)
        )
        if name == "sort":
            self.num_bytes += 2 * RADIX_PASSES * sum(tensor.nbytes for tensor in outputs)
        elif name in GATHERS:  # what is not asked for is not read
            self.num_bytes += 2 * outputs[0].nbytes + sum(tensor.nbytes for tensor in inputs[1:])
        elif name in SCATTERS:  # nor is what nothing is added to
            indices, addends = inputs[1:]
            self.num_bytes += indices.nbytes + 3 * addends.nbytes
        elif name == "ngram_fusion":  # reads no row that no edge leads to, and one of the views
            hidden_states, values, offsets, indices, *_ = args
            reached = min(values.nbytes, len(indices) * values.shape[1] * values.itemsize)
            others = [tensor for tensor in (hidden_states, offsets, indices, *outputs) if tensor is not None]
            self.num_bytes += reached + sum(tensor.nbytes for tensor in others)
        else:
            self.num_bytes += sum(tensor.nbytes for tensor in inputs + outputs)
        if name in ("bmm", "baddbmm"):
            self.multiplying += 2 * outputs[0].numel() * inputs[-1].shape[1] / MATMUL_FLOPS[outputs[0].dtype]
        self.launches += LAUNCHES.get(f"{function.namespace}::{name}", 1)
        return result

    def row(self, name: str) -> Row:
        return Row(name, self.launches, self.num_bytes, multiplying=self.multiplying)


def kernel_rows(sizes: Sizes) -> list[Row]:
    """The fusion, as if in one launch; FLOPs of LayerNorm per element as its formula is written in `triton_impl.py`."""
    elements = sizes.num_tokens * sizes.hidden_size
    added = sizes.num_edges * sizes.hidden_size
    without = Sizes(sizes.num_tokens, sizes.num_sequences, 0, 0, 0, sizes.hidden_size, sizes.itemsize)
    # forward: residual, mean, centre, square and sum, two scalings, bias; backward: the residual, n (2), gradient times
    # weight, the two means (3), their sum (2), difference, scaling, the sums of weight (2) and bias; drop-out scales
    # once forward, twice backward, and there the bias before it is summed too
    forward, backward = 8 * elements, 14 * elements
    return [
        Row("`ngram_fusion`, forward", 1, registry.fusion_forward_bytes(sizes), added),
        Row("`ngram_fusion`, backward", 1, registry.fusion_backward_bytes(sizes), added),
        Row("`residual_layer_norm` with G-grams, forward", 1, registry.norm_forward_bytes(sizes), forward + added),
        Row("`residual_layer_norm` with G-grams, backward", 1, registry.norm_backward_bytes(sizes), backward + added),
        Row(
            "`residual_layer_norm` with G-grams and drop-out, forward", 1,
            registry.norm_forward_bytes(sizes, dropout=True), forward + elements + added,
        ),
        Row(
            "`residual_layer_norm` with G-grams and drop-out, backward", 1,
            registry.norm_backward_bytes(sizes, dropout=True, x_bias=True), backward + 3 * elements + added,
        ),
        Row("`residual_layer_norm` without, forward", 1, registry.norm_forward_bytes(without), forward),
        Row("`residual_layer_norm` without, backward", 1, registry.norm_backward_bytes(without), backward),
    ]  # fmt: skip


def integer_rows(batch: Batch) -> list[Row]:
    """Matching and masking as they run on a GPU: every operation's traffic, with Triton's kernels interpreted."""
    from dnazen_kernels.ngram_masking import ngram_masking
    from dnazen_kernels.ngram_matching import triton_impl

    matches = batch.matches
    capacity = tuple(int(ROOM * len(tensor)) for tensor in (matches.ngram_input_ids, matches.edges.token_ngrams))
    with Traffic() as matching:
        triton_impl.match_ngrams(batch.input_ids, batch.cu_seqlens, batch.table, None, capacity)
    # The look-up: a token, the end of its sequence and its byte of the prefilter; four slots.
    look_up = len(batch.input_ids) * (8 + 8 + 1 + 4 * 8)
    with Traffic() as masking:
        ngram_masking(batch.input_ids, **ngrams_of(matches), **batch.masking, impl="triton")
    return [
        Row("`ngram_matching`", matching.launches + 1, matching.num_bytes + look_up),
        masking.row("`ngram_masking`"),
    ]


def lookup_rows(num_rows: int = 65_536, size: int = 384) -> list[Row]:
    """A micro-batch of bases and VQDNA's codebooks, fp32; beside PyTorch's `cdist` and `argmin`.

    `cdist` (ATen's `_euclidean_dist`) squares, sums, doubles and joins the rows, eight passes with their product, and
    clamps and takes roots of that in place: distances are written three times and read twice, and again by `argmin`.
    """
    rows, states = [], 4 * num_rows * size
    for num_codes in (512, 1024):
        products, scores = 2 * num_rows * num_codes * size, 4 * num_rows * num_codes
        codes, indices = 4 * num_codes * size, 8 * num_rows
        ends = f" K={num_codes}"
        plain = 8 * states + codes + 6 * scores + indices
        rows += [
            Row("`code_lookup`" + ends, 1, states + codes + indices, products, 3 * products / TF32_FLOPS),
            Row("`cdist`, `argmin`" + ends, 1, plain, products, products / MATMUL_FLOPS[torch.float32]),
        ]
    # sorted by code, then read row by row
    sorting = 2 * RADIX_PASSES * 2 * 8 * num_rows
    rows.append(Row("`code_sums` K=1024", 1, states + sorting + 8 * num_rows + 4 * 1024 * size, num_rows * size))
    return rows


def implementation_rows(batch: Batch, name: str) -> list[Row]:
    """Every implementation of a fusion, forward and backward; on the meta device, where nothing is computed."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = registry.fusion_inputs(batch, HIDDEN_SIZE, dtype, torch.device("cpu"))
        meta = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), vars(inputs))
        for impl, (_, prepare) in registry.OPERATORS[name].implementations.items():
            if not impl.endswith("compiled"):  # what a compiler fuses is not known before it has
                case = prepare(FusionInputs(**meta))
                with Traffic() as traffic:
                    torch.autograd.grad(case.run(), case.leaves, case.grad)
                rows.append(traffic.row(f"{impl}, {str(dtype).removeprefix('torch.')}"))
    return rows


def table(rows: list[Row], columns: dict[str, Callable[[Row], str]]) -> str:
    """Markdown."""
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {row.name} | {' | '.join(column(row) for column in columns.values())} |" for row in rows]
    return "\n".join(lines)


def print_tables(batch: Batch) -> None:
    inputs = registry.fusion_inputs(batch, HIDDEN_SIZE, torch.bfloat16, torch.device("cpu"))
    sizes = inputs.sizes
    before = len(batch.matches.ngram_input_ids), len(batch.matches.edges.token_ngrams)
    times = {
        f"µs at {name}": lambda row, bandwidth=bandwidth: f"{1e6 * row.seconds(bandwidth):,.1f}"
        for name, bandwidth in BANDWIDTHS.items()
    }
    moved = {"MB": lambda row: f"{row.num_bytes / 1e6:,.1f}"}
    launched = {"launches": lambda row: str(row.launches)}
    density = " and ".join(f"{count / sizes.num_tokens:.4f}" for count in before)
    masked = " and ".join(f"{count / sizes.num_tokens:.4f}" for count in (sizes.num_ngrams, sizes.num_edges))
    print(f"\n{sizes.num_tokens:,} tokens in {sizes.num_sequences} sequences; per token {density} G-grams and edges")
    print(f"before masking, {masked} after; {sizes.num_covered / sizes.num_tokens:.1%} of the tokens are covered\n")
    print(table(kernel_rows(sizes), moved | {"GFLOP": lambda row: f"{row.flops / 1e9:.2f}"} | times), end="\n\n")

    step = sizes.num_tokens / STEP_TOKENS_PER_SECOND
    rows = integer_rows(batch)
    rows.append(Row("both", sum(row.launches for row in rows), sum(row.num_bytes for row in rows)))
    share = {f"of a step of {1e3 * step:.0f} ms": lambda row: f"{row.seconds(BANDWIDTHS['3.3 TB/s']) / step:.2%}"}
    print(table(rows, launched | moved | times | share), end="\n\n")

    print(table(lookup_rows(), moved | {"GFLOP": lambda row: f"{row.flops / 1e9:.2f}"} | times), end="\n\n")

    for name in ("ngram_fusion", "residual_layer_norm"):
        rows = implementation_rows(batch, name)
        print(f"`{name}`, forward and backward:\n")
        print(table(rows, launched | moved | times), end="\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_genome_arguments(parser)
    args = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
    genomes = load_genomes(args.fasta, args.tokenizer, (SEQUENCE_LENGTH,))
    print_tables(make_batch(genomes[SEQUENCE_LENGTH], NUM_TOKENS))


if __name__ == "__main__":
    main()
