"""A run of GUE, from its arguments to its report."""

import logging
from os import PathLike
from pathlib import Path

from dnazen.defaults import GUE_LEARNING_RATE, GUE_SEEDS, PRECISIONS
from dnazen.files import InputError, lock_run
from dnazen.gue.datasets import choose_datasets, count_all_overlaps, describe_data
from dnazen.gue.jobs import is_finished, make_job
from dnazen.gue.models import list_models
from dnazen.gue.protocol import SEQUENCES_PER_STEP
from dnazen.gue.report import write_report
from dnazen.gue.schedule import run_jobs

logger = logging.getLogger(__name__)


def run_gue(
    data: str | PathLike, models: list[str], output_dir: str | PathLike, seeds: int = GUE_SEEDS,
    tasks: list[str] | None = None, no_ngrams: bool = False, learning_rate: float = GUE_LEARNING_RATE,
    epochs: float | None = None, max_steps: int | None = None, jobs_per_device: int | None = None,
    precision: str | None = None, attn_implementation: str | None = None,
) -> tuple[str, bool]:  # fmt: skip
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
        precision: "bf16" or "fp32", of all jobs but the baseline's; default: bf16 on a GPU, fp32 on a CPU.
        attn_implementation: attention by name, of the same jobs; default: the best that runs.

    Returns:
        The report, as it stands in `report.md`, and whether every job finished.

    Raises:
        InputError: models, numbers or precision cannot be used, or none of the data; a finished job in `output_dir` had
            other settings.
    """
    numbers = {"seeds": seeds, "learning-rate": learning_rate, "epochs": epochs, "max-steps": max_steps}
    for name, value in {**numbers, "jobs-per-device": jobs_per_device}.items():
        if value is not None and value <= 0:
            raise InputError(f"--{name}: expected a number above 0, found {value}")
    options = []
    if precision is not None:
        if precision not in PRECISIONS:
            raise InputError(f"--precision: expected {' or '.join(PRECISIONS)}, found {precision}")
        options += ["--bf16", str(precision == "bf16")]
    if attn_implementation is not None:
        options += ["--attn_implementation", attn_implementation]
    output_dir = Path(output_dir)
    present, absent = choose_datasets(Path(data), tasks)
    overlaps, unreadable = count_all_overlaps(Path(data), present, absent)
    present = {dataset: folder for dataset, folder in present.items() if dataset in overlaps}
    for line in describe_data(overlaps, absent):
        logger.info(line)
    rows = list_models(models, no_ngrams)
    jobs = [
        make_job(
            model,
            dataset,
            folder,
            seed,
            output_dir,
            overlaps[dataset]["train"].rows,
            learning_rate,
            epochs,
            max_steps,
            options,
        )  # fmt: skip
        for dataset, folder in present.items()
        for model in rows
        for seed in range(seeds if model.folder else 1)
    ]
    _lock = lock_run(output_dir)  # held until this function returns
    waiting = [job for job in jobs if not is_finished(job)]
    if len(waiting) < len(jobs):
        logger.info("%s of %s jobs were finished before", f"{len(jobs) - len(waiting):,}", f"{len(jobs):,}")
    failed = {**unreadable, **run_jobs(waiting, len(jobs), jobs_per_device)}
    finished = [job for job in jobs if job.is_done]
    results = [
        {"model": job.model.label, "dataset": job.dataset, "seed": job.seed, "folder": job.output_dir}
        for job in finished
    ]
    length = f"{max_steps:,} steps" if max_steps else f"{epochs:g} epochs" if epochs else "DNABERT-2's protocol"
    settings = {"training": length, "sequences a step": SEQUENCES_PER_STEP, "learning rate": learning_rate}
    text = write_report(output_dir, [model.label for model in rows], results, failed, absent, overlaps, settings)
    return text, not failed
