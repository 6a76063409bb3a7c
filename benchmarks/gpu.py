"""A sitting at a GPU: everything that is to be measured there, in one command, with one page as its result.

    python -m benchmarks.gpu --output-dir DIR [--data DIR] [--minutes 45] [--dry-run]

Each step is a process of its own, with a time limit, a log (`logs/STEP.txt`) and a result (`steps/STEP.json`); one that
fails costs itself only. Started again with the same folder, the command goes on with what is left: steps that are done
stay done, those that failed are tried again after all others. A step begins only if its limit fits into the minutes
that remain. `report.md`, written anew after each step, holds every figure beside what `benchmarks.budget` and
`benchmarks.roofline` predict, with its commit if that is not the present one. The exit status is 0 if nothing failed.

`--data` is what an earlier sitting, or `benchmarks.carry`, prepared (default: `data` in the output folder). `--dry-run`
goes the same way on a CPU, with small data and models; its figures say nothing of a GPU.
"""

import argparse
import contextlib
import gzip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.gpu_page import READERS, installed, page
from benchmarks.yeast import ROOT, commit
from dnazen.data.fasta import read_fasta
from dnazen.environment import free_port
from dnazen.files import InputError, write_json
from dnazen.pretraining.prepare import PACKAGED_GENOME
from tests.helpers.launch import environment

# back-ends of attention, and the package that one needs
BACKENDS = {
    "flash_attention_4": "flash-attn-4",
    "flash_attention_2": "flash-attn",
    "flex_attention": "",
    "sdpa": "",
    "eager": "",
}
TRAININGS = {
    f"bench ZeRO-{stage}{flag and ', compiled'}": f"--deepspeed ds_configs/zero{stage}.json{flag}"
    for stage in (1, 2)
    for flag in ("", " --torch-compile")
}
TUNED = {  # constants of the fusion's kernels, what shows their worth, and what to try
    "WARPS_PER_SM": ("residual_layer_norm", "bwd", (8, 12, 16)),
    "EDGES_AT_ONCE": ("ngram_fusion", "bwd", (2, 4, 8)),
}
DRY_BASES = 150_000
CUDA_PROGRAMS = "/usr/local/cuda/bin"  # where programs lie that are often not on PATH
TAIL = 25  # lines of a failed step's log
start = subprocess.Popen  # of a step
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


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


def plan(dry: bool) -> list[Step]:
    """All steps, in order."""
    python = shlex.quote(sys.executable) + " -m "
    dnazen, tests = python + "dnazen.cli.main ", python + "pytest -q -m " + ("'not gpu' " if dry else "gpu ")
    data, genome = "--corpus {data}/corpus --ngrams {data}/ngrams ", "--fasta {data}/genome.fa.gz "
    bench = dnazen + f"bench {data}--profile --output-dir {{out}}/"
    size = "--model tiny --max-batch-tokens 512 --seconds 0.5 " if dry else "--model base --seconds 20 "
    gpu_only, as_zero_2, as_operators = (text * dry for text in ("needs a GPU", "as ZeRO-2", "as tests of operators"))

    def make(name: str, line: str, file: str, after: str = "") -> Step:
        return Step(name, line, 300, "made", f"{{data}}/{file}", after)

    def test(name: str, paths: str, limit: int = 420, left_out: str = as_operators, **fields: Any) -> Step:
        return Step(f"tests of {name}", tests + paths, limit, "tests", left_out=left_out, **fields)

    def train(name: str, stage: int, steps: int, processes: int = 1, folder: str = "", **fields: Any) -> Step:
        folder = "{out}/" + (folder or slug(name))
        steps = max(2, steps // 50) if dry else steps
        # several processes stay on the CPU, so torchrun: `deepspeed` shows them the GPU, whatever the environment says
        small = " --max_batch_tokens 512" * dry
        launcher = "deepspeed --num_gpus 1" if processes == 1 else f"torchrun --nproc_per_node {processes}"
        line = (
            f"{launcher} --master_port {{port}} dnazen/pretrain.py --deepspeed ds_configs/zero{stage}.json {data}"
            f"--model tiny --max_steps {steps} --logging_steps {1 if dry else 20} "
            f"--gradient_accumulation_steps {2 // processes} --disable_tqdm True --output_dir {folder} "
            f"--lr_scheduler_type constant_with_warmup --warmup_steps 10 --eval_strategy no --save_steps 1000{small}"
        )
        return Step(name, line, 180, "training", folder, **fields)

    def time_training(name: str, flags: str, attention: str, limit: int = 300, **fields: Any) -> Step:
        line = f"{bench}{slug(name)} {size}--attn-implementation {attention} {flags}"
        return Step(name, line, limit, "bench", f"{{out}}/{slug(name)}/bench.json", **fields)

    def attend(name: str, package: str) -> Step:
        file = f"{{out}}/attention-{name}.json"
        line = f"{python}benchmarks.attention --attn-implementation {name} --output {file}" + " --small" * dry
        left_out = gpu_only * (name != "sdpa")
        return Step(f"attention {name}", line, 180, "attention", file, needs=package, left_out=left_out)

    def operate(
        op: str, mode: str, impl: str = "", constant: str = "", limit: int = 120, left_out: str = gpu_only
    ) -> Step:
        name = f"operator {op} {mode} {impl or 'all'} {constant}".strip()
        line = f"{python}benchmarks.run --op {op} --mode {mode} --hidden-size 768 --skip-tests {genome}"
        line += f"--tokenizer {{data}}/tokenizer --output-dir {{out}}/rows/{slug(name)}"
        line += f" --impl {impl}" * bool(impl) + f" --set {constant}" * bool(constant)
        return Step(name, line, limit, "operators", f"{{out}}/rows/{slug(name)}", left_out=left_out)

    vocabulary, most = (256, 126) if dry else (4096, 510)
    words = f"corpus {genome}--tokenizer {{data}}/tokenizer --max-tokens {most} --validation-fraction 0.05 "
    sizes = "--model tiny --tokens 512 256 " if dry else ""
    fusions, flash_4 = ("ngram_fusion", "residual_layer_norm"), {"needs": "flash-attn-4", "left_out": gpu_only}
    masking = operate("ngram_masking", "fwd", limit=240, left_out="")
    sanitizer = "compute-sanitizer --error-exitcode 1 " + tests + "tests/ops/test_ngram_masking.py -k test_cases"
    tokenizer = f"tokenizer {genome}--vocab-size {vocabulary} "
    return [
        make("tokenizer", f"{dnazen}{tokenizer}--output-dir {{data}}/tokenizer", "tokenizer"),
        make("corpus", f"{dnazen}{words}--output-dir {{data}}/corpus", "corpus", "tokenizer"),
        make("G-grams", f"{dnazen}ngrams --corpus {{data}}/corpus --output-dir {{data}}/ngrams", "ngrams", "corpus"),
        make("predictions", f"{python}benchmarks.budget {data}{sizes}--output {{data}}/predictions.json",
             "predictions.json", "G-grams"),
        Step("doctor", dnazen + "doctor", 180, "doctor"),
        test("operators", "tests/ops/test_runtime.py" if dry else "tests/ops", left_out=""),
        test("batches", "tests/batches/test_device.py", 180),
        test("the model", "tests/models"),
        test("training", "tests/pretraining/test_gpu.py"),
        train("pretraining ZeRO-2", 2, 300),
        train("pretraining ZeRO-2, resumed", 2, 400, folder="pretraining-zero-2", after="pretraining ZeRO-2"),
        train("pretraining ZeRO-1", 1, 60, left_out=as_zero_2),
        train("pretraining ZeRO-3", 3, 60, left_out=as_zero_2),
        train("pretraining on two CPU processes", 2, 100, 2, "pretraining-moved", environment=ON_CPU),
        train("pretraining moved to one device", 2, 200, folder="pretraining-moved",
              after="pretraining on two CPU processes"),
        *(time_training(name, flags, "sdpa" if dry else "flex_attention", left_out=as_zero_2 * (name != "bench ZeRO-2"))
          for name, flags in TRAININGS.items()),
        *(attend(name, package) for name, package in BACKENDS.items()),
        test("attention with flash-attn-4", "tests/models/test_attention.py", **flash_4),
        time_training("bench with flash-attn-4, and the reference", "--impl reference {fastest}", "flash_attention_4",
                      420, **flash_4),
        *(operate(op, "fwdbwd", limit=420) for op in fusions),
        *(operate(op, mode, "triton") for op in fusions for mode in ("fwd", "bwd")),
        operate("ngram_matching", "fwd", limit=240, left_out="as ngram_masking" * dry),
        masking._replace(command=masking.command + " --impl PyTorch" * dry),
        *(operate(op, mode, "triton", f"{name}={value}")
          for name, (op, mode, values) in TUNED.items() for value in values),
        Step("compute-sanitizer", sanitizer, 480, "tests", needs="compute-sanitizer", left_out=gpu_only,
             environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
    ]  # fmt: skip


def slug(name: str) -> str:
    """A file's name for a step's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def search_path() -> str:
    """Where a step's programs are looked for."""
    return environment()["PATH"] + os.pathsep + CUDA_PROGRAMS


# -- running ----------------------------------------------------------------------------------------------------------


class Sitting:
    """The steps, what is known of them, and the page.

    Raises:
        InputError: the folder holds results of the other mode, dry or not.
    """

    def __init__(self, out: Path, data: Path, dry: bool):
        self.out, self.data, self.dry, self.steps = out, data, dry, plan(dry)
        self.mode = "dry run" if dry else "sitting at a GPU"
        for folder in (out / "logs", out / "steps", data):
            folder.mkdir(parents=True, exist_ok=True)
        self.results = {path.stem: json.loads(path.read_text()) for path in (out / "steps").glob("*.json")}
        for mode in {result.get("mode", "run that kept no mode") for result in self.results.values()} - {self.mode}:
            raise InputError(f"{out}: expected results of a {self.mode}, found those of a {mode}: take another folder")
        self.notes: dict[str, str] = {}  # of steps that do not run now

    def fill(self, text: str, written: Callable[[str], str] = str) -> str:
        """A step's text with its places filled, folders as they are `written` there."""
        out, data = written(str(self.out)), written(str(self.data))
        return text.format(out=out, data=data, port=free_port(), fastest=self.fastest())

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
        if step.needs and shutil.which(step.needs, path=search_path()) is None and installed(step.needs) is None:
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
            name, sequence = next(read_fasta(PACKAGED_GENOME))
            genome.write_bytes(gzip.compress(f">{name}\n{sequence[: DRY_BASES if self.dry else None]}\n".encode()))
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
        result |= {"mode": self.mode, "commit": commit()}
        self.results[slug(step.name)] = result
        write_json(self.out / "steps" / f"{slug(step.name)}.json", result)
        self.write_report()
        print(f"{step.name}: {result['state']} in {result['seconds']:.0f} s", flush=True)

    def run_step(self, step: Step) -> dict[str, Any]:
        """Run it to its end or its limit; its figures are read even if it failed, as far as they are there."""
        log, started = self.out / "logs" / f"{slug(step.name)}.txt", time.perf_counter()
        own = {key: value for key, value in environment().items() if key != "TRITON_INTERPRET"}
        own |= (ON_CPU if self.dry else {}) | step.environment
        own |= {"PYTHONUNBUFFERED": "1", "COLUMNS": "200", "PATH": search_path()}
        command, result = self.fill(step.command, shlex.quote), Path(self.fill(step.result))
        if step.figures in ("bench", "operators"):  # of a try before
            shutil.rmtree(result.parent if step.figures == "bench" else result, ignore_errors=True)
        with log.open("w") as file:
            process = start(shlex.split(command), cwd=ROOT, env=own, stdout=file, stderr=subprocess.STDOUT)
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
        try:
            figures = READERS[step.figures](result, text, self.predicted())
        except (OSError, LookupError, ValueError) as error:
            if state == "done":
                state = f"failed: no figures in what it wrote: {type(error).__name__}: {error}"
        tail = "" if state == "done" else "\n".join(text.splitlines()[-TAIL:])
        seconds = time.perf_counter() - started
        profile = json.loads(result.read_text())["profile"] if step.figures == "bench" and figures else None
        found = {"figures": figures, "profile": profile, "tail": tail}
        return {"state": state, "seconds": seconds, "command": command, **found}

    def write_report(self) -> None:
        """`report.md`."""
        predicted, steps = self.predicted(), []
        for step in self.steps:
            state = self.notes.get(slug(step.name), "not begun")
            unknown = {"state": state, "seconds": None, "figures": [], "tail": ""}
            steps.append((step.name, self.results.get(slug(step.name), unknown)))
        text = page(steps, predicted, self.dry)
        report = self.out / "report.md"
        report.with_suffix(".tmp").write_text(text)
        report.with_suffix(".tmp").replace(report)

    def predicted(self) -> dict[str, Any]:
        """What `benchmarks.budget` wrote, if it has."""
        path = self.data / "predictions.json"
        return json.loads(path.read_text()) if path.exists() else {}


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
    try:
        sitting = Sitting(out, (args.data or out / "data").resolve(), args.dry_run)
    except InputError as error:
        parser.error(str(error))
    good = sitting.run(args.minutes)
    print(f"report: {out / 'report.md'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
