"""A job: one training of one model on one data set with one seed."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import dnazen
from dnazen.files import InputError, read_json, sha256_file
from dnazen.finetuning.data import REPORT_FILE, find_splits
from dnazen.gue import kmer
from dnazen.gue.models import Model
from dnazen.gue.protocol import PROTOCOLS, SEQUENCES_PER_STEP

JOB_FILE = "job.json"
_SCRIPT = Path(dnazen.__file__).parent / "finetune.py"


class Job(NamedTuple):
    """One training."""

    model: Model
    dataset: str
    seed: int
    output_dir: Path
    arguments: list[str]  # of its command, as they stand in the record of finished jobs
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


def make_job(
    model: Model, dataset: str, folder: Path, seed: int, output_dir: Path, num_rows: int, learning_rate: float,
    epochs: float | None, max_steps: int | None, options: list[str],
) -> Job:  # fmt: skip
    """A job and its command; it is evaluated, and warmed up, at least once in a tenth of its steps.

    Args:
        model: the baseline, or a model to fine-tune.
        dataset: its name.
        folder: its splits.
        seed: of the training.
        output_dir: of the whole run.
        num_rows: of the data set's training split.
        learning_rate: falls to 0 over the training.
        epochs, max_steps: instead of the protocol's.
        options: further words of a fine-tuning's command.
    """
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
        "--disable_tqdm", "True", *options,
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


def keep_best(job: Job) -> None:
    """Of the models that one data set's seeds gave, keep the one that is best on dev: 84 of `base` take 100 GB."""
    folders = [path.parent for path in job.output_dir.parent.glob(f"seed-*/{REPORT_FILE}")]
    dev = {folder: json.loads((folder / REPORT_FILE).read_text())["dev"]["mcc"] for folder in folders}
    best = max(sorted(dev), key=dev.get)
    for folder in folders:
        if folder != best:
            shutil.rmtree(folder / "final", ignore_errors=True)
