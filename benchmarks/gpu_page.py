"""The figures that the steps of `benchmarks.gpu` leave in files and logs, and the page that shows them."""

import csv
import datetime
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.yeast import commit, processor

BANDWIDTH, REACHED = 4.3e12, 0.85  # an H200's measured copy; what kernels should reach of what bounds them (README.md)
LAUNCH_MS = 5e-3
VERSIONS_OF = ("torch", "triton", "transformers", "deepspeed", "flash-attn-4", "flash-attn")


class Figure(NamedTuple):
    """One number, what was predicted for it at best (text: in words), and whether more of it is better."""

    what: str
    measured: float | str
    predicted: float | str | None = None
    more_is_better: bool = False

    @property
    def reached(self) -> float | None:
        """Share of what is predicted at best."""
        if isinstance(self.measured, str) or not isinstance(self.predicted, (int, float)) or not self.measured:
            return None
        return self.measured / self.predicted if self.more_is_better else self.predicted / self.measured


def read_doctor(path: Path, log: str, predicted: dict) -> list[Figure]:
    told = re.findall(r"^(GPU(?: \d+)?|DeepSpeed|attention|matching|masking|fusion) +(.+)$", log, re.MULTILINE)
    return [Figure(what, found) for what, found in told]  # versions stand at the page's head


def read_tests(path: Path, log: str, predicted: dict) -> list[Figure]:
    pattern = re.compile(r"(\d+) (passed|failed|skipped|error)s?\b")
    last = [line for line in log.splitlines() if pattern.search(line)][-1]  # a sanitizer's summary may follow
    counts = {word: int(count) for count, word in pattern.findall(last)}
    return [
        Figure(f"tests {word}", counts.get(word, 0), "0" if word in ("failed", "error") else None)
        for word in ("passed", "failed", "error", "skipped")
    ]


def read_training(path: Path, log: str, predicted: dict) -> list[Figure]:
    """ZeRO's stage, and where a run goes on, change no loss but by rounding."""
    step = json.loads((path / "report.json").read_text())["step"]
    entries = _losses(path / f"checkpoint-{step}")
    straight = {}
    if path.name != "pretraining-zero-2":
        for checkpoint in path.parent.glob("pretraining-zero-2/checkpoint-*"):
            straight |= {entry["step"]: entry["loss"] for entry in _losses(checkpoint)}
    expected = f"{straight[step]:.4g}, ZeRO-2's" if step in straight else None
    return [
        Figure(f"loss at step {step}", entries[-1]["loss"], expected),
        Figure("tokens/s since the last log", entries[-1]["tokens_per_second"]),
        Figure("began at", (re.findall(r"resuming from (checkpoint-\d+)", log) or ["step 0"])[0]),
    ]


def _losses(checkpoint: Path) -> list[dict[str, float]]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def read_bench(path: Path, log: str, predicted: dict) -> list[Figure]:
    figures, result = [], json.loads(path.read_text())
    for row in result["rows"]:
        best = predicted if row["impl"] == "auto" else {}
        compilations = row["compilations"]
        if not row["counts_attention"]:
            compilations = f"{compilations}, attention's not counted"
        figures += [
            Figure(f"tokens/s, {row['attention']}", row["tokens_per_second"], best.get("tokens_per_second"), True),
            Figure("MFU", row["mfu"] or "no peak known", best.get("mfu"), True),
            Figure("ms a step", 1e3 * row["seconds"] / row["steps"], best.get("ms")),
            Figure("share of time waiting for the loader", row["loader_wait"], "0"),
            Figure("peak memory, GiB", row["peak_memory_bytes"] / 2**30),
            Figure("warm-up, steps", row["warm_up"]["steps"]),
            Figure("compilations while measured", compilations, "0"),
        ]
    if result["profile"]["gaps"] is not None:
        launching = LAUNCH_MS * predicted.get("launches", 0)
        hidden = f"0: launching takes {launching:.1f} ms" if launching < predicted.get("ms", 0) else None
        figures.append(Figure("GPU idle, ms a step", result["profile"]["idle_ms"], hidden))
    return figures + [Figure(f"failed: {name}", reason) for name, reason in result["failed"].items()]


def read_attention(path: Path, log: str, predicted: dict) -> list[Figure]:
    figures = []
    for what, found in json.loads(path.read_text()).items():
        best = predicted.get("attention", {}).get(what, {})
        figures += [Figure(f"{what}, {mode}, ms", times[1], best.get(mode)) for mode, times in found["ms"].items()]
        verdict = f"{found['error']:.2g}: {'agrees' if found['agrees'] else 'DOES NOT AGREE'}"
        figures.append(Figure(f"{what}, largest error", verdict, f"at most 2 x {found['error_of_eager']:.2g}, eager's"))
    return figures


def read_operators(path: Path, log: str, predicted: dict) -> list[Figure]:
    """Predicted are, for our kernels, their bytes over the bandwidth, and for other forms the roofline's operations."""
    figures = []
    for file in sorted(path.glob("*.csv")):
        for row in csv.DictReader(file.open()):
            best = None
            if row["impl"].startswith("triton"):
                best = float(row["gb_per_s"]) * 1e9 * float(row["p50_ms"]) / BANDWIDTH
            elif row["mode"] == "fwdbwd" and " S=512 " in row["shape"]:
                tokens = int(re.search(r"T=(\d+)", row["shape"])[1])
                for most, rows in predicted.get("operators", {}).get(row["op"], {}).items():
                    if 0 <= int(most) - tokens < 512:  # as many whole sequences as fit
                        best = rows.get(f"{row['impl']}, {row['dtype']}")
            figures.append(Figure(f"{row['impl']}, {row['dtype']}, {row['shape']}, ms", float(row["p50_ms"]), best))
    return figures


# (result's path, log, predictions) -> figures; LookupError, OSError or ValueError where they are not there
READERS: dict[str, Callable[[Path, str, dict], list[Figure]]] = {
    "none": lambda *_: [],
    "made": lambda *_: [],
    "doctor": read_doctor,
    "tests": read_tests,
    "training": read_training,
    "bench": read_bench,
    "attention": read_attention,
    "operators": read_operators,
}


def page(steps: list[tuple[str, dict[str, Any]]], predicted: dict[str, Any], dry: bool) -> str:
    """`report.md`, of the steps' names and results (`Sitting.run_step`)."""
    lines = ["# A sitting at a GPU" + ": dry run on a CPU" * dry, ""]
    if dry:
        lines += ["Small data and models on a CPU, to try the plan: **no figure here says anything of a GPU**.", ""]
    machine = describe_machine(dry)
    lines += [f"- {what}: {value}" for what, value in machine.items()]
    lines += ["", "## Steps", "", "| step | state | seconds |", "|---|---|---|"]
    failures, figures, profiles = [], [], []
    for name, result in steps:
        if result.get("commit", machine["commit"]) != machine["commit"]:
            name += f" (at commit {result['commit'][:10]})"
        seconds = "" if result["seconds"] is None else round(result["seconds"])
        lines.append(f"| {name} | {result['state']} | {seconds} |")
        if result["tail"]:
            failures += [f"### {name}: {result['state']}", "", "```text", result["tail"], "```", ""]
        for figure in map(Figure._make, result["figures"]):
            reached = "" if figure.reached is None else f"{figure.reached:.0%}"
            cells = (name, figure.what, show(figure.predicted), show(figure.measured), reached)
            figures.append(f"| {' | '.join(cells)} |")
        if result.get("profile"):
            profiles += [f"### {name}", "", *profile_tables(result["profile"])]
    lines += [
        "", "## Figures", "",
        "Predicted for one H200, at best: arithmetic or traffic, whichever takes longer. Kernels and matrix products "
        f"should reach some {REACHED:.0%} of that.", "",
        "| step | figure | predicted | measured | reached |", "|---|---|---|---|---|", *figures,
    ]  # fmt: skip
    if profiles:
        lines += ["", "## Where a step's time goes", "", *profiles]
        lines += ["### Predicted, at best", "", "| part of the step | ms |", "|---|---|"]
        lines += [f"| {name} | {ms:.3f} |" for name, ms in list(predicted.get("parts", {}).items())[:10]]
    lines += ["", "## What failed", "", *(failures or ["Nothing."])]
    return "\n".join(lines).rstrip() + "\n"


def show(value: float | str | None) -> str:
    """For a cell of a table."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value.replace("|", "\\|")
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def profile_tables(profile: dict[str, Any]) -> list[str]:
    """What `dnazen bench --profile` wrote, as Markdown."""

    def table(what: str, rows: list[dict[str, Any]]) -> list[str]:
        cells = [f"| `{row['name'][:100]}` | {row['calls']:.1f} | {row['ms']:.3f} |" for row in rows]
        return [f"| {what} | times a step | ms a step |", "|---|---|---|", *cells, ""]

    lines = table(f"most expensive {profile['unit']}s", profile["expensive"])
    if profile["gaps"] is None:
        return lines
    lines += [f"GPU busy {profile['busy_ms']:.2f} ms a step, idle {profile['idle_ms']:.2f} ms.", ""]
    return lines + table("what the host was in while the GPU was idle", profile["gaps"])


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe_machine(dry: bool) -> dict[str, str]:
    """Device, versions, commit, date."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    device = f"{processor()}, no GPU used"
    if not dry and shutil.which(query[0]):
        device = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    versions = [f"Python {platform.python_version()}", *(f"{name} {installed(name) or 'none'}" for name in VERSIONS_OF)]
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes")
    return {"device": device, "versions": ", ".join(versions), "commit": commit(), "date": date}
