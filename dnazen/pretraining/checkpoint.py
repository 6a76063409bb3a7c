"""Checkpoints that are either whole or absent, and the choice of the one to resume from.

A checkpoint folder is written under a temporary name and renamed when it is complete. Its `checkpoint.json` holds the
size and SHA-256 of every other file, the position in the data, and what the run must agree with to go on.
"""

import logging
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from torch.serialization import get_unsafe_globals_in_checkpoint

from dnazen.files import InputError, publish_folder, read_json, sha256_file, write_json

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
FORMAT = 1
FINGERPRINT_KEY = "agreement"  # of the run's fingerprint in checkpoint.json and run.json, since format 1
# DeepSpeed unpickles its files whole; beyond what `weights_only=True` admits, they name these classes and no others
ALLOWED_GLOBALS = {
    "numpy.ndarray", "numpy.dtype", "numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum", "deepspeed.utils.tensor_fragment.fragment_address",
}  # fmt: skip


def checkpoint_step(path: Path) -> int:
    """Training step in a checkpoint's name, -1 if it is no checkpoint's name."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match.group(1)) if match else -1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and checkpoint_step(path) >= 0]
    return sorted(folders, key=checkpoint_step, reverse=True)


def seal_checkpoint(temporary: Path, final: Path, state: dict[str, Any]) -> None:
    """Write `checkpoint.json` (`state` and all files' checksums) into `temporary` and rename it to `final`."""
    files = {
        str(path.relative_to(temporary)): [path.stat().st_size, sha256_file(path)]
        for path in sorted(temporary.rglob("*"))
        if path.is_file()
    }
    write_json(temporary / MANIFEST, {**state, "files": files})
    publish_folder(temporary, final)


def rotate_checkpoints(output_dir: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; the newest always stays."""
    if limit is not None and limit > 0:
        for path in list_checkpoints(output_dir)[limit:]:
            shutil.rmtree(path)


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Read `checkpoint.json`, compare every file with it, and see that reading none of them would run code.

    Raises:
        InputError: a file is missing, cut short, altered, or would call what no checkpoint calls; the message names it.
    """
    manifest = read_json(path / MANIFEST, "the list of a checkpoint's files, written last")
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path / MANIFEST}: expected format {FORMAT}, found {manifest.get('format')!r}")
    for name, (size, checksum) in manifest["files"].items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            raise InputError(f"{file}: expected {size} bytes, found {'no file' if found is None else f'{found} bytes'}")
        if sha256_file(file) != checksum:
            raise InputError(f"{file}: its contents are not those that were saved (SHA-256 differs)")
    for file in (*path.rglob("*.pt"), *path.rglob("*.pth")):
        if surplus := sorted(set(get_unsafe_globals_in_checkpoint(file)) - ALLOWED_GLOBALS):
            raise InputError(f"{file}: reading it would call {', '.join(surplus)}, which no checkpoint of a run does")
    return manifest


class Checkpoint(NamedTuple):
    """A whole checkpoint and its `checkpoint.json`."""

    path: Path
    manifest: dict[str, Any]


def choose_checkpoint(output_dir: Path, resume: str | None) -> Checkpoint | None:
    """The checkpoint to go on from, if there is one; what a killed run left half-written goes, and it says so.

    Args:
        output_dir: the run's folder.
        resume: a checkpoint's path, or None for the newest whole one in `output_dir`. Newer ones that are not whole
            are kept as `checkpoint-N.broken`.

    Raises:
        InputError: the named checkpoint is not whole or not the newest, or there are checkpoints and none is whole.
    """
    for unfinished in (*output_dir.glob(".checkpoint-*.tmp"), *output_dir.glob(".final.tmp")):
        logger.warning(f"removing {unfinished}: its writing was cut off")
        shutil.rmtree(unfinished)
    checkpoints = list_checkpoints(output_dir)
    if resume is not None:
        checkpoint = Checkpoint(Path(resume), verify_checkpoint(Path(resume)))
        newer = [path.name for path in checkpoints if checkpoint_step(path) > checkpoint.manifest["step"]]
        if newer:
            raise InputError(
                f"{output_dir} holds newer checkpoints than {resume} ({', '.join(newer)}), which the run would mix "
                "with its own; move them away, or use another --output-dir"
            )
        return checkpoint
    problems: dict[Path, str] = {}
    for path in checkpoints:
        try:
            checkpoint = Checkpoint(path, verify_checkpoint(path))
            break
        except InputError as error:
            problems[path] = str(error)
    else:
        if problems:
            raise InputError(f"{output_dir}: none of its checkpoints is whole: " + "; ".join(problems.values()))
        return None
    for path, problem in problems.items():
        publish_folder(path, path.with_name(f"{path.name}.broken"))
        logger.warning(f"passing over a checkpoint that is not whole, now {path.name}.broken: {problem}")
    return checkpoint


def copy_model(checkpoint: Path, target: Path) -> None:
    """Copy what `from_pretrained` reads out of a checkpoint."""
    target.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.suffix in (".json", ".safetensors") and path.name not in (MANIFEST, "trainer_state.json"):
            shutil.copy2(path, target)


def list_differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """What a checkpoint and a run do not have in common, a phrase each."""
    return [
        f"{name}: the checkpoint has {saved.get(name)!r}, this run {current.get(name)!r}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]


def check_fingerprint(checkpoint: Checkpoint, run_fingerprint: dict[str, Any]) -> None:
    """Refuse to resume a run whose data, masking, model or optimizer differ from the checkpoint's.

    Raises:
        InputError: names every difference.
    """
    if differences := list_differences(checkpoint.manifest[FINGERPRINT_KEY], run_fingerprint):
        raise InputError(
            f"{checkpoint.path} belongs to another run ({'; '.join(differences)}); "
            "use the same arguments, or another --output-dir"
        )
