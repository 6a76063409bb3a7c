"""The many errors of libraries that read a damaged file, as one of ours."""

import contextlib
import pickle
from collections.abc import Iterator

from safetensors import SafetensorError

from dnazen.files import InputError

# what transformers, safetensors, torch and peft raise for files that are damaged or do not fit each other
_DAMAGE = (ValueError, KeyError, TypeError, RuntimeError, OSError, ImportError, SafetensorError, pickle.UnpicklingError)


@contextlib.contextmanager
def refuse_damage(message: str) -> Iterator[None]:
    """Raise InputError, `message` and the first line of the error, if a library fails to read its files."""
    try:
        yield
    except _DAMAGE as error:
        reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise InputError(f"{message}: {reason}") from error
