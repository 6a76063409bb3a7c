"""The models that are compared: the rows of the report."""

from pathlib import Path
from typing import NamedTuple

from dnazen.files import InputError, read_json
from dnazen.finetuning.loading import checksum_weights
from dnazen.gue import kmer
from dnazen.models.hub import fetch_model

# names of folders that tell nothing of the model within; what is above does
_FINAL, _UNTELLING = "final", ("model",)


class Model(NamedTuple):
    """A row of the report."""

    label: str
    job_folder: str  # the folder where its jobs lie
    folder: Path | None  # None: the k-mer baseline
    use_ngrams: bool
    checksum: str


def list_models(names: list[str], no_ngrams: bool) -> list[Model]:
    """The report's rows, each with a label of its own.

    It is the end of the model's path, without `final`: as many of the last folders as tell the models apart, and one
    more for each that is only called `model`.

    Args:
        names: folders, names on the hub, or `kmer-lr`.
        no_ngrams: list each model that was pretrained with G-grams a second time, with its G-grams hidden.

    Raises:
        InputError: there is no such model, it is given twice, or two have names that cannot be told apart.
    """
    folders = {name: None if name == kmer.NAME else fetch_model(name).resolve() for name in names}
    if len(set(folders.values())) < len(names):
        raise InputError(f"--model: expected different models, found {', '.join(names)}")
    # the hub's models lie in folders that are named after commits
    named = {name: folder if Path(name).is_dir() else Path(name) for name, folder in folders.items() if folder}
    parts = {name: [part for part in path.parts if part != _FINAL] for name, path in named.items()}
    depth = 1
    while len({tuple(path[-depth:]) for path in parts.values()}) < len(parts):
        if depth > max(map(len, parts.values())):
            raise InputError(f"--model: expected models that differ beside `final`, found {', '.join(names)}")
        depth += 1
    models = []
    for name, folder in folders.items():
        if folder is None:
            models.append(Model(kmer.NAME, kmer.NAME, None, False, ""))
            continue
        label, checksum = _make_label(parts[name], depth), checksum_weights(folder)
        job_folder = "-".join(parts[name][-depth:]).replace(", ", "-").replace(" ", "-")
        models.append(Model(label, job_folder, folder, True, checksum))
        sees_ngrams = read_json(folder / "config.json", "a model's configuration").get("use_ngrams", True)
        if no_ngrams and sees_ngrams and (folder / "ngram.json").is_file():
            models.append(Model(f"{label}, no G-grams", f"{job_folder}-no-G-grams", folder, False, checksum))
    job_folders: dict[str, Model] = {}
    for model in models:
        if (other := job_folders.setdefault(model.job_folder, model)) is not model:
            found = f"{other.label} ({other.folder}) and {model.label} ({model.folder})"
            raise InputError(f"--model: expected a folder of jobs for each, found {model.job_folder} for {found}")
    return models


def _make_label(parts: list[str], depth: int) -> str:
    while depth < len(parts) and parts[-depth] in _UNTELLING:
        depth += 1
    return "/".join(part for part in parts[-depth:] if part != "/")
