"""What a training step takes: its kernels, DeepSpeed's copies and optimizer, the GPUs' exchange, and what waits."""

from typing import Any, NamedTuple

from dnazen.planning.devices import HOOK_LAUNCH, NETWORK, Gpu, Prices
from dnazen.planning.kernel import Kernel, Part
from dnazen.planning.memory import BUCKET, parameters, table
from dnazen.planning.step import PRESENT, BatchShape, Terms, parts_of_step


class Moved(NamedTuple):
    """Bytes that DeepSpeed reads and writes for a parameter."""

    own: int  # of the gradient that a process has computed
    shared: int  # of what all processes share: sums, moments, weights


# DeepSpeed 0.19.8 under ds_configs, counted on a CPU by tests/programs/step_traffic.py and step_operations.py. In each
# micro-batch, under ZeRO-2: the bucket 4, division 4, joining 4, copy back 4; conversion to fp32 6, sum 12. Under
# ZeRO-1 the sum in bf16, but for the first. ZeRO-3 is taken as ZeRO-2.
MICRO_BYTES = {1: Moved(6, 0), 2: Moved(16, 18), 3: Moved(16, 18)}
# and once a step: zeroing 4, norm 4, clipping 8, AdamW 28, new weight 6; under ZeRO-1 all the rest
STEP_BYTES = {1: Moved(16, 54), 2: Moved(0, 50), 3: Moved(0, 50)}
LARGE_SPARES = 8  # of its own: a parameter larger than a bucket is neither copied to it nor joined with others
# operations for each of the model's tensors in a micro-batch and in a step, and of the step itself
MICRO_LAUNCHES, TENSOR_LAUNCHES, STEP_LAUNCHES = {1: 1, 2: 4, 3: 3}, {1: 2, 2: 0, 3: 0}, {1: 65, 2: 61, 3: 298}
SYNCHRONISATIONS = 2  # of a step: whether the norm is finite, and to log it; under ZeRO-2 and 3 one more a micro-batch


class Layout(NamedTuple):
    """How a step is spread."""

    gpus: int = 1  # in all
    nodes: int = 1
    stage: int = 2  # of ZeRO
    accumulation: int = 1  # micro-batches of a step on each GPU

    @property
    def bus(self) -> float | None:
        """Bytes/s of the network for a collective over all GPUs, of those of a node together; None within one."""
        return None if self.nodes == 1 else NETWORK * self.gpus / self.nodes


class Step(NamedTuple):
    """Seconds of an optimizer step, by what they pass with."""

    computing: float  # forward and backward of all its micro-batches
    gradients: float  # DeepSpeed's copies of them
    optimizer: float
    communication: float  # between GPUs, as far as it is not hidden behind the backward
    gaps: float  # after synchronisations
    host: float  # that the GPU waits for the host, which launches
    tokens: int  # of all GPUs

    @property
    def seconds(self) -> float:
        return sum(self[:-1])

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def tensors(config: Any) -> int:
    """How many tensors the parameters are."""
    layers = 11 * config.num_hidden_layers + 16 * config.num_hidden_ngram_layers
    return layers + 2 * 4 + 2 * config.neighbor_window + 5


def seconds_of(parts: list[Part], prices: Prices) -> float:
    """Of kernels in a row."""
    return sum(part.seconds(prices) for part in parts)


def forward_only(parts: list[Part]) -> list[Part]:
    return [part._replace(backward=[]) for part in parts]


def checkpointed(parts: list[Part]) -> list[Part]:
    """The same with every layer's forward once more in the backward."""
    return [
        part._replace(backward=part.forward + part.backward) if part.name.startswith(("tokens", "G-grams")) else part
        for part in parts
    ]


def step(
    config: Any,
    batch: BatchShape,
    gpu: Gpu,
    attention: str,
    layout: Layout,
    *,
    expected: bool = True,
    checkpointing: bool = False,
    terms: Terms = PRESENT,
) -> Step:
    """A step of `layout.accumulation` micro-batches on each GPU.

    Args:
        config: with the fields of `DNAZenConfig`.
        batch: a micro-batch's sizes.
        gpu, attention: the GPU, and the back-end that it runs.
        layout: how many GPUs, and how they share the states.
        expected: else optimistic.
        checkpointing: of the layers.
        terms: what the step does without; joined gradients need FlashAttention.
    """
    head_dim = config.hidden_size // config.num_attention_heads
    prices = gpu.prices(attention, head_dim, expected, layout.bus)
    if not attention.startswith("flash"):
        terms = terms._replace(gradients_joined=False)
    parts = parts_of_step(config, batch, terms)
    parts = checkpointed(parts) if checkpointing else parts
    return assemble(config, parts, batch.num_tokens, prices, layout)


def assemble(config: Any, parts: list[Part], num_tokens: int, prices: Prices, layout: Layout) -> Step:
    """A step of these parts, counted or in closed form, for each of its micro-batches."""
    stage, times = layout.stage, layout.accumulation
    computing, count = seconds_of(parts, prices), parameters(config)
    backward = computing - seconds_of(forward_only(parts), prices)

    def moved(bytes_of: Moved) -> float:
        spared = LARGE_SPARES * table(config) if table(config) > BUCKET and bytes_of.own > LARGE_SPARES else 0
        return (bytes_of.own + bytes_of.shared / layout.gpus) * count - spared

    # one copy a tensor stands in line with the backward, all else runs beside it
    copies = [Kernel(4 * count / tensors(config))] * tensors(config) if stage > 1 else []
    beside = moved(MICRO_BYTES[stage]) - sum(kernel.num_bytes for kernel in copies)
    gradients = sum(kernel.seconds(prices) for kernel in copies) + beside / prices.bandwidth
    updates = STEP_LAUNCHES[stage] + TENSOR_LAUNCHES[stage] * tensors(config)
    update = updates * Kernel(moved(STEP_BYTES[stage]) / updates).seconds(prices)
    launches = sum(part.launches for part in parts) * prices.launch
    launches += MICRO_LAUNCHES[stage] * tensors(config) * min(HOOK_LAUNCH, prices.launch)
    exchange = communication(config, layout, prices, backward)
    return Step(
        times * computing,
        (times - (stage == 1)) * gradients,
        update,
        exchange,
        (SYNCHRONISATIONS + times * (stage > 1)) * prices.gap,
        times * max(0.0, launches - computing - gradients),
        times * layout.gpus * num_tokens,
    )


def communication(config: Any, layout: Layout, prices: Prices, backward: float) -> float:
    """Seconds of a step that the GPUs' exchange adds.

    Under ZeRO-1 and 2 DeepSpeed reduces buckets by all-reduce (`use_multi_rank_bucket_allreduce`), which moves twice
    what a reduce-scatter would; under ZeRO-1 after the last micro-batch, under ZeRO-2 in each, beside the backward.
    The gradient of the embeddings comes last, so that of the G-grams' table, and one bucket, has nothing to hide
    behind. New weights are gathered once a step; under ZeRO-3 twice in each micro-batch, in place of that.
    """
    if layout.gpus == 1:
        return 0.0
    count, share = parameters(config), (layout.gpus - 1) / layout.gpus
    gathering = share * 2 * count / prices.link
    reducing = share * 2 * count / prices.link * (1 if layout.stage == 3 else 2)
    if layout.stage == 1:
        return reducing + gathering
    in_the_end = reducing * min(1.0, (table(config) + BUCKET) / count)
    beside = reducing - in_the_end + (2 * gathering if layout.stage == 3 else 0.0)
    shown = in_the_end + max(0.0, beside - backward) + prices.beside * min(beside, backward)
    return layout.accumulation * shown + (0.0 if layout.stage == 3 else gathering)
