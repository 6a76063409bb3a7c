"""The DeepSpeed configurations that are installed with the package."""

import re
from importlib.resources import files
from typing import Any

from dnazen.files import InputError

_PACKAGE = "dnazen_ds_configs"  # the folder `ds_configs` of the sources


def find_configuration(name: Any) -> Any:
    """What `--deepspeed` is given: a bare name, such as `zero2`, becomes the path of that configuration; else `name`.

    Raises:
        InputError: no configuration has that name.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        return name  # a path, JSON, or nothing
    known = {entry.name.removesuffix(".json"): entry for entry in files(_PACKAGE).iterdir() if ".json" in entry.name}
    if name not in known:
        raise InputError(f"--deepspeed: expected a JSON file, or {', '.join(sorted(known))}, found {name}")
    return str(known[name])
