"""What one training step of the base model must compute and move, part by part, and the time that takes: predicted.

    python -m benchmarks.budget [--fasta FILE --tokenizer DIR]
    python -m benchmarks.budget --corpus DIR --ngrams DIR [--model SIZE --tokens N] --output FILE

Prints the table of README.md here, in Markdown; `--output` writes what `benchmarks.gpu` holds its measurements against,
for a prepared corpus, as JSON. Needs no GPU. Kernels of compiled parts are those that PyTorch's
compiler schedules for them; of the others, one for each of PyTorch's operations. A kernel takes as long as its
arithmetic or its traffic, whichever is longer, at what was measured on an H200; traffic is each operand once, and
launching costs nothing.
"""

# ruff: noqa: E402
import argparse
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, Scheduler, SchedulerNode
from torch._inductor.virtualized import V
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.attention import SHAPES
from benchmarks.batches import Batch, Genome, add_genome_arguments, load_genomes, make_batch, open_genome
from benchmarks.roofline import LAUNCH_SECONDS, Traffic, implementation_rows, integer_rows
from benchmarks.run import BATCH_TOKENS
from benchmarks.yeast import ROOT
from dnazen.files import read_json, write_json
from dnazen.layers.encoder import NgramLayer, TokenLayer
from dnazen.layers.fusion import packed_add_norm
from dnazen.models import DNAZenConfig, DNAZenForMaskedLM
from dnazen.planning.kernel import Kernel, Part
from dnazen.planning.step import BatchShape, attention_kernels
from dnazen.pretraining.bench.flops import training_flops
from dnazen.sizes import RECIPES
from dnazen_kernels.ngram_edges import NgramEdges
from dnazen_kernels.ngram_masking import IGNORE_INDEX

FLOPS, BANDWIDTH, DATASHEET_FLOPS = 790e12, 4.3e12, 990e12  # per second: measured, measured, and what MFU divides by
SEQUENCE_LENGTH = 512
NGRAM_VOCAB_SIZE = 162_708  # published
# Read and written for a parameter, from its gradient to its new weight, by DeepSpeed 0.19.8 on one process under
# ds_configs/zero2.json, kernel by kernel (stage_1_and_2.py). Of the gradient, in bf16: to the bucket 4, divided 4,
# joined 4, copied back 4; in fp32: the sum zeroed 4, converted 6, added 12, norm 4, clipped 8; AdamW 28; bf16 weight 6.
# The reduction is nothing. A parameter larger than a bucket is neither copied to it nor joined with others.
OPTIMIZER_BYTES, OPTIMIZER_BYTES_IF_LARGE = 84, 76
ZERO_2 = read_json(ROOT / "ds_configs" / "zero2.json", "a configuration of DeepSpeed's")["zero_optimization"]


Counted = tuple[list[Kernel], list[Kernel]]  # of forward and backward


class EagerKernels(Traffic):
    """Every operation of PyTorch as a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = self.launches, self.num_bytes
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if self.launches > before[0]:
            count = flop_registry.get(function.overloadpacket, lambda *_, **__: 0)
            flops = count(*args, **(kwargs or {}), out_val=result)
            self.kernels.append(kernel(self.num_bytes - before[1], flops, tree_leaves(result)[0].numel()))
            self.kernels += [Kernel(0)] * (self.launches - before[0] - 1)
        return result


def kernel(num_bytes: float, flops: float, outputs: int, draws: float = 0.0) -> Kernel:
    """What was counted as a Kernel; FLOPs are those of a matrix product with so many outputs."""
    return (
        Kernel(num_bytes, flops, "matmul", flops / 2 / outputs, draws=draws)
        if flops
        else Kernel(num_bytes, draws=draws)
    )


def eager_kernels(run: Callable[[], Tensor], *beside: Tensor) -> Counted:
    """Of forward and backward, on the meta device, where nothing is computed; gradients come from what is `beside`
    too."""
    with EagerKernels() as forward:
        outputs = [run(), *beside]
    with EagerKernels() as backward:
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
    return forward.kernels, backward.kernels


def compiled_kernels(module: nn.Module, *args) -> Counted:
    """Of forward and backward, as PyTorch's compiler schedules them; their results are made up, not computed."""
    kernels: Counted = [], []

    def schedule(graph: torch.fx.GraphModule, example_inputs: list, is_backward: bool = False, **_) -> Callable:
        output = graph.graph.output_node()
        values = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in output.args[0]]
        strides = [value.stride() if isinstance(value, Tensor) else None for value in values]
        output.meta.setdefault("original_output_strides", strides)
        lowering = GraphLowering(graph, example_inputs=example_inputs, is_backward=is_backward)
        fake_mode = detect_fake_mode(example_inputs)
        with V.set_debug_handler(DebugContext()), V.set_graph_handler(lowering), V.set_fake_mode(fake_mode):
            lowering.run(*example_inputs)
            for node in Scheduler(lowering.operations).nodes:
                if num_bytes := node.get_read_write_buffers_sizes():
                    flops = node.estimate_flops() or 0
                    outputs = int(node.get_outputs()[0].node.get_numel()) if flops else 1
                    kernels[is_backward].append(kernel(num_bytes, flops, outputs, draws(node)))

        def run(inputs: list) -> list:
            inputs.clear()
            return [value.new_empty(value.shape) if isinstance(value, Tensor) else value for value in made_up]

        made_up = [
            torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value for value in values
        ]
        run._boxed_call = True
        return run

    torch._dynamo.reset()
    backend = functools.partial(compile_fx, inner_compile=schedule)
    output = torch.compile(module, backend=backend, fullgraph=True)(*args)
    output.backward(torch.empty_like(output))
    return kernels


def draws(node: BaseSchedulerNode) -> float:
    """Blocks of random words that a kernel draws: the compiler's takes one word of each block of four."""
    loops = [part for part in node.get_nodes() if isinstance(part, SchedulerNode)]
    return float(sum(int(part.node.get_numel()) for part in loops if part._body.has_op("rand")))


class AttentionStandIn(torch.autograd.Function):
    """Takes and gives what attention does, and launches nothing."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.empty_like(value)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(grad), torch.empty_like(grad), torch.empty_like(grad)


def shape_of(batch: Batch) -> BatchShape:
    """The sizes that a step on the batch follows from."""
    masked = batch.masked
    lengths, ngram_lengths = (offsets.diff().tolist() for offsets in (batch.cu_seqlens, masked.ngram_cu_seqlens))
    num_masked = int((masked.labels != IGNORE_INDEX).sum())
    return BatchShape(lengths, ngram_lengths, len(masked.edges.token_ngrams), num_masked)


def parts_of_step(config: DNAZenConfig, batch: Batch) -> list[Part]:
    """Everything in forward and backward of one micro-batch in bf16, counted."""
    hidden, layers, fused = config.hidden_size, config.num_hidden_layers, config.num_hidden_ngram_layers
    masked, num_tokens = batch.masked, len(batch.input_ids)
    num_ngrams, num_edges = len(masked.ngram_input_ids), len(masked.edges.token_ngrams)
    num_masked = int((masked.labels != IGNORE_INDEX).sum())
    views = batch.input_ids.new_empty(num_tokens + num_ngrams + 2 + 2 * num_edges, dtype=torch.int32)
    edges = NgramEdges(*views.split([num_tokens + 1, num_edges, num_ngrams + 1, num_edges]))
    add_norm = packed_add_norm(edges, "triton")
    with torch.device("meta"):
        model = DNAZenForMaskedLM(config).to(torch.bfloat16).train()
    token_layer, ngram_layer = TokenLayer(config).to(torch.bfloat16), NgramLayer(config).to(torch.bfloat16)

    def states(rows: int, columns: int = hidden, device: str = "cpu") -> Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16, device=device, requires_grad=True)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        return AttentionStandIn.apply(query, key, value), None

    def projections(module: nn.Module, rows: int) -> Counted:
        """And the sum of the gradient that comes through them with that of the residual beside them."""
        residual, module = states(rows, device="meta").view(rows, hidden), module.to("meta")
        return eager_kernels(lambda: module(residual, attend)[0], residual)

    def residual_output(module: nn.Module, rows: int) -> Counted:
        return compiled_kernels(module, states(rows, module.dense.in_features), states(rows), add_norm)

    def embeddings(module: nn.Module, rows: int) -> Counted:
        input_ids = torch.zeros(rows, dtype=torch.int64, device="meta")
        cu_seqlens = torch.zeros(2, dtype=torch.int32, device="meta")
        return eager_kernels(lambda: module(input_ids, cu_seqlens))

    mlp, intermediate = token_layer.mlp, ngram_layer.intermediate.to("meta")
    head = model.cls["predictions"]
    labels = torch.zeros(num_masked, dtype=torch.int64, device="meta")

    def inner(rows: int) -> Counted:
        return eager_kernels(lambda: intermediate(states(rows, device="meta")))

    def loss() -> Tensor:
        return F.cross_entropy(head(states(num_masked, device="meta")).float(), labels, reduction="sum")

    shape = shape_of(batch)
    return [
        *(Part(row.name, 1, [Kernel(row.num_bytes / row.launches)] * row.launches, []) for row in integer_rows(batch)),
        Part("embeddings: tokens", 1, *embeddings(model.bert.embeddings, num_tokens)),
        Part("embeddings: G-grams", 1, *embeddings(model.bert.ngram_embeddings, num_ngrams)),
        Part("tokens: q, k, v", layers, *projections(token_layer.attention.self, num_tokens)),
        Part("tokens: attention", layers, *attention_kernels(shape.lengths, hidden)),
        Part("tokens: attention's output", layers, *residual_output(token_layer.attention.output, num_tokens)),
        Part("tokens: MLP", layers - fused, *compiled_kernels(mlp, states(num_tokens), add_norm, None)),
        Part("tokens: MLP, then fusion", fused, *compiled_kernels(mlp, states(num_tokens), add_norm, states(num_ngrams))),
        Part("G-grams: q, k, v", fused, *projections(ngram_layer.attention.self, num_ngrams)),
        Part("G-grams: attention", fused, *attention_kernels(shape.ngram_lengths, hidden)),
        Part("G-grams: attention's output", fused, *residual_output(ngram_layer.attention.output, num_ngrams)),
        Part("G-grams: MLP, inner", fused, *inner(num_ngrams)),
        Part("G-grams: MLP, outer", fused, *residual_output(ngram_layer.output, num_ngrams)),
        Part("masked-language head", 1, *eager_kernels(loss)),
    ]  # fmt: skip


def print_table(parts: list[Part], owed_flops: float, num_tokens: int) -> None:
    """Markdown, and what it comes to."""
    print("\n| | times | launches of one | GFLOP | MB | ms at 790 TFLOP/s | ms at 4.3 TB/s | ms |\n" + "|---" * 8 + "|")
    for name, times, kernels in parts:
        flops, num_bytes = (times * sum(column) for column in zip(*((k.flops, k.num_bytes) for k in kernels)))
        seconds = flops / FLOPS, num_bytes / BANDWIDTH, Part(name, times, kernels).seconds
        cells = [name, times, len(kernels), f"{flops / 1e9:,.0f}", f"{num_bytes / 1e6:,.0f}"]
        print("|", " | ".join(map(str, [*cells, *(f"{1e3 * value:.2f}" for value in seconds)])), "|")
    seconds, launches = sum(part.seconds for part in parts), sum(part.times * len(part.kernels) for part in parts)
    print(f"\n{launches:,} launches, {1e3 * LAUNCH_SECONDS * launches:.1f} ms of the host's time")
    print(f"owed: {owed_flops / 1e12:.2f} TFLOP, {owed_flops / num_tokens / 1e9:.3f} GFLOP a token")
    mfu = owed_flops / seconds / DATASHEET_FLOPS
    print(f"at best {1e3 * seconds:.1f} ms, {num_tokens / seconds:,.0f} tokens/s, MFU {mfu:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_genome_arguments(parser)
    parser.add_argument("--corpus", metavar="DIR", help="a prepared corpus, instead of --fasta")
    parser.add_argument("--ngrams", metavar="DIR", help="its G-grams")
    parser.add_argument("--model", default="base", help="with --corpus (%(default)s)")
    tokens = [RECIPES["base"].max_batch_tokens, *BATCH_TOKENS]
    parser.add_argument("--tokens", type=int, nargs="+", default=tokens, help="of a step; of operators")
    parser.add_argument("--output", type=Path, metavar="FILE")
    args = parser.parse_args()
    if len({value is None for value in (args.corpus, args.ngrams, args.output)}) > 1:
        parser.error("--corpus, --ngrams and --output go together")
    if args.corpus is not None:
        genome = open_genome(args.corpus, args.ngrams, "corpus")
        write_json(args.output, predict(genome, args.model, *args.tokens))
        return
    genome = load_genomes(args.fasta, args.tokenizer, (SEQUENCE_LENGTH,))[SEQUENCE_LENGTH]
    batch = make_batch(genome, RECIPES["base"].max_batch_tokens)
    config = DNAZenConfig.from_size("base", vocab_size=4096, ngram_vocab_size=NGRAM_VOCAB_SIZE)
    print_table(parts_of_step(config, batch), owed(config, batch), len(batch.input_ids))


def predict(genome: Genome, model: str, num_tokens: int, *operator_tokens: int) -> dict[str, Any]:
    """Of a step of `num_tokens` tokens: `ms`, `tokens_per_second`, `mfu`, `launches` and the `parts`' ms, the costliest
    first; of both shapes of `benchmarks.attention`: ms of forward and backward; of the implementations of the
    operators, by the most tokens of a batch: ms of forward and backward together. All at what an H200 was measured at.
    """
    batch = make_batch(genome, num_tokens)
    sizes = {"vocab_size": genome.vocab_size, "ngram_vocab_size": 1 + max(genome.vocabulary.values())}
    config = DNAZenConfig.from_size(model, **sizes)
    parts = parts_of_step(config, batch)
    seconds = sum(part.seconds for part in parts)
    attention = {}
    for name, shape in SHAPES.items():
        forward, *backward = attention_kernels(torch.from_numpy(shape.lengths()), 768)
        attention[name] = {"fwd": 1e3 * forward.seconds, "bwd": 1e3 * sum(kernel.seconds for kernel in backward)}
    batches = {count: make_batch(genome, count) for count in operator_tokens}
    operators = {
        name: {
            count: {row.name: 1e3 * row.seconds(BANDWIDTH) for row in implementation_rows(batch_of_count, name)}
            for count, batch_of_count in batches.items()
        }
        for name in ("ngram_fusion", "residual_layer_norm")
    }
    return {
        "ms": 1e3 * seconds,
        "tokens_per_second": len(batch.input_ids) / seconds,
        "mfu": owed(config, batch) / seconds / DATASHEET_FLOPS,
        "launches": sum(part.times * len(part.kernels) for part in parts),
        "parts": {part.name: 1e3 * part.seconds for part in sorted(parts, key=lambda part: -part.seconds)},
        "attention": attention,
        "operators": operators,
    }


def owed(config: DNAZenConfig, batch: Batch) -> float:
    """FLOPs that a step on the batch owes, by the formula of `dnazen bench`."""
    lengths, ngram_lengths = (offsets.diff().numpy() for offsets in (batch.cu_seqlens, batch.masked.ngram_cu_seqlens))
    return training_flops(config, lengths, ngram_lengths, int((batch.masked.labels != IGNORE_INDEX).sum()))


if __name__ == "__main__":
    main()
