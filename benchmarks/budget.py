"""What one training step must compute and move, part by part, and the time that takes: predicted.

    python -m benchmarks.budget [--fasta FILE --tokenizer DIR]
    python -m benchmarks.budget --corpus DIR --ngrams DIR [--model SIZE --tokens N] --output FILE

Prints the tables of README.md here, in Markdown; `--output` writes what `benchmarks.gpu` holds its measurements
against, for a prepared corpus, as JSON. Needs no GPU. The first table is counted: kernels of compiled parts are those
that PyTorch's compiler schedules for them; of the others, one for each of PyTorch's operations. `dnazen.planning.step`
has the same in closed form, which the other tables come from, and `dnazen.planning.devices` what it all costs.
"""

# ruff: noqa: E402
import argparse
import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import numpy as np
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
from benchmarks.roofline import Traffic, implementation_rows, integer_rows
from benchmarks.run import BATCH_TOKENS
from dnazen.files import write_json
from dnazen.layers import linear
from dnazen.layers.attention.dense import PackedAttention
from dnazen.layers.encoder import NgramLayer, TokenLayer
from dnazen.layers.fusion import packed_add_norm
from dnazen.models import DNAZenConfig, DNAZenForMaskedLM
from dnazen.planning.cost import Layout, Step, assemble, seconds_of, step
from dnazen.planning.devices import GPUS, Gpu, Prices
from dnazen.planning.kernel import Kernel, Part
from dnazen.planning.plan import MEAN_TOKENS, ModelShape, batch_of
from dnazen.planning.step import BEFORE, BatchShape, Terms, attention_kernels
from dnazen.planning.step import parts_of_step as step_parts
from dnazen.pretraining.bench.flops import training_flops
from dnazen.sizes import RECIPES, SIZES
from dnazen_kernels.ngram_edges import NgramEdges
from dnazen_kernels.ngram_masking import IGNORE_INDEX

SEQUENCE_LENGTH = 512
NGRAM_VOCAB_SIZE = 162_708  # published

FLOPS = {**flop_registry, torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}  # which torch leaves out

Counted = tuple[list[Kernel], list[Kernel]]  # of forward and backward


class EagerKernels(Traffic):
    """Every operation of PyTorch as a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function == torch.ops.aten.index_add.default:  # in place, where nobody looks on: `index_select`'s backward
            function = torch.ops.aten.index_add_.default
        before = self.launches, self.num_bytes
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if self.launches > before[0]:
            count = FLOPS.get(function.overloadpacket, lambda *_, **__: 0)
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


def eager_kernels(run: Callable[[], tuple[Tensor, ...]]) -> Counted:
    """Of forward and backward, on the meta device, where nothing is computed."""
    with EagerKernels() as forward:
        outputs = run()
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
    """Takes query, key and value, apart or as one, gives what attention does, and launches nothing."""

    @staticmethod
    def forward(ctx, *states: Tensor) -> Tensor:
        ctx.save_for_backward(*states)
        return states[0].new_empty(len(states[0]), *states[0].shape[-2:])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(states) for states in ctx.saved_tensors)


def shape_of(batch: Batch) -> BatchShape:
    """The sizes that a step on the batch follows from."""
    masked = batch.masked
    lengths, ngram_lengths = (offsets.diff().tolist() for offsets in (batch.cu_seqlens, masked.ngram_cu_seqlens))
    num_masked = int((masked.labels != IGNORE_INDEX).sum())
    return BatchShape(lengths, ngram_lengths, len(masked.edges.token_ngrams), num_masked)


@patch.object(linear, "_CPU_MULTIPLIES_BF16", True)  # as GPUs do, whatever this CPU does
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

    def attend(*states: Tensor) -> tuple[Tensor, None]:
        return AttentionStandIn.apply(*states), None

    flash_attention = PackedAttention(attend, attend)

    def projections(module: nn.Module, rows: int) -> Counted:
        """And the sum of the gradient that comes through them with that of the residual beside them."""
        residual, module = states(rows, device="meta").view(rows, hidden), module.to("meta")
        return eager_kernels(lambda: module(residual, flash_attention)[:2])

    def residual_output(module: nn.Module, rows: int) -> Counted:
        return compiled_kernels(module, states(rows, module.dense.in_features), states(rows), add_norm)

    def masked_rows(times: int) -> Counted:
        all_states = [states(num_tokens, device="meta") for _ in range(times)]
        indices = torch.zeros(num_masked, dtype=torch.int64, device="meta")
        return eager_kernels(lambda: tuple(rows.index_select(0, indices) for rows in all_states))

    def embeddings(module: nn.Module, rows: int) -> Counted:
        input_ids = torch.zeros(rows, dtype=torch.int64, device="meta")
        cu_seqlens = torch.zeros(2, dtype=torch.int32, device="meta")
        return eager_kernels(lambda: (module(input_ids, cu_seqlens),))

    ngram_states = states(num_ngrams)
    mlp, intermediate = token_layer.mlp, ngram_layer.intermediate.to("meta")
    head = model.cls["predictions"]
    labels = torch.zeros(num_masked, dtype=torch.int64, device="meta")

    def inner(rows: int) -> Counted:
        return eager_kernels(lambda: (intermediate(states(rows, device="meta")),))

    def loss() -> tuple[Tensor]:
        return (F.cross_entropy(head(states(num_masked, device="meta")).float(), labels, reduction="sum"),)

    shape, skips = shape_of(batch), config.skips_unmasked_rows
    last = [Part("masked rows", 1, *masked_rows(1))]
    if skips:
        masked_output = residual_output(token_layer.attention.output, num_masked)
        last = [
            Part("tokens, last layer: masked rows", 1, *masked_rows(2)),
            Part("tokens, last layer: attention's output", 1, *masked_output),
            Part("tokens, last layer: MLP", 1, *compiled_kernels(mlp, states(num_masked), add_norm, None)),
        ]
    return [
        *(Part(row.name, 1, [Kernel(row.num_bytes / row.launches)] * row.launches, []) for row in integer_rows(batch)),
        Part("embeddings: tokens", 1, *embeddings(model.bert.embeddings, num_tokens)),
        Part("embeddings: G-grams", 1, *embeddings(model.bert.ngram_embeddings, num_ngrams)),
        Part("tokens: q, k, v", layers, *projections(token_layer.attention.self, num_tokens)),
        Part("tokens: attention", layers, *attention_kernels(shape.lengths, hidden)),
        Part("tokens: attention's output", layers - skips, *residual_output(token_layer.attention.output, num_tokens)),
        Part("tokens: MLP", layers - skips - fused, *compiled_kernels(mlp, states(num_tokens), add_norm, None)),
        Part("tokens: MLP, then fusion", fused, *compiled_kernels(mlp, states(num_tokens), add_norm, ngram_states)),
        *last,
        Part("G-grams: q, k, v", fused, *projections(ngram_layer.attention.self, num_ngrams)),
        Part("G-grams: attention", fused, *attention_kernels(shape.ngram_lengths, hidden)),
        Part("G-grams: attention's output", fused, *residual_output(ngram_layer.attention.output, num_ngrams)),
        Part("G-grams: MLP, inner", fused, *inner(num_ngrams)),
        Part("G-grams: MLP, outer", fused, *residual_output(ngram_layer.output, num_ngrams)),
        Part("masked-language head", 1, *eager_kernels(loss)),
    ]  # fmt: skip


def rows(header: list[str], cells: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(map(str, line))} |" for line in (header, *cells)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def step_table(config: DNAZenConfig, parts: list[Part], num_tokens: int, owed_flops: float) -> str:
    """The parts of a step of one micro-batch on one H200 under ZeRO-2, and what it comes to, without accumulation and
    with four micro-batches."""
    prices = [prices_of(config, GPUS["H200"], expected) for expected in (False, True)]
    lines = []
    for part in parts:
        counts = f"{part.total('flops') / 1e9:,.0f}", f"{part.total('num_bytes') / 1e6:,.0f}"
        times = (f"{1e3 * part.seconds(price):.2f}" for price in prices)
        lines.append([part.name, part.times, len(part.kernels), *counts, *times])
    text = [rows(["", "times", "launches of one", "GFLOP", "MB", "optimistic, ms", "expected, ms"], lines)]
    text.append(f"\n{sum(part.launches for part in parts):,} launches\n")
    settings = [(accumulation, price) for accumulation in (1, 4) for price in prices]
    steps = [assemble(config, parts, num_tokens, price, Layout(accumulation=count)) for count, price in settings]
    lines = [
        [
            name,
            *(f"{1e3 * getattr(found, name) / count:.1f}" for found, (count, _) in zip(steps, settings, strict=True)),
        ]
        for name in (*Step._fields[:-1], "seconds")
    ]
    lines[-1][0] = "all"
    owed = owed_flops / num_tokens
    lines.append(["tokens/s; MFU", *(speed_and_mfu(found.tokens_per_second, owed, "H200") for found in steps)])
    header = ["ms of a micro-batch", "optimistic", "expected", "optimistic, of 4", "expected, of 4"]
    return "\n".join([*text, rows(header, lines)])


def speed_and_mfu(tokens_per_second: float, flops_a_token: float, gpu: str) -> str:
    """Of one GPU."""
    return f"{tokens_per_second / 1e3:,.0f} k; {tokens_per_second * flops_a_token / GPUS[gpu].peak:.0%}"


def prices_of(config: Any, gpu: Gpu, expected: bool, attention: str = "flash_attention_4") -> Prices:
    return gpu.prices(attention, config.hidden_size // config.num_attention_heads, expected)


def flops_of(config: Any, shape: BatchShape) -> float:
    """FLOPs that a micro-batch owes."""
    return training_flops(config, np.array(shape.lengths), np.array(shape.ngram_lengths), shape.num_masked)


def shape_of_ecoli(num_tokens: int, mean: int = MEAN_TOKENS) -> BatchShape:
    """A micro-batch of sequences of so many tokens, with E. coli's G-grams after masking."""
    return batch_of(num_tokens, mean, 0.058, 0.119, 0.18)


def machine_table() -> str:
    """Every size on each GPU, alone and with seven others, with and without accumulation: tokens/s of a GPU and MFU."""
    lines = []
    for model in SIZES:
        config = ModelShape.of(model)
        shape = shape_of_ecoli(RECIPES[model].max_batch_tokens)
        owed_flops = flops_of(config, shape) / shape.num_tokens
        for name in ("H100", "H200", "H800"):
            cells = []
            for count in (1, 8):
                for accumulation in (1, 4):
                    layout = Layout(count, accumulation=accumulation)
                    both = (
                        step(config, shape, GPUS[name], "flash_attention_4", layout, expected=e) for e in (False, True)
                    )
                    cells.append(" / ".join(speed_and_mfu(s.tokens_per_second / count, owed_flops, name) for s in both))
            lines.append([f"{model}, {name}", *cells])
    return rows(
        ["tokens/s of a GPU; MFU: optimistic / expected", "1", "1, 4 micro-batches", "8", "8, 4 micro-batches"], lines
    )


def attention_table() -> str:
    """Each back-end on one H200: ms of all token layers' attention, and tokens/s."""
    lines = []
    for model in ("base", "large", "xlarge"):
        config, gpu = ModelShape.of(model), GPUS["H200"]
        shape = shape_of_ecoli(RECIPES[model].max_batch_tokens)
        for name in gpu.attention:
            parts = [part for part in step_parts(config, shape) if part.name == "tokens: attention"]
            cells = [f"{1e3 * seconds_of(parts, prices_of(config, gpu, e, name)):.1f}" for e in (False, True)]
            found = step(config, shape, gpu, name, Layout(accumulation=4))
            lines.append([f"{model}, {name}", *cells, f"{found.tokens_per_second / 1e3:,.0f} k"])
    return rows(["", "optimistic, ms", "expected, ms", "tokens/s, expected, 4 micro-batches"], lines)


def savings_table() -> str:
    """`base` on one H200 with four micro-batches: what each of `Terms` saves, on top of those above it, and what pieces
    of a corpus do that fill their tokens.
    """
    config, shape, layout = ModelShape.of("base"), shape_of_ecoli(65_189), Layout(accumulation=4)
    terms, lines, before = BEFORE, [], None
    for name in ("none of them", *Terms._fields, "pieces of 508 tokens"):
        terms = terms._replace(**{name: True}) if name in Terms._fields else terms
        shape = shape_of_ecoli(65_189, 508) if name == "pieces of 508 tokens" else shape
        parts = step_parts(config, shape, terms)
        found = step(config, shape, GPUS["H200"], "flash_attention_4", layout, terms=terms)
        now = [sum(part.launches for part in parts)]
        now += [sum(part.total(field) for part in parts) for field in ("num_bytes", "flops")]
        now.append(1e3 * found.seconds / 4)
        less = [a - b for a, b in zip(before or now, now)]
        saved = f"{less[0]:,.0f}", f"{less[1] / 1e9:.1f}", f"{less[2] / 1e12:.2f}", f"{less[3]:.1f}"
        lines.append([name, *saved, f"{now[3]:.1f}"])
        before = now
    return rows(["", "launches", "GB", "TFLOP", "ms", "a micro-batch, ms"], lines)


def reference_seconds(config: Any, shape: BatchShape, padded: int, prices: Prices) -> float:
    """Forward and backward of the reference in bf16, every sequence padded to `padded`: its fp32 scores cross memory
    ten times a layer, what we have in one kernel each way (LayerNorm, residual, fusion) crosses it 11 states more. Of
    what our step does without, it shares the sum of residuals' gradients alone."""
    layers, rows_of = config.num_hidden_layers, padded * len(shape.lengths)
    terms = BEFORE._replace(residual_added=True)
    parts = step_parts(config, shape._replace(lengths=[padded] * len(shape.lengths)), terms)
    scores = config.num_attention_heads * float(padded) * rows_of
    head_dim = config.hidden_size // config.num_attention_heads
    product = Kernel(2 * scores, 2 * scores * head_dim, "matmul", head_dim)
    attention = [product] * 2 + [Kernel(4 * scores)] * 4, [product] * 4 + [Kernel(4 * scores)] * 6
    state = 2 * rows_of * config.hidden_size
    apart = Part("one by one", 2 * layers, [Kernel(state)] * 7, [Kernel(state)] * 4)
    parts = [part for part in parts if part.name != "tokens: attention"]
    return seconds_of([*parts, Part("attention", layers, *attention), apart], prices)


def reference_table() -> str:
    """How many times as fast as the reference `base` is on one H200, by tokens of a sequence and its padding."""
    config, lines = ModelShape.of("base"), []
    prices = prices_of(config, GPUS["H200"], True)
    for mean in (510, 405, 256, 128, 104, 70):
        shape = shape_of_ecoli(65_536, mean)
        ours = seconds_of(step_parts(config, shape), prices)
        lines.append([mean, *(f"{reference_seconds(config, shape, to, prices) / ours:.1f}" for to in (512, mean))])
    return rows(["tokens of every sequence", "padded to 512", "padded to the batch's longest, as long as all"], lines)


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
    num_tokens = len(batch.input_ids)
    tables = [step_table(config, parts_of_step(config, batch), num_tokens, flops_of(config, shape_of(batch)))]
    print("\n\n".join([*tables, machine_table(), attention_table(), savings_table(), reference_table()]))


def predict(genome: Genome, model: str, num_tokens: int, *operator_tokens: int) -> dict[str, Any]:
    """Of a step of `num_tokens` tokens: `ms`, `tokens_per_second`, `mfu`, `launches` and the `parts`' ms, the costliest
    first; of both shapes of `benchmarks.attention`: ms of forward and backward; of the implementations of the
    operators, by the most tokens of a batch: ms of forward and backward together. All optimistic, on an H200, and of
    the step `expected_ms` too.
    """
    batch = make_batch(genome, num_tokens)
    sizes = {"vocab_size": genome.vocab_size, "ngram_vocab_size": 1 + max(genome.vocabulary.values())}
    config = DNAZenConfig.from_size(model, **sizes)
    parts, prices = parts_of_step(config, batch), prices_of(config, GPUS["H200"], False)
    found, expected = (
        assemble(config, parts, len(batch.input_ids), price, Layout())
        for price in (prices, prices_of(config, GPUS["H200"], True))
    )
    attention = {}
    for name, shape in SHAPES.items():
        forward, backward = attention_kernels(shape.lengths().tolist(), 768)
        modes = {"fwd": forward, "bwd": backward}
        attention[name] = {mode: 1e3 * sum(one.seconds(prices) for one in both) for mode, both in modes.items()}
    batches = {count: make_batch(genome, count) for count in operator_tokens}
    operators = {
        name: {
            count: {row.name: 1e3 * row.seconds(GPUS["H200"].copy) for row in implementation_rows(of_count, name)}
            for count, of_count in batches.items()
        }
        for name in ("ngram_fusion", "residual_layer_norm")
    }
    times = {part.name: 1e3 * part.seconds(prices) for part in parts}
    times |= {name: 1e3 * getattr(found, name) for name in ("gradients", "optimizer")}
    return {
        "ms": 1e3 * found.seconds,
        "expected_ms": 1e3 * expected.seconds,
        "tokens_per_second": found.tokens_per_second,
        "mfu": flops_of(config, shape_of(batch)) / found.seconds / GPUS["H200"].peak,
        "launches": sum(part.launches for part in parts),
        "parts": dict(sorted(times.items(), key=lambda item: -item[1])),
        "attention": attention,
        "operators": operators,
    }


if __name__ == "__main__":
    main()
