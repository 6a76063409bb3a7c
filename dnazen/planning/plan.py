"""What a run will take before anything is paid for: tokens, steps, hours, memory and disk, stage by stage."""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from dnazen.files import InputError, read_json
from dnazen.planning.cost import Layout, Step, forward_only, seconds_of, step
from dnazen.planning.devices import GPUS, Gpu
from dnazen.planning.memory import memory, parameters, table
from dnazen.planning.preparation import MEASURED, Job, extrapolate
from dnazen.planning.step import BatchShape, parts_of_step, spread
from dnazen.sizes import RECIPES, SIZES

_CORPUS = MEASURED["corpus"]["2 workers"]
BASES_PER_TOKEN = _CORPUS["bases"] / _CORPUS["tokens"]
MEAN_TOKENS = 405  # of a sequence, [CLS] and [SEP] among them: E. coli in pieces of 2,040 bases
NGRAMS_PER_TOKEN, EDGES_PER_TOKEN = 0.067, 0.141  # that masking leaves, of human DNA
MASKED_FOR_DRAWN = 1.2  # masked tokens for each drawn where whole G-grams are masked
SAVE_STEPS, CHECKPOINTS, EVAL_STEPS = 500, 4, 250  # pretraining's defaults; three are kept while one is written
EVALUATED_TOKENS = 20_000 / 0.15
CHECKPOINT_BYTES = 16  # a parameter: bf16 weights twice, fp32 weights and two moments
CHECKPOINT_RATE = 0.5e9  # bytes/s to write and to read again for the checksums; assumed
# of the end of a run: 33 s with 1.07 million tokens to count, of two cores; it counts 20 million at the most
EVALUATION_SECONDS, COUNTED_TOKENS = 33 / 1.07e6, 20e6
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022 (arXiv 2203.15556), for models that read text from left to right
BATCH_UNIT = 1024  # tokens, to which a smaller --max-batch-tokens is rounded
MOST_DOUBLINGS = 6  # of the GPUs, in search of room


class ModelShape(NamedTuple):
    """The fields of `DNAZenConfig` that cost follows from, with its defaults."""

    vocab_size: int = 4096
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    num_hidden_ngram_layers: int = 6
    neighbor_window: int = 0
    ngram_vocab_size: int = 162_708
    hidden_dropout_prob: float = 0.1

    @classmethod
    def of(cls, model: str) -> "ModelShape":
        """Of a size, or of a configuration's file.

        Raises:
            InputError: neither, or a field is not a number above 0.
        """
        names = ", ".join(SIZES)
        values = SIZES[model] if model in SIZES else read_json(model, f"a size ({names}) or a model configuration")
        values = {name: values[name] for name in cls._fields if name in values}
        for name, value in values.items():
            least = 0 if name in ("neighbor_window", "hidden_dropout_prob") else 1
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < least:
                raise InputError(f"{model}: {name}: expected a number of at least {least}, found {value!r}")
        return cls(**values)


class Setting(NamedTuple):
    """How a model is trained, and on what."""

    model: str
    gpu: Gpu
    layout: Layout
    max_batch_tokens: int
    attention: str
    checkpointing: bool

    @property
    def config(self) -> ModelShape:
        return ModelShape.of(self.model)

    @property
    def batch(self) -> BatchShape:
        """A micro-batch; packing leaves half a sequence of the budget free."""
        recipe = RECIPES.get(self.model, RECIPES["base"])
        masked = recipe.mlm_probability * (MASKED_FOR_DRAWN if recipe.whole_ngram_masking else 1)
        tokens = max(self.max_batch_tokens - MEAN_TOKENS // 2, min(self.max_batch_tokens, MEAN_TOKENS))
        return batch_of(tokens, MEAN_TOKENS, NGRAMS_PER_TOKEN, EDGES_PER_TOKEN, masked)

    def describe(self) -> str:
        """The flags of pretraining that it stands for."""
        layout = self.layout
        words = [
            f"--model {self.model} --deepspeed zero{layout.stage} --max-batch-tokens {self.max_batch_tokens}",
            f"--gradient-accumulation-steps {layout.accumulation}" * (layout.accumulation > 1),
            "--gradient-checkpointing True" * self.checkpointing,
        ]
        return " ".join(filter(None, words))


class Calibration(NamedTuple):
    """How many times the predicted time and memory a measurement took."""

    time: float = 1.0
    memory: float = 1.0
    source: str = ""


class Plan(NamedTuple):
    """A run's needs; times in seconds, memory and disk in bytes."""

    setting: Setting
    calibration: Calibration
    bases: float
    cores: int
    epochs: float
    tokens: float  # of the corpus
    steps: int
    step: Step
    preparation: dict[str, Job]
    training: float
    checkpoints: float  # of the time of training
    evaluation: float
    memory: float
    disk: float  # of training


class Size(NamedTuple):
    """A model, and what becomes of it in some hours."""

    setting: Setting
    fits: bool
    count: int  # parameters without the table of G-grams
    tokens: float


def batch_of(
    tokens: int, mean: int, ngrams_per_token: float, edges_per_token: float, masked_share: float
) -> BatchShape:
    """A micro-batch of sequences of `mean` tokens, the last one shorter."""
    whole, rest = divmod(tokens, mean)
    lengths = [mean] * whole + [rest] * (rest > 0)
    ngrams = spread(round(ngrams_per_token * tokens), lengths)
    return BatchShape(lengths, ngrams, round(edges_per_token * tokens), round(masked_share * tokens))


def make_setting(
    model: str, gpus: str, nodes: int, deepspeed: str, max_batch_tokens: int | None, accumulation: int,
    attention: str | None, checkpointing: bool,
) -> Setting:  # fmt: skip
    """Read what the flags say.

    Raises:
        InputError: names the flag, what was expected and what was found.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(\w+)", gpus)
    if match is None or match[2] not in GPUS or match[1] == "0":
        raise InputError(f"gpus: expected a number and a name, such as 8xH100, of {', '.join(GPUS)}; found {gpus!r}")
    stage = re.fullmatch(r"zero([123])", deepspeed)
    if stage is None:
        raise InputError(f"deepspeed: expected zero1, zero2 or zero3, found {deepspeed!r}")
    gpu, count = GPUS[match[2]], int(match[1] or 1)
    attention = attention or next(iter(gpu.attention))
    if attention not in gpu.attention:
        raise InputError(f"attn_implementation: expected one of {', '.join(gpu.attention)}, found {attention!r}")
    tokens = RECIPES.get(model, RECIPES["base"]).max_batch_tokens if max_batch_tokens is None else max_batch_tokens
    for name, value in (("nodes", nodes), ("max_batch_tokens", tokens), ("gradient_accumulation_steps", accumulation)):
        if value < 1:
            raise InputError(f"{name}: expected at least 1, found {value}")
    layout = Layout(count * nodes, nodes, int(stage[1]), accumulation)
    return Setting(model, gpu, layout, tokens, attention, checkpointing)


def calibrate(path: str) -> Calibration:
    """Hold a record of `dnazen bench` against what is predicted for the same model, batch and GPU.

    Raises:
        InputError: the file is no such record, or not of a GPU that is modelled, in bf16 under DeepSpeed.
    """
    record = read_json(path, "bench.json of `dnazen bench`")
    try:
        row, model, deepspeed = record["rows"][0], record["model"], record["deepspeed"]
        device, attention, tokens = row["device"], row["attention"], round(row["tokens_per_step"])
        mean = round(tokens / row["sequences_per_step"])
        speed, peak, ngrams = row["tokens_per_second"], row["peak_memory_bytes"], row["ngrams_per_token"]
        count, precision = row["parameters"], record["precision"]
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path}: expected bench.json of `dnazen bench`, found no {error}") from error
    gpu = next((gpu for name, gpu in GPUS.items() if name in device), None)
    if gpu is None:
        raise InputError(f"{path}: expected a record of one of {', '.join(GPUS)}, found {device}")
    if attention not in gpu.attention:
        raise InputError(f"{path}: expected attention by one of {', '.join(gpu.attention)}, found {attention}")
    stage = re.fullmatch(r"zero([123])", Path(deepspeed or "").stem)
    if stage is None or precision != "bf16":
        found = f"{precision}, {deepspeed or 'without DeepSpeed'}"
        raise InputError(f"{path}: expected bf16 under zero1, zero2 or zero3, found {found}")
    setting = Setting(model, gpu, Layout(stage=int(stage[1])), tokens, attention, False)
    masked = setting.batch.num_masked / setting.batch.num_tokens
    batch = batch_of(tokens, mean, ngrams, ngrams * EDGES_PER_TOKEN / NGRAMS_PER_TOKEN, masked)
    # its G-grams are not told, but are what the other parameters leave
    others = parameters(setting.config._replace(ngram_vocab_size=0))
    rows = max(1, round((count - others) / setting.config.hidden_size))
    config = setting.config._replace(ngram_vocab_size=rows)
    predicted = step(config, batch, gpu, attention, setting.layout)
    room = memory(config, batch, 1, setting.layout.stage).total
    return Calibration(predicted.tokens_per_second / speed, peak / room, f"{path}: {model} on {device}")


def needed(setting: Setting, calibration: Calibration) -> float:
    """Bytes of memory on each GPU."""
    layout = setting.layout
    found = memory(setting.config, setting.batch, layout.gpus, layout.stage, setting.checkpointing)
    return calibration.memory * found.total


def require_room(setting: Setting, calibration: Calibration) -> float:
    """Bytes of memory on each GPU.

    Raises:
        InputError: it has less; the message says what would fit.
    """
    bytes_needed = needed(setting, calibration)
    if bytes_needed <= setting.gpu.memory:
        return bytes_needed

    def fits(**changes: Any) -> bool:
        return needed(setting._replace(**changes), calibration) <= setting.gpu.memory

    layout, sizes = setting.layout, list(SIZES)
    third, would = layout._replace(stage=3), []
    smaller = (setting.max_batch_tokens - 1) // BATCH_UNIT * BATCH_UNIT
    while smaller and not fits(max_batch_tokens=smaller):
        smaller -= BATCH_UNIT
    would += [f"--max-batch-tokens {smaller}"] if smaller else []
    alone = [("--gradient-checkpointing", {"checkpointing": True}), ("--deepspeed zero3", {"layout": third})]
    helping = [words for words, changes in alone if fits(**changes)]
    if not helping and fits(checkpointing=True, layout=third):
        helping = [" ".join(words for words, _ in alone)]
    more = (layout.gpus * 2**doubled for doubled in range(1, MOST_DOUBLINGS + 1))
    enough = next((gpus for gpus in more if fits(layout=layout._replace(gpus=gpus))), None)
    would += helping + ([f"{enough} GPUs"] if enough else [])
    for model in reversed(sizes[1 : sizes.index(setting.model) if setting.model in sizes else None]):
        would += [f"--model {model}"] if fits(model=model, max_batch_tokens=RECIPES[model].max_batch_tokens) else []
    remedy = "what would fit: " + ", or ".join(would) if would else "no other setting would fit either"
    raise InputError(
        f"gpus: expected at most the {setting.gpu.memory / 1e9:.0f} GB that a {setting.gpu.name} has, found "
        f"{bytes_needed / 1e9:.0f} GB on each, for {setting.describe()}; {remedy}"
    )


def take_step(setting: Setting, calibration: Calibration, expected: bool = True) -> Step:
    """A step, all but the exchange between GPUs as many times as long as the calibration says."""
    found = step(
        setting.config, setting.batch, setting.gpu, setting.attention, setting.layout,
        expected=expected, checkpointing=setting.checkpointing,
    )  # fmt: skip
    slower = {name: calibration.time * getattr(found, name) for name in found._fields}
    return found._replace(**slower | {"communication": found.communication, "tokens": found.tokens})


def make_plan(setting: Setting, calibration: Calibration, bases: float, epochs: float, cores: int) -> Plan:
    """What it takes to pretrain on so many bases.

    Args:
        setting: the model and the machine.
        calibration: of a measurement.
        bases: of the corpus.
        epochs: how often it is read.
        cores: that corpus and G-grams are made on.

    Raises:
        InputError: it does not fit the GPU, or the bases are too few for a step.
    """
    for name, value in (("bases", bases), ("num_train_epochs", epochs), ("cores", cores)):
        if not 0 < value < math.inf:
            raise InputError(f"{name}: expected a number above 0, found {value:g}")
    memory_bytes, config, layout = require_room(setting, calibration), setting.config, setting.layout
    a_step = take_step(setting, calibration)
    tokens = bases / BASES_PER_TOKEN
    if tokens * epochs < a_step.tokens:
        raise InputError(
            f"bases: expected at least {a_step.tokens / epochs * BASES_PER_TOKEN:,.0f}, for one step of "
            f"{a_step.tokens:,} tokens, found {bases:,.0f}"
        )
    steps = math.ceil(tokens * epochs / a_step.tokens)
    prices = setting.gpu.prices(setting.attention, config.hidden_size // config.num_attention_heads, True)
    forward = seconds_of(forward_only(parts_of_step(config, setting.batch)), prices)
    batches = math.ceil(EVALUATED_TOKENS / setting.batch.num_tokens / layout.gpus)
    checkpoint = CHECKPOINT_BYTES * parameters(config)
    checkpoints = math.ceil(steps / SAVE_STEPS) * checkpoint / CHECKPOINT_RATE
    training = steps * a_step.seconds + steps / EVAL_STEPS * batches * calibration.time * forward + checkpoints
    return Plan(
        setting, calibration, bases, cores, epochs, tokens, steps, a_step, extrapolate(MEASURED, cores, bases),
        training, checkpoints, EVALUATION_SECONDS * min(tokens, COUNTED_TOKENS), memory_bytes,
        CHECKPOINTS * checkpoint + 4 * parameters(config),
    )  # fmt: skip


def choose_size(settings: list[Setting], calibration: Calibration, hours: float) -> tuple[list[Size], Size | None]:
    """What each size would read in so many hours of training, and the largest one that reads enough of it.

    Raises:
        InputError: hours that are none.
    """
    if not 0 < hours < math.inf:
        raise InputError(f"hours: expected a number above 0, found {hours:g}")
    sizes = []
    for setting in settings:
        fits = needed(setting, calibration) <= setting.gpu.memory
        tokens = 3600 * hours * take_step(setting, calibration).tokens_per_second
        sizes.append(Size(setting, fits, parameters(setting.config) - table(setting.config), tokens))
    enough = [size for size in sizes if size.fits and size.tokens >= TOKENS_PER_PARAMETER * size.count]
    return sizes, max(enough, key=lambda size: size.count, default=None)


def settings_by_size(**given: Any) -> list[Setting]:
    """The setting of each size, with its own --max-batch-tokens."""
    return [make_setting(model, max_batch_tokens=None, **given) for model in SIZES]
