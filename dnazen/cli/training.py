"""`dnazen pretrain` and `dnazen finetune`: the scripts that `deepspeed` starts, from any folder."""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

import dnazen
from dnazen.cli.shared import require_one_process
from dnazen.environment import stand_alone

_PRETRAIN = """\
examples:
  dnazen pretrain                                        train `tiny` on the packaged E. coli genome
  dnazen pretrain --fasta my_genome.fa.gz                prepare a genome of yours, and train on it
  dnazen pretrain --corpus DIR --ngrams DIR --model base --output-dir DIR
DeepSpeed is configured by --deepspeed: zero1, zero2 (the default), zero3, or a JSON file."""
_FINETUNE = """\
example:
  dnazen finetune --model my/model/final --data my_data --output-dir my/promoters
--data is a folder with train.csv, dev.csv and perhaps test.csv, columns `sequence` and `label`."""
_LAUNCHER = """
On several machines: deepspeed --hostfile FILE {script} ..."""


def add_command(commands: argparse._SubParsersAction) -> None:
    for name, text, epilog, words in (
        ("pretrain", "pretrain a model on genomes", _PRETRAIN, ["--deepspeed", "zero2"]),
        ("finetune", "fine-tune a model on labelled sequences", _FINETUNE, []),
    ):
        script = Path(dnazen.__file__).with_name(f"{name}.py")
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text}; all flags but these go to the training: --help-all lists them",
            epilog=epilog + _LAUNCHER.format(script=script),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # the training has flags that begin alike
        )
        command.set_defaults(run=start, script=str(script), words=words, takes_flags=True)
        command.add_argument("--num-gpus", type=int, metavar="N", help="GPUs to train on (all of this machine)")
        command.add_argument("--help-all", action="store_true", help="list the flags of the training, and exit")


def start(script: str, words: list[str], num_gpus: int | None, help_all: bool, flags: list[str]) -> NoReturn:
    """Become the script, or the launcher of several of it: exit status and signals are theirs."""
    command = [sys.executable, script]
    if help_all:
        os.execv(sys.executable, [*command, "--help-all"])
    require_one_process(Path(script).stem)
    import torch

    num_gpus = torch.cuda.device_count() if num_gpus is None else num_gpus
    if num_gpus > 1:
        command[1:1] = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(num_gpus)]
    else:  # needs no launcher
        stand_alone()
    # what stands later on a command line wins
    os.execv(sys.executable, [*command, *words, *flags])
