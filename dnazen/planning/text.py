"""Plans as text."""

from dnazen.planning.devices import NETWORK
from dnazen.planning.memory import parameters
from dnazen.planning.plan import (
    BASES_PER_TOKEN,
    CHECKPOINT_RATE,
    MEAN_TOKENS,
    NGRAMS_PER_TOKEN,
    SAVE_STEPS,
    TOKENS_PER_PARAMETER,
    Calibration,
    Plan,
    Setting,
    Size,
    take_step,
)
from dnazen.planning.preparation import MEASURED


def duration(seconds: float) -> str:
    """In the unit that has one to three digits before the point."""
    for unit, length, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 96)):
        if seconds < most * length:
            return f"{seconds / length:.0f} {unit}" if unit == "s" else f"{seconds / length:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


def volume(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"


def count(number: float) -> str:
    """With a word for its size."""
    for word, size in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {word}"
    return f"{number:,.0f}"


def format_plan(plan: Plan) -> str:
    """A table of the stages, and what it assumes."""
    setting, config = plan.setting, plan.setting.config
    gib, corpus, ngrams = 2**30 / 1e9, plan.preparation["corpus"], plan.preparation["ngrams"]
    each = f"{volume(plan.memory)} of {setting.gpu.memory / 1e9:.0f} a GPU"
    rows = [
        ("corpus", corpus.seconds, f"{gib * corpus.all:.1f} GB, {plan.cores} cores", 1e9 * corpus.disk),
        ("G-grams", ngrams.seconds, f"{gib * ngrams.all:.1f} GB, {plan.cores} cores", 1e9 * ngrams.disk),
        ("pretraining", plan.training, each, plan.disk),
        ("evaluation", plan.evaluation, "1 GPU", 0.0),
    ]
    rows.append(("all", sum(row[1] for row in rows), "", sum(row[3] for row in rows)))
    best = take_step(setting, plan.calibration, expected=False)
    lines = [
        f"{setting.model}: {parameters(config) / 1e6:,.0f} million parameters on {machine(setting)}",
        f"{count(plan.bases)} bases: {count(plan.tokens)} tokens, read {plan.epochs:g} times in {plan.steps:,} steps "
        f"of {plan.step.tokens:,} tokens",
        f"a step {1e3 * plan.step.seconds:,.0f} ms (optimistic: {1e3 * best.seconds:,.0f}), "
        f"{plan.step.tokens_per_second:,.0f} tokens/s; predicted, not measured",
        "",
        f"{'stage':14}{'time':>12}   {'memory':28}{'disk':>12}",
        *(f"{name:14}{duration(time):>12}   {room:28}{volume(disk):>12}" for name, time, room, disk in rows),
        "",
        f"run it with  {setting.describe()} --torch-compile {setting.layout.stage < 3}",
        "",
        *assumptions(setting, plan.calibration),
        f"- preparation as on {MEASURED['device']}, shared by all cores; evaluation counts 20 million tokens at most",
    ]
    if plan.checkpoints > 0.02 * plan.training:
        share = 100 * plan.checkpoints / plan.training
        lines.append(
            f"- a checkpoint every {SAVE_STEPS} steps, written and checked at {CHECKPOINT_RATE / 1e9:g} GB/s, is "
            f"{share:.0f} % of the training's time: raise --save-steps"
        )
    return "\n".join(lines)


def machine(setting: Setting) -> str:
    layout = setting.layout
    one = f"{layout.gpus // layout.nodes} x {setting.gpu.name}"
    return one if layout.nodes == 1 else f"{layout.nodes} machines of {one}"


def assumptions(setting: Setting, calibration: Calibration) -> list[str]:
    """Lines that say what a prediction rests on."""
    network = f", {NETWORK * 8 / 1e9:.0f} Gbit/s of network a GPU" if setting.layout.nodes > 1 else ""
    lines = [
        "Assumed:",
        f"- {BASES_PER_TOKEN:.2f} bases a token, {MEAN_TOKENS} tokens a sequence, {NGRAMS_PER_TOKEN} G-grams a token "
        f"after masking, of {setting.config.ngram_vocab_size:,}",
        f"- attention by {setting.attention}, bf16, NVLink of {setting.gpu.link / 1e9:.0f} GB/s each way{network}; a "
        "loader that keeps up",
    ]
    if calibration.source:
        lines.append(
            f"- {calibration.source}, measured, took {calibration.time:.2f} times the time and "
            f"{calibration.memory:.2f} times the memory predicted for it; so will this"
        )
    else:
        lines.append("- rates of published measurements; --bench takes yours (of `dnazen bench`) and corrects by them")
    return lines


def format_sizes(sizes: list[Size], best: Size | None, hours: float, calibration: Calibration) -> str:
    """A table of the sizes, and the advice."""
    setting = sizes[0].setting
    lines = [
        f"{hours:g} hours of training on {machine(setting)}; predicted, not measured",
        "",
        f"{'size':10}{'parameters':>14}{'tokens':>16}{'a parameter':>14}   {'bases, read once'}",
    ]
    for size in sizes:
        cells = f"{size.setting.model:10}{size.count / 1e6:>12,.1f} M"
        if size.fits:
            read = f"{size.tokens / size.count:,.1f}"
            lines.append(f"{cells}{count(size.tokens):>16}{read:>14}   {count(size.tokens * BASES_PER_TOKEN)}")
        else:
            lines.append(f"{cells}   does not fit {setting.gpu.memory / 1e9:.0f} GB")
    wanted = f"{TOKENS_PER_PARAMETER} tokens a parameter"
    if best is None:
        verdict = f"None of them would read {wanted}: take more hours or GPUs, or `tiny` all the same."
    else:
        tokens = TOKENS_PER_PARAMETER * best.count
        verdict = (
            f"Take {best.setting.model}, the largest that reads {wanted}: it has them after {count(tokens)} tokens, "
            f"{count(tokens * BASES_PER_TOKEN)} bases read once."
        )
    return "\n".join(
        [
            *lines,
            "",
            verdict,
            "",
            *assumptions(sizes[0].setting, calibration),
            f"- {wanted} is a rule for models that read text from left to right, each token once (Hoffmann et al.",
            "  2022); hidden tokens teach less at a time, and so does a genome that is read again and again",
            "- parameters without the table of G-grams, of which a batch reads few rows",
        ]
    )
