"""GUE as a set of jobs, each a (model, data set, seed) in a process of its own, spread over the devices."""

import hashlib
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

import dnazen
from dnazen.files import InputError, lock_run, read_json, sha256_file, write_json
from dnazen.finetuning.data import REPORT_FILE, Overlap, count_overlaps, find_splits, read_table
from dnazen.finetuning.model import checksum_weights, list_weights
from dnazen.gue import kmer
from dnazen.gue.protocol import LEARNING_RATE, PROTOCOLS, SEQUENCES_PER_STEP, choose_datasets
from dnazen.gue.report import describe_data, write_report
from dnazen.models.hub import fetch_model
from dnazen.processes import die_with

logger = logging.getLogger(__name__)

JOB_FILE, LOG_FILE = "job.json", "log.txt"
_SCRIPT = Path(dnazen.__file__).parent / "finetune.py"
# of a job: weights, gradients and Adam's moments in fp32, where bf16 may be stored; activations, and CUDA itself
_BYTES_PER_STORED_BYTE, _BYTES_BESIDE = 8, 6 << 30
_MAX_JOBS_PER_GPU = 6  # more only wait for the processor


class Model(NamedTuple):
    """A row of the report."""

    label: str
    folder: Path | None  # None: the k-mer baseline
    use_ngrams: bool
    checksum: str

    @property
    def job_folder(self) -> str:
        """Where its jobs lie."""
        return self.label.replace(", ", "-").replace(" ", "-")


class Job(NamedTuple):
    """One training."""

    model: Model
    dataset: str
    seed: int
    output_dir: Path
    arguments: list[str]  # of its command
    data_sha256: str
    cost: int  # tokens that it trains on, at most

    @property
    def name(self) -> str:
        return f"{self.model.label} {self.dataset} seed {self.seed}"

    @property
    def is_done(self) -> bool:
        return (self.output_dir / REPORT_FILE).is_file()

    def record(self) -> dict[str, Any]:
        """What a finished job must agree on to be taken for this one."""
        return {"arguments": self.arguments, "model_sha256": self.model.checksum, "data_sha256": self.data_sha256}


class Running(NamedTuple):
    """A job that was started."""

    job: Job
    process: subprocess.Popen
    log: IO[bytes]
    device: str | None
    started: float


def run_gue(
    data: str | PathLike, models: list[str], output_dir: str | PathLike, seeds: int = 3, tasks: list[str] | None = None,
    no_ngrams: bool = False, learning_rate: float = LEARNING_RATE, epochs: float | None = None,
    max_steps: int | None = None, jobs_per_device: int | None = None,
) -> bool:  # fmt: skip
    """Fine-tune each model on each data set with each seed, and report; go on where an earlier call was stopped.

    Args:
        data: GUE's folder.
        models: folders or names on the hub, or `kmer-lr`.
        output_dir: `report.md`, `results.csv`, `density.csv`, `gue.png`, and `jobs/` with what each job wrote.
        seeds: how many; they are 0, 1, ...
        tasks: data sets by name; None for all that are there.
        no_ngrams: run each model that was pretrained with G-grams a second time, with its G-grams hidden.
        learning_rate: for all data sets.
        epochs, max_steps: of each, instead of the protocol's; the learning rate falls to 0 over them.
        jobs_per_device: at a time; by default what a GPU's memory holds, or one for each core.

    Returns:
        Whether every job finished.

    Raises:
        InputError: models or numbers cannot be used, or none of the data; a finished job in `output_dir` had
            other settings.
    """
    numbers = {"seeds": seeds, "learning-rate": learning_rate, "epochs": epochs, "max-steps": max_steps}
    for name, value in {**numbers, "jobs-per-device": jobs_per_device}.items():
        if value is not None and value <= 0:
            raise InputError(f"--{name}: expected a number above 0, found {value}")
    output_dir = Path(output_dir)
    present, absent = choose_datasets(Path(data), tasks)
    overlaps, unreadable = count_all_overlaps(Path(data), present, absent)
    present = {dataset: folder for dataset, folder in present.items() if dataset in overlaps}
    print("\n".join(describe_data(overlaps, absent)), flush=True)
    rows = list_models(models, no_ngrams)
    jobs = [
        make_job(
            model, dataset, folder, seed, output_dir, overlaps[dataset]["train"].rows, learning_rate, epochs, max_steps
        )
        for dataset, folder in present.items()
        for model in rows
        for seed in range(seeds if model.folder else 1)
    ]
    _lock = lock_run(output_dir)  # held until this function returns
    waiting = [job for job in jobs if not is_finished(job)]
    if len(waiting) < len(jobs):
        print(f"{len(jobs) - len(waiting):,} of {len(jobs):,} jobs were finished before")
    failed = {**unreadable, **run_jobs(waiting, len(jobs), jobs_per_device)}
    finished = [job for job in jobs if job.is_done]
    results = [
        {"model": job.model.label, "dataset": job.dataset, "seed": job.seed, "folder": job.output_dir}
        for job in finished
    ]
    length = f"{max_steps:,} steps" if max_steps else f"{epochs:g} epochs" if epochs else "DNABERT-2's protocol"
    settings = {"training": length, "sequences a step": SEQUENCES_PER_STEP, "learning rate": learning_rate}
    write_report(output_dir, [model.label for model in rows], results, failed, absent, overlaps, settings)
    return not failed


def count_all_overlaps(
    folder: Path, present: Iterable[str], absent: dict[str, str]
) -> tuple[dict[str, dict[str, Overlap]], dict[str, str]]:
    """Repeats and leaks of the data sets that are run, and of those that cannot be but are there in part.

    Returns:
        The counts, and what is wrong with the data sets that should be run and cannot be read.
    """
    overlaps, unreadable = {}, {}
    for dataset in (dataset for dataset in PROTOCOLS if dataset in present or dataset in absent):
        try:
            tables = {split: read_table(path) for split, path in find_splits(folder / dataset).items()}
        except InputError as error:
            if dataset in present:
                unreadable[dataset] = str(error)
                print(f"{dataset}: failed, {error}", flush=True)
            else:
                logger.warning("%s: not counted: %s", dataset, error)
            continue
        if tables:
            overlaps[dataset] = count_overlaps(tables)
    return overlaps, unreadable


def list_models(names: list[str], no_ngrams: bool) -> list[Model]:
    """The report's rows, each with a label of its own: the folder's name, or of what is above if that is `final`.

    Raises:
        InputError: there is no such model, it is given twice, or two have names that cannot be told apart.
    """
    folders = {name: None if name == kmer.NAME else fetch_model(name).resolve() for name in names}
    if len(set(folders.values())) < len(names):
        raise InputError(f"--model: expected different models, found {', '.join(names)}")
    # the hub's models lie in folders that are named after commits
    named = {name: folder if Path(name).is_dir() else Path(name) for name, folder in folders.items() if folder}
    parts = {name: [part for part in path.parts if part != "final"] for name, path in named.items()}
    depth = 1
    while len({tuple(path[-depth:]) for path in parts.values()}) < len(parts):
        if depth > max(map(len, parts.values())):
            raise InputError(f"--model: expected models that differ beside `final`, found {', '.join(names)}")
        depth += 1
    models = []
    for name, folder in folders.items():
        if folder is None:
            models.append(Model(kmer.NAME, None, False, ""))
            continue
        label, checksum = "-".join(parts[name][-depth:]), checksum_weights(folder)
        models.append(Model(label, folder, True, checksum))
        sees_ngrams = read_json(folder / "config.json", "a model's configuration").get("use_ngrams", True)
        if no_ngrams and sees_ngrams and (folder / "ngram.json").is_file():
            models.append(Model(f"{label}, no G-grams", folder, False, checksum))
    job_folders: dict[str, Model] = {}
    for model in models:
        if (other := job_folders.setdefault(model.job_folder, model)) is not model:
            found = f"{other.label} ({other.folder}) and {model.label} ({model.folder})"
            raise InputError(f"--model: expected a folder of jobs for each, found {model.job_folder} for {found}")
    return models


def make_job(
    model: Model, dataset: str, folder: Path, seed: int, output_dir: Path, num_rows: int, learning_rate: float,
    epochs: float | None, max_steps: int | None,
) -> Job:  # fmt: skip
    """A job's command; it is evaluated, and warmed up, at least once in a tenth of its steps."""
    data_sha256 = hashlib.sha256("".join(map(sha256_file, find_splits(folder).values())).encode()).hexdigest()
    job_dir = output_dir / "jobs" / model.job_folder / dataset.replace("/", "-") / f"seed-{seed}"
    arguments = ["--data", str(folder.resolve())]
    if model.folder is None:
        return Job(model, dataset, seed, job_dir, ["-m", kmer.__name__, *arguments], data_sha256, 0)
    protocol = PROTOCOLS[dataset]
    epochs, steps = (epochs, -1) if epochs else (protocol.epochs, protocol.max_steps)
    steps = max_steps or steps
    total = steps if steps > 0 else math.ceil(epochs * math.ceil(num_rows / SEQUENCES_PER_STEP))
    tenth = max(1, total // 10)
    arguments = [
        str(_SCRIPT), *arguments, "--model", str(model.folder), "--seed", str(seed),
        "--learning_rate", str(learning_rate), "--num_train_epochs", str(epochs), "--max_steps", str(steps),
        "--per_device_train_batch_size", str(SEQUENCES_PER_STEP), "--max_length", str(protocol.max_length),
        "--warmup_steps", str(min(protocol.warmup_steps, tenth)), "--eval_strategy", "steps",
        "--eval_steps", str(min(protocol.eval_steps, tenth)), "--use_ngrams", str(model.use_ngrams),
        "--disable_tqdm", "True",
    ]  # fmt: skip
    return Job(model, dataset, seed, job_dir, arguments, data_sha256, total * protocol.max_length)


def is_finished(job: Job) -> bool:
    """Whether the job was finished by an earlier call; what an unfinished one left is removed.

    Raises:
        InputError: it was finished with other settings, data or weights.
    """
    if not job.is_done:
        if job.output_dir.exists():
            shutil.rmtree(job.output_dir)
        return False
    recorded, expected = read_json(job.output_dir / JOB_FILE, "the settings of a job"), job.record()
    if recorded != expected:
        changed = [name for name in expected if recorded.get(name) != expected[name]]
        found = "; ".join(f"{name} {recorded.get(name)}, now {expected[name]}" for name in changed)
        raise InputError(
            f"{job.output_dir}: finished with other settings: {found}; remove it, or choose another --output-dir"
        )
    return True


def run_jobs(waiting: list[Job], total: int, jobs_per_device: int | None) -> dict[str, str]:
    """Run jobs, each on the device that has fewest; return the last line of the log of those that failed."""
    if not waiting:
        return {}
    num_gpus, num_cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    devices = [None] if not num_gpus else visible_gpus(num_gpus)
    limit = jobs_per_device or (jobs_per_gpu(waiting) if num_gpus else num_cores)
    threads = max(1, num_cores // min(limit * len(devices), len(waiting)))
    where = f"each of {num_gpus} GPUs" if num_gpus else f"{num_cores} cores"
    print(f"{len(waiting):,} jobs, {limit} at a time on {where}, {threads} threads each", flush=True)
    # the longest first, so that no long one is left for the end
    queue, running, failed = sorted(waiting, key=lambda job: -job.cost), [], {}
    done = total - len(waiting)
    try:
        while queue or running:
            loads = {device: sum(other.device == device for other in running) for device in devices}
            device = min(loads, key=loads.get)
            if queue and loads[device] < limit:
                running.append(start_job(queue.pop(0), device, threads))
                continue
            ended = [other for other in running if other.process.poll() is not None]
            for other in ended:
                running.remove(other)
                other.log.close()
                done += 1
                say_ended(other, done, total, failed)
            if not ended:
                time.sleep(0.2)
    finally:
        for other in running:
            other.process.kill()
            other.process.wait()
            other.log.close()
    return failed


def start_job(job: Job, device: str | None, threads: int) -> Running:
    """Start a job; it dies with this process."""
    job.output_dir.mkdir(parents=True)
    write_json(job.output_dir / JOB_FILE, job.record())
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    log = open(job.output_dir / LOG_FILE, "wb")
    command = [sys.executable, *job.arguments, "--output_dir", str(job.output_dir)]
    options = dict(stdout=log, stderr=subprocess.STDOUT, env=environment)
    process = subprocess.Popen(command, **options, preexec_fn=partial(die_with, os.getpid()))
    return Running(job, process, log, device, time.perf_counter())


def say_ended(ended: Running, done: int, total: int, failed: dict[str, str]) -> None:
    """Print how a job ended, and note it if it failed."""
    job, seconds = ended.job, time.perf_counter() - ended.started
    if ended.process.returncode == 0 and job.is_done:
        test = json.loads((job.output_dir / REPORT_FILE).read_text())["test"]
        keep_best(job)
        print(f"{done:,}/{total:,} {job.name}: test MCC {100 * test['mcc']:.2f}, {seconds:.0f} s", flush=True)
        return
    lines = (job.output_dir / LOG_FILE).read_text(errors="replace").strip().splitlines()
    reason = lines[-1] if lines else "nothing in its log"
    failed[job.name] = f"exit status {ended.process.returncode}: {reason} ({job.output_dir / LOG_FILE})"
    print(f"{done:,}/{total:,} {job.name}: failed, {failed[job.name]}", flush=True)


def keep_best(job: Job) -> None:
    """Of the models that one data set's seeds gave, keep the one that is best on dev: 84 of `base` take 100 GB."""
    folders = [path.parent for path in job.output_dir.parent.glob(f"seed-*/{REPORT_FILE}")]
    dev = {folder: json.loads((folder / REPORT_FILE).read_text())["dev"]["mcc"] for folder in folders}
    best = max(sorted(dev), key=dev.get)
    for folder in folders:
        if folder != best:
            shutil.rmtree(folder / "final", ignore_errors=True)


def visible_gpus(count: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is set to for each GPU that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:count] if named else [str(index) for index in range(count)]


def jobs_per_gpu(jobs: list[Job]) -> int:
    """How many jobs of the largest model fit a GPU."""
    folders = {job.model.folder for job in jobs if job.model.folder}
    sizes = [sum(path.stat().st_size for path in list_weights(folder)) for folder in folders]
    need = max(sizes, default=0) * _BYTES_PER_STORED_BYTE + _BYTES_BESIDE
    memory = min(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))
    return max(1, min(memory // need, _MAX_JOBS_PER_GPU))
