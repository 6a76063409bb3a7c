"""Jobs in processes of their own, spread over the devices."""

import json
import logging
import os
import subprocess
import sys
import time
from functools import partial
from typing import IO, NamedTuple

import torch

from dnazen.files import write_json
from dnazen.finetuning.data import REPORT_FILE
from dnazen.finetuning.loading import list_weights
from dnazen.gue.jobs import JOB_FILE, Job, keep_best
from dnazen.processes import die_with

logger = logging.getLogger(__name__)

LOG_FILE = "log.txt"
# of a job: weights, gradients and Adam's moments in fp32, where bf16 may be stored; activations, and CUDA itself
_BYTES_PER_STORED_BYTE, _BYTES_BESIDE = 8, 6 << 30
_MAX_JOBS_PER_GPU = 6  # more only wait for the processor


class Running(NamedTuple):
    """A job that was started."""

    job: Job
    process: subprocess.Popen
    log: IO[bytes]
    device: str | None
    started: float


def run_jobs(waiting: list[Job], total: int, jobs_per_device: int | None) -> dict[str, str]:
    """Run jobs, each on the device that has fewest.

    Args:
        waiting: jobs to run.
        total: these, and those that were finished before.
        jobs_per_device: at a time; None: what a GPU's memory holds, or one for each core.

    Returns:
        Of each job that failed, by its name, its exit status and the last line of its log.
    """
    if not waiting:
        return {}
    num_gpus, num_cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    devices = [None] if not num_gpus else visible_gpus(num_gpus)
    limit = jobs_per_device or (jobs_per_gpu(waiting) if num_gpus else num_cores)
    threads = max(1, num_cores // min(limit * len(devices), len(waiting)))
    where = f"each of {num_gpus} GPUs" if num_gpus else f"{num_cores} cores"
    logger.info("%s jobs, %d at a time on %s, %d threads each", f"{len(waiting):,}", limit, where, threads)
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
                note_end(other, done, total, failed)
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
    command = [sys.executable, *job.arguments, "--output-dir", str(job.output_dir)]
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, preexec_fn=partial(die_with, os.getpid())
    )
    return Running(job, process, log, device, time.perf_counter())


def note_end(ended: Running, done: int, total: int, failed: dict[str, str]) -> None:
    """Log how a job ended, and add it to `failed` if it failed."""
    job, seconds = ended.job, time.perf_counter() - ended.started
    if ended.process.returncode == 0 and job.is_done:
        test = json.loads((job.output_dir / REPORT_FILE).read_text())["test"]
        keep_best(job)
        logger.info("%s/%s %s: test MCC %.2f, %.0f s", f"{done:,}", f"{total:,}", job.name, 100 * test["mcc"], seconds)
        return
    lines = (job.output_dir / LOG_FILE).read_text(errors="replace").strip().splitlines()
    reason = lines[-1] if lines else "nothing in its log"
    failed[job.name] = f"exit status {ended.process.returncode}: {reason} ({job.output_dir / LOG_FILE})"
    logger.error("%s/%s %s: failed, %s", f"{done:,}", f"{total:,}", job.name, failed[job.name])


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
