"""A sitting at a GPU: everything that is to be measured there, in one command, with one page as its result.

    python -m benchmarks.gpu --output-dir DIR [--data DIR] [--minutes 45] [--dry-run]

Each step is a process of its own, with a time limit, a log (`logs/STEP.txt`) and a result (`steps/STEP.json`); one that
fails costs itself only. Started again with the same folder, the command goes on with what is left: steps that are done
stay done, those that failed are tried again after all others. A step begins only if its limit fits into the minutes that
remain. `report.md`, written anew after each step, holds every figure beside what `benchmarks.budget` and
`benchmarks.roofline` predict. The exit status is 0 if nothing failed.

`--data` is what an earlier sitting, or `benchmarks.carry`, prepared (default: `data` in the output folder). `--dry-run`
goes the same way on a CPU, with small data and models; its figures say nothing of a GPU.
"""

import argparse
import contextlib
import csv
import datetime
import gzip
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.yeast import ROOT, commit, processor
from dnazen.files import write_json
from dnazen.train.prepare import PACKAGED_GENOME
from tests.train.launch import environment, free_port

BANDWIDTH, REACHED = 4.3e12, 0.85  # an H200's measured copy; what kernels should reach of what bounds them (README.md)
BACKENDS = ("flash_attention_4", "flash_attention_2", "flex_attention", "sdpa", "eager")
PACKAGES = {"flash_attention_4": "flash-attn-4", "flash_attention_2": "flash-attn"}
DRY_BASES = 300_000
TAIL = 25  # lines of a failed step's log
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
TRITON_FUSION = {"WARPS_PER_SM": (8, 12, 16), "EDGES_AT_ONCE": (2, 4, 8)}  # what to try in its kernels
OPERATION_OF = {"WARPS_PER_SM": ("residual_layer_norm", "bwd"), "EDGES_AT_ONCE": ("ngram_fusion", "bwd")}
TRAININGS = {
    f"bench ZeRO-{stage}{', compiled' * compiled}": f"--deepspeed ds_configs/zero{stage}.json" + " --torch-compile" * compiled
    for stage in (1, 2)
    for compiled in (False, True)
}


class Step(NamedTuple):
    """One thing to run. In `command` and `result`, `{out}` and `{data}` are the folders, `{port}` is a free port and
    `{fastest}` stands for the flags of the fastest training so far.
    """

    name: str
    command: str
    limit: int  # seconds
    figures: str = "none"  # which of READERS finds them ...
    result: str = ""  # ... in this file or folder; "made": a step whose result exists is done
    after: str = ""  # the step that must be done before
    needs: str = ""  # a program or a package, without which the step waits for another sitting
    environment: dict[str, str] = {}
    left_out: str = ""  # why it is no part of a dry run


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


def plan(dry: bool) -> list[Step]:
    """All steps, in order."""
    python = shlex.quote(sys.executable) + " -m "
    dnazen, tests = python + "dnazen.cli.main ", python + "pytest -q -m " + ("'not gpu' " if dry else "gpu ")
    data = "--corpus {data}/corpus --ngrams {data}/ngrams "
    gpu_only = "needs a GPU" if dry else ""
    small = "--model tiny --max-batch-tokens 512 --seconds 0.5" if dry else "--model base --seconds 20"
    budget = "--model tiny --tokens 512 256" if dry else ""
    attention = python + "benchmarks.attention --output {out}/attention-%s.json --attn-implementation %s" + " --small" * dry
    run = python + "benchmarks.run --skip-tests --fasta {data}/genome.fa.gz --tokenizer {data}/tokenizer --hidden-size 768 "

    def train(name: str, stage: int, steps: int, processes: int = 1, folder: str = "", **fields: Any) -> Step:
        folder = "{out}/" + (folder or slug(name))
        steps = 2 * steps // 100 if dry and steps >= 100 else 2 if dry else steps
        # with several processes, on a CPU, torchrun: `deepspeed` would show them the GPU whatever the environment says
        launcher = "deepspeed --num_gpus 1" if processes == 1 else f"torchrun --nproc_per_node {processes}"
        line = (
            f"{launcher} --master_port {{port}} dnazen/pretrain.py --deepspeed ds_configs/zero{stage}.json "
            f"{data}--model tiny --output_dir {folder} --max_steps {steps} --logging_steps {1 if dry else 20} "
            f"--gradient_accumulation_steps {2 // processes} --lr_scheduler_type constant_with_warmup --warmup_steps 10 "
            "--eval_strategy no --disable_tqdm True --save_steps 1000" + " --max_batch_tokens 512" * dry
        )
        return Step(name, line, 180, "training", folder, **fields)

    def measure(op: str, mode: str, impl: str = "", more: str = "", limit: int = 120, left_out: str = gpu_only) -> Step:
        name = " ".join(filter(None, (op, mode, impl or "all", more.removeprefix("--set "))))
        flags = f"--op {op} --mode {mode} --output-dir {{out}}/rows/{slug(name)} {more}" + f" --impl {impl}" * bool(impl)
        return Step(f"operator {name}", run + flags, limit, "operators", f"{{out}}/rows/{slug(name)}", left_out=left_out)

    bench = dnazen + "bench " + data + small + " --profile --output-dir {out}/"
    return [
        Step("tokenizer", dnazen + f"tokenizer --fasta {{data}}/genome.fa.gz --vocab-size {256 if dry else 4096} "
             "--output-dir {data}/tokenizer", 120, "made", "{data}/tokenizer"),
        Step("corpus", dnazen + "corpus --fasta {data}/genome.fa.gz --tokenizer {data}/tokenizer --validation-fraction 0.05 "
             f"--max-tokens {126 if dry else 510} --output-dir {{data}}/corpus", 120, "made", "{data}/corpus", "tokenizer"),
        Step("G-grams", dnazen + "ngrams --corpus {data}/corpus --output-dir {data}/ngrams", 120, "made", "{data}/ngrams", "corpus"),
        Step("predictions", python + f"benchmarks.budget {data}{budget} --output {{data}}/predictions.json", 300, "made",
             "{data}/predictions.json", "G-grams"),
        Step("doctor", dnazen + "doctor", 180, "doctor"),
        Step("tests of operators", tests + ("tests/ops/test_runtime.py" if dry else "tests/ops"), 420, "tests"),
        Step("tests of batches", tests + "tests/data/test_device.py", 180, "tests", left_out="as the tests of operators" * dry),
        Step("tests of the model", tests + "tests/model", 420, "tests", left_out="as the tests of operators" * dry),
        Step("tests of training", tests + "tests/train/test_gpu.py", 480, "tests", left_out="as the tests of operators" * dry),
        train("pretraining ZeRO-2", 2, 300),
        train("pretraining ZeRO-2, resumed", 2, 400, folder="pretraining-zero-2", after="pretraining ZeRO-2"),
        train("pretraining ZeRO-1", 1, 60, left_out="as ZeRO-2" * dry),
        train("pretraining ZeRO-3", 3, 60, left_out="as ZeRO-2" * dry),
        train("pretraining on two CPU processes", 2, 100, 2, "pretraining-moved", environment=ON_CPU),
        train("pretraining moved to one device", 2, 200, 1, "pretraining-moved", after="pretraining on two CPU processes"),
        *(Step(name, f"{bench}{slug(name)} --attn-implementation {'sdpa' if dry else 'flex_attention'} {flags}", 300, "bench",
               f"{{out}}/{slug(name)}/bench.json", left_out="as ZeRO-2" * (dry and name != "bench ZeRO-2"))
          for name, flags in TRAININGS.items()),
        *(Step(f"attention {name}", attention % (name, name), 180, "attention", f"{{out}}/attention-{name}.json",
               needs=PACKAGES.get(name, ""), left_out="" if name == "sdpa" else gpu_only) for name in BACKENDS),
        Step("tests of attention with flash-attn-4", tests + "tests/model/test_attention.py", 420, "tests", needs="flash-attn-4",
             left_out=gpu_only),
        Step("bench with flash-attn-4, and the reference", bench + "flash-4 --attn-implementation flash_attention_4 "
             "--impl reference {fastest}", 420, "bench", "{out}/flash-4/bench.json", needs="flash-attn-4", left_out=gpu_only),
        *(measure(op, "fwdbwd", limit=420) for op in ("ngram_fusion", "residual_layer_norm")),
        *(measure(op, mode, "triton") for op in ("ngram_fusion", "residual_layer_norm") for mode in ("fwd", "bwd")),
        measure("ngram_matching", "fwd", limit=240, left_out="as ngram_masking" * dry),
        measure("ngram_masking", "fwd", "PyTorch" if dry else "", limit=240, left_out=""),
        *(measure(*OPERATION_OF[name], "triton", f"--set {name}={value}")
          for name, values in TRITON_FUSION.items() for value in values),
        Step("compute-sanitizer", "compute-sanitizer --error-exitcode 1 " + tests + "tests/ops/test_ngram_masking.py -k test_cases",
             480, "tests", needs="compute-sanitizer", environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, left_out=gpu_only),
    ]  # fmt: skip


def slug(name: str) -> str:
    """A file's name for a step's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# -- figures ----------------------------------------------------------------------------------------------------------


def read_tests(path: Path, log: str, predicted: dict) -> list[Figure]:
    counts = {word.rstrip("s"): int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", log)}
    return [
        Figure(f"tests {word}", counts.get(word, 0), "0" if word in ("failed", "error") else None)
        for word in ("passed", "failed", "error", "skipped")
    ]


def read_training(path: Path, log: str, predicted: dict) -> list[Figure]:
    step = json.loads((path / "report.json").read_text())["step"]
    history = json.loads((path / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
    logs = [entry for entry in history if "loss" in entry]
    straight = predicted.get("losses", {}).get(str(step)) if "zero-2" not in path.name else None
    return [
        Figure(f"loss at step {step}", logs[-1]["loss"], straight and f"{straight:.4g}, that of ZeRO-2"),
        Figure("tokens/s since the last log", logs[-1]["tokens_per_second"], None, True),
        Figure("began at", (re.findall(r"resuming from (checkpoint-\d+)", log) or ["step 0"])[0]),
    ]


def read_bench(path: Path, log: str, predicted: dict) -> list[Figure]:
    figures, result = [], json.loads(path.read_text())
    for row in result["rows"]:
        best = predicted if row["impl"] == "auto" else {}
        figures += [
            Figure(f"tokens/s, {row['attention']}", row["tokens_per_second"], best.get("tokens_per_second"), True),
            Figure("MFU", row["mfu"] or "no peak known", best.get("mfu"), True),
            Figure("ms a step", 1e3 * row["seconds"] / row["steps"], best.get("ms")),
            Figure("share of time waiting for the loader", row["loader_wait"], "0"),
            Figure("peak memory, GiB", row["peak_memory_bytes"] / 2**30),
            Figure("warm-up, steps", row["warm_up"]["steps"]),
            Figure("compilations while measured", row["compilations"], "0"),
        ]
    profile = result["profile"]
    if profile["gaps"] is not None:
        launching = predicted.get("launches", 0) * 5e-3
        words = f"0: launching takes {launching:.1f} ms" if launching < predicted.get("ms", 0) else None
        figures.append(Figure("GPU idle, ms a step", profile["idle_ms"], words))
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
    """Predicted are, for the kernels, their bytes over the bandwidth, and for other forms the roofline's operations."""
    figures = []
    for file in sorted(path.glob("*.csv")):
        for row in csv.DictReader(file.open()):
            best, on_gpu = None, "core" not in row["device"]
            if row["impl"].startswith("triton") and on_gpu:
                best = float(row["gb_per_s"]) * float(row["p50_ms"]) * 1e9 / BANDWIDTH
            elif row["mode"] == "fwdbwd" and " S=512 " in row["shape"]:
                tokens = int(re.search(r"T=(\d+)", row["shape"])[1])
                for most, rows in predicted.get("operators", {}).get(row["op"], {}).items():
                    if 0 <= int(most) - tokens < 512:  # as many whole sequences as fit
                        best = rows.get(f"{row['impl']}, {row['dtype']}")
            figures.append(Figure(f"{row['impl']}, {row['dtype']}, {row['shape']}, ms", float(row["p50_ms"]), best))
    return figures


READERS: dict[str, Callable[[Path, str, dict], list[Figure]]] = {
    "none": lambda *_: [], "made": lambda *_: [], "tests": read_tests, "training": read_training, "bench": read_bench,
    "attention": read_attention, "operators": read_operators,
    "doctor": lambda path, log, predicted: [Figure(*line.split(maxsplit=1)) for line in log.splitlines() if " " in line.strip()],
}  # fmt: skip


# -- running ----------------------------------------------------------------------------------------------------------


class Sitting:
    """The steps, what is known of them, and the page."""

    def __init__(self, out: Path, data: Path, dry: bool):
        self.out, self.data, self.dry, self.steps = out, data, dry, plan(dry)
        for folder in (out / "logs", out / "steps", data):
            folder.mkdir(parents=True, exist_ok=True)
        self.results = {path.stem: json.loads(path.read_text()) for path in (out / "steps").glob("*.json")}
        self.notes: dict[str, str] = {}  # of steps that do not run now

    def fill(self, text: str) -> str:
        return text.format(out=self.out, data=self.data, port=free_port(), fastest=self.fastest())

    def is_done(self, step: Step) -> bool:
        return self.results.get(slug(step.name), {}).get("state") == "done"

    def fastest(self) -> str | None:
        """Flags of the fastest training measured so far."""
        done = [step.name for step in self.steps if step.name in TRAININGS and self.is_done(step)]
        speeds = {name: self.results[slug(name)]["figures"][0][1] for name in done}  # tokens/s
        return TRAININGS[max(speeds, key=speeds.get)] if speeds else None

    def obstacle(self, step: Step, seconds: float) -> str:
        """Why it cannot begin now, or nothing."""
        if step.left_out:
            return f"not in a dry run: {step.left_out}"
        if step.needs and shutil.which(step.needs) is None and installed(step.needs) is None:
            return f"left for another sitting: {step.needs} is not here"
        before = next((other for other in self.steps if other.name == step.after), None)
        if before is not None and not self.is_done(before):
            return f"waits for {before.name!r}"
        if "{fastest}" in step.command and self.fastest() is None:
            return "waits for one of the trainings before it"
        if step.limit > seconds:
            return f"left for next time: needs up to {step.limit} s, and {max(0, seconds):.0f} s are left"
        return ""

    def run(self, minutes: float) -> bool:
        """All that is left and fits; False if something failed."""
        deadline, genome = time.monotonic() + 60 * minutes, self.data / "genome.fa.gz"
        if not genome.exists():
            with gzip.open(PACKAGED_GENOME, "rt") as file:
                header, *lines = file.read().splitlines()
            sequence = "".join(lines)
            genome.write_bytes(gzip.compress(f"{header}\n{sequence[: DRY_BASES if self.dry else None]}\n".encode()))
        for step in sorted(self.steps, key=lambda step: slug(step.name) in self.results):  # failed before: last
            if self.is_done(step):
                continue
            if step.figures == "made" and Path(self.fill(step.result)).exists():
                self.keep(step, {"state": "done", "seconds": 0.0, "figures": [], "tail": ""})
            elif note := self.obstacle(step, deadline - time.monotonic()):
                self.notes[slug(step.name)] = note
                print(f"{step.name}: {note}", flush=True)
            else:
                self.keep(step, self.run_step(step))
        self.write_report()
        return all(result["state"] == "done" for result in self.results.values())

    def keep(self, step: Step, result: dict[str, Any]) -> None:
        self.results[slug(step.name)] = result
        write_json(self.out / "steps" / f"{slug(step.name)}.json", result)
        self.write_report()
        print(f"{step.name}: {result['state']} in {result['seconds']:.0f} s", flush=True)

    def run_step(self, step: Step) -> dict[str, Any]:
        """Run it to its end or its limit; its figures are read even if it failed, as far as they are there."""
        log, started = self.out / "logs" / f"{slug(step.name)}.txt", time.perf_counter()
        own = {key: value for key, value in environment().items() if key != "TRITON_INTERPRET"}
        own |= (ON_CPU if self.dry else {}) | step.environment | {"PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
        command = self.fill(step.command)
        with log.open("w") as file:
            process = subprocess.Popen(shlex.split(command), cwd=ROOT, env=own, stdout=file, stderr=subprocess.STDOUT)
            try:
                status = process.wait(step.limit)
                state = "done" if status == 0 else f"failed with exit status {status}"
            except subprocess.TimeoutExpired:
                state = f"stopped at its limit of {step.limit} s"
            finally:  # also when this program is told to end
                if process.poll() is None:
                    parent = psutil.Process(process.pid)
                    for member in [*parent.children(recursive=True), parent]:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            member.kill()
                    process.wait()
        text, figures = log.read_text(errors="replace"), []
        predictions = self.data / "predictions.json"
        predicted = json.loads(predictions.read_text()) if predictions.exists() else {}
        history = self.out / "pretraining-zero-2"
        if states := list(history.glob("checkpoint-*/trainer_state.json")):
            entries = json.loads(max(states, key=lambda path: path.stat().st_mtime).read_text())["log_history"]
            predicted["losses"] = {str(entry["step"]): entry["loss"] for entry in entries if "loss" in entry}
        try:
            figures = READERS[step.figures](Path(self.fill(step.result)), text, predicted)
        except (OSError, LookupError, ValueError) as error:
            if state == "done":
                state = f"failed: no figures in what it wrote: {type(error).__name__}: {error}"
        tail = "" if state == "done" else "\n".join(text.splitlines()[-TAIL:])
        seconds = time.perf_counter() - started
        return {"state": state, "seconds": seconds, "command": command, "figures": figures, "tail": tail}

    # -- the page -----------------------------------------------------------------------------------------------------

    def write_report(self) -> None:
        """`report.md`."""
        lines = ["# A sitting at a GPU" + ": dry run on a CPU" * self.dry, ""]
        if self.dry:
            lines += ["Small data and models on a CPU, to try the plan: **no figure here says anything of a GPU**.", ""]
        lines += [f"- {what}: {value}" for what, value in describe_machine(self.dry).items()]
        lines += ["", "## Steps", "", "| step | state | seconds |", "|---|---|---|"]
        failures, figures, profiles = [], [], []
        for step in self.steps:
            name = slug(step.name)
            result = self.results.get(name, {"state": self.notes.get(name, "not begun"), "seconds": None, "figures": []})
            seconds = "" if result["seconds"] is None else f"{result['seconds']:.0f}"
            lines.append(f"| {step.name} | {result['state']} | {seconds} |")
            if result.get("tail"):
                failures += [f"### {step.name}: {result['state']}", "", "```text", result["tail"], "```", ""]
            for figure in map(Figure._make, result["figures"]):
                reached = "" if figure.reached is None else f"{figure.reached:.0%}"
                figures.append(f"| {step.name} | {figure.what} | {show(figure.predicted)} | {show(figure.measured)} | {reached} |")
            if step.figures == "bench" and self.is_done(step):
                profile = json.loads(Path(self.fill(step.result)).read_text())["profile"]
                profiles += [f"### {step.name}", "", *profile_tables(profile)]
        lines += ["", "## Figures", "", "Predicted for one H200, at best: arithmetic or traffic, whichever takes longer. Kernels and "
                  f"matrix products should reach some {REACHED:.0%} of that.", "",
                  "| step | figure | predicted | measured | reached |", "|---|---|---|---|---|", *figures]  # fmt: skip
        predictions = self.data / "predictions.json"
        if profiles:
            lines += ["", "## Where a step's time goes", "", *profiles]
            if predictions.exists():
                parts = list(json.loads(predictions.read_text())["parts"].items())[:10]
                lines += ["### Predicted, at best", "", "| part of the step | ms |", "|---|---|"]
                lines += [f"| {name} | {ms:.3f} |" for name, ms in parts]
        lines += ["", "## What failed", "", *(failures or ["Nothing."])]
        report = self.out / "report.md"
        report.with_suffix(".tmp").write_text("\n".join(lines).rstrip() + "\n")
        report.with_suffix(".tmp").replace(report)


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
    has_gpu = not dry and shutil.which(query[0])
    device = subprocess.run(query, capture_output=True, text=True).stdout.strip() if has_gpu else f"{processor()}, no GPU used"
    names = ("torch", "triton", "transformers", "deepspeed", "flash-attn-4", "flash-attn")
    return {
        "device": device,
        "versions": f"Python {platform.python_version()}, " + ", ".join(f"{name} {installed(name) or 'none'}" for name in names),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared data (OUTPUT_DIR/data)")
    parser.add_argument("--minutes", type=float, default=45.0, help="of the whole sitting (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="small, on a CPU")
    args = parser.parse_args()
    if not args.dry_run and shutil.which("nvidia-smi") is None:
        parser.error("no GPU found (nvidia-smi is not here); --dry-run goes through the plan without one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end; what is done stays done"))
    out = args.output_dir.resolve()
    sitting = Sitting(out, (args.data or out / "data").resolve(), args.dry_run)
    good = sitting.run(args.minutes)
    print(f"report: {out / 'report.md'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
