"""GUE's data sets in a folder: which can be run, and what repeats and leaks they have."""

import logging
from collections.abc import Iterable
from pathlib import Path

from dnazen.files import InputError
from dnazen.finetuning.data import SPLITS, Overlap, count_overlaps, describe_overlap, find_splits, read_table
from dnazen.gue.paper import DATASETS

logger = logging.getLogger(__name__)


def choose_datasets(folder: Path, chosen: list[str] | None) -> tuple[dict[str, Path], dict[str, str]]:
    """The data sets under a folder that can be run, and why each other one cannot.

    Args:
        folder: with a folder for each data set, as published: `prom/prom_core_tata`, `mouse/2`, ...
        chosen: names, with or without the folder above; None for all.

    Raises:
        InputError: a name is unknown, or what it names cannot be run; nothing can be run.
    """
    # tf/0 and mouse/0 are no names without what is above
    short = {name.split("/")[1]: name for name in DATASETS if not name.startswith(("tf/", "mouse/"))}
    names = {**short, **{name: name for name in DATASETS}}
    if unknown := sorted(set(chosen or ()) - names.keys()):
        raise InputError(f"--tasks: expected data sets of GUE ({', '.join(DATASETS)}), found {', '.join(unknown)}")
    present, absent = {}, {}
    for name in DATASETS:
        try:
            splits = find_splits(folder / name)
        except InputError as error:
            absent[name] = f"unclear: {error}"
            continue
        missing = [split for split in SPLITS if split not in splits]
        if not missing:
            present[name] = folder / name
        else:
            absent[name] = "absent" if len(missing) == len(SPLITS) else f"without {' and '.join(missing)}"
    if chosen:
        wanted = list(dict.fromkeys(names[name] for name in chosen))
        if unusable := [f"{name} {absent[name]}" for name in wanted if name in absent]:
            expected = f"{', '.join(SPLITS)} of each data set of --tasks"
            raise InputError(f"{folder}: expected {expected}, found {'; '.join(unusable)}")
        present = {name: present[name] for name in wanted}
    if not present:
        raise InputError(f"{folder}: expected data sets of GUE (such as {DATASETS[-2]}/train.csv), found none")
    return present, absent


def count_all_overlaps(
    folder: Path, present: Iterable[str], absent: dict[str, str]
) -> tuple[dict[str, dict[str, Overlap]], dict[str, str]]:
    """Repeats and leaks of the data sets that are run, and of those that cannot be but are there in part.

    Returns:
        The counts, and what is wrong with the data sets that should be run and cannot be read.
    """
    overlaps, unreadable = {}, {}
    for dataset in (dataset for dataset in DATASETS if dataset in present or dataset in absent):
        try:
            tables = {split: read_table(path) for split, path in find_splits(folder / dataset).items()}
        except InputError as error:
            if dataset in present:
                unreadable[dataset] = str(error)
                logger.error("%s: failed, %s", dataset, error)
            else:
                logger.warning("%s: not counted: %s", dataset, error)
            continue
        if tables:
            overlaps[dataset] = count_overlaps(tables)
    return overlaps, unreadable


def describe_data(overlaps: dict[str, dict[str, Overlap]], absent: dict[str, str]) -> list[str]:
    """The data sets that have repeats or leaks, a line each, and those that were not run, a line for each reason."""
    lines = [
        f"{dataset}: " + "; ".join(describe_overlap(split, overlap) for split, overlap in splits.items())
        for dataset, splits in overlaps.items()
        if any(any(overlap[1:]) for overlap in splits.values())
    ]
    for reason in dict.fromkeys(absent.values()):
        names = [name for name, other in absent.items() if other == reason]
        lines.append(f"not run, because {reason}: {', '.join(names)}")
    return lines
