"""Files that are either whole or absent, and the error that names what is wrong with one."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import psutil

logger = logging.getLogger(__name__)


class InputError(ValueError):
    """Something the user handed in cannot be used; the message names it, what was expected and what was found."""


class Interrupted(InputError):
    """Work was stopped on the way by what can be mended; what is finished counts when it is started again."""


def sha256_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as JSON under a temporary name, then rename it to `path`."""
    temporary = Path(f"{path}.tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1)  # whole, the text of a large manifest would take more memory than itself
        file.write("\n")
    os.replace(temporary, path)


def read_json(path: str | os.PathLike, what: str) -> dict[str, Any]:
    """Read a JSON object; `what` names its role in errors.

    Raises:
        InputError: the file is absent, is not JSON, or is not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected {what}")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: expected {what} as JSON, found something else ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected {what} as a JSON object, found {type(value).__name__}")
    return value


def require_new_directory(path: Path) -> None:
    """InputError if `path` already exists and is not an empty directory."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: already exists; choose another directory or remove this one")


def require_new_file(path: Path) -> None:
    """InputError if `path` already exists."""
    if path.exists():
        raise InputError(f"{path}: already exists; choose another name or remove it")


@contextlib.contextmanager
def atomic_directory(
    path: str | os.PathLike, is_resumable: Callable[[Path], bool] = lambda leftover: False
) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; rename it to `path` when the block ends without an error.

    Of what killed processes of this machine left of earlier tries, the first that `is_resumable` is yielded as it is,
    and others are removed, each with a warning. A directory that is resumable outlives Ctrl-C, `Interrupted` and
    errors of the disk too, such as that it is full; any other error removes it.

    Raises:
        InputError: `path` already exists and is not an empty directory; nothing in it is touched.
    """
    path = Path(path)
    require_new_directory(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, leftovers = _temporary_beside(path)
    resumed = next(filter(is_resumable, leftovers), None)
    for leftover in leftovers:
        if leftover != resumed:
            logger.warning("removing %s: the process that wrote it was killed", leftover)
            shutil.rmtree(leftover)
    if resumed:
        logger.warning("going on with %s: the process that wrote it was stopped", resumed)
        os.replace(resumed, temporary)
    temporary.mkdir(exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, Interrupted, OSError)) and is_resumable(temporary):
            logger.warning("keeping %s, to go on with when the same is started again", temporary)
        else:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, may_exist: bool = False) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename that file to `path` when the block ends without an error.

    What killed processes of this machine left of earlier tries is removed, with a warning.

    Raises:
        InputError: `path` already exists and may not; it is not touched.
    """
    path = Path(path)
    if not may_exist:
        require_new_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, leftovers = _temporary_beside(path)
    for leftover in leftovers:
        logger.warning("removing %s: the process that wrote it was killed", leftover)
        leftover.unlink()
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def publish_folder(temporary: Path, final: Path) -> None:
    """Rename `temporary` to `final`; what stood at `final` goes away only once it is replaced."""
    old = final.parent / f".{final.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(temporary, final)
    shutil.rmtree(old, ignore_errors=True)


def lock_run(output_dir: Path) -> IO[str]:
    """Claim a run's folder until the returned file is closed or the process ends.

    Raises:
        InputError: another process holds it.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    file = open(output_dir / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"{output_dir}: another run is writing there; wait for its end, or use another --output-dir"
        ) from error
    return file


def _temporary_beside(path: Path) -> tuple[Path, list[Path]]:
    """This process's temporary name for `path`, and those that killed processes of this machine have left."""
    # the host's name, because other machines may share the disk and have processes of the same number
    host = socket.gethostname()
    leftovers = []
    for leftover in sorted(path.parent.glob(".*.tmp")):
        match = re.fullmatch(rf"\.{re.escape(path.name)}\.(\d+)@(.+)\.tmp", leftover.name)
        if match and match[2] != host:
            logger.warning("%s: of a process on %s, which may be running: not touched", leftover, match[2])
        elif match and (int(match[1]) == os.getpid() or not psutil.pid_exists(int(match[1]))):
            leftovers.append(leftover)
    return path.parent / f".{path.name}.{os.getpid()}@{host}.tmp", leftovers
