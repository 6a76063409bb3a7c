"""The benchmark's result as text."""

from typing import Any


def format_bench(result: dict[str, Any]) -> str:
    """A table with a column for each implementation."""
    size = f"up to {result['max_batch_tokens']:,} tokens a step"
    lines = [f"{result['model']}, {result['precision']}, {size}, on {result['machine']}"]
    table = {
        "tokens/s": "{tokens_per_second:,.0f}",
        "TFLOP/s owed": "{tflops_per_second:.3f}",
        "of them done": "{work_done:.1%}",
        "tokens a step": "{tokens_per_step:,.0f}",
        "sequences a step": "{sequences_per_step:,.1f}",
        "padding": "{padding_share:.1%}",
        "loader wait": "{loader_wait:.1%}",
        "G-grams a token": "{ngrams_per_token:.3f}",
        "peak memory, MiB": "{memory:,.0f}",
        "attention": "{attention}",
        "warm-up, s": "{warm_up[seconds]:.1f}",
    }
    if result["rows"][0]["mfu"] is not None:
        table["MFU"] = "{mfu:.1%}"
    lines.append(" " * 18 + "".join(f"{row['impl']:>16}" for row in result["rows"]))
    for name, form in table.items():
        cells = [form.format(**row, memory=row["peak_memory_bytes"] / 2**20) for row in result["rows"]]
        lines.append(f"{name:18}" + "".join(f"{cell:>16}" for cell in cells))
    for row, ratio in list(zip(result["rows"], result["speed_up"], strict=True))[1:]:
        lines.append(f"{ratio:.2f} times as fast as {row['impl']}")
    lines += [f"{name} failed: {reason}" for name, reason in result["failed"].items()]
    for row in result["rows"]:
        if not row["warm_up"]["ended"]:
            lines.append(f"{row['impl']}: still compiling after {row['warm_up']['steps']} steps, when measuring began")
        if not row["counts_attention"]:
            kernels = f"{row['attention']}'s kernels are not counted among what compiles"
            lines.append(f"{row['impl']}: {kernels}, so the warm-up may have ended early: its caches were not found")
        if row["compilations"]:
            lines.append(f"{row['impl']}: {row['compilations']} compilations while it was measured")
    return "\n".join(lines + format_profile(result["profile"]) if result["profile"] else lines)


def format_profile(profile: dict[str, Any]) -> list[str]:
    """Lines that say what `summarize_profile` found."""

    def table(rows: list[dict[str, Any]]) -> list[str]:
        return [f"{row['ms']:10.3f} ms {row['calls']:8.1f} x  {row['name'][:90]}" for row in rows]

    lines = [f"in a step, the {profile['unit']}s that take longest (mean of {profile['steps']} steps):"]
    lines += table(profile["expensive"])
    if profile["gaps"] is None:
        return [*lines, "no GPU, so no gaps"]
    busy, idle = profile["busy_ms"], profile["idle_ms"]
    lines.append(f"in a step, GPU busy {busy:.2f} ms, idle {idle:.2f} ms, the host being in:")
    return lines + table(profile["gaps"])
