"""The command line of `dnazen/pretrain.py`: what is refused at once, and the data that is prepared before the run.

PyTorch and the models take seconds to import, so each step imports what it needs and the cheapest check comes first.
"""

import sys
from argparse import Namespace
from pathlib import Path

from dnazen.pretraining.arguments import DataArguments
from dnazen.sizes import RECIPES
from dnazen.training.command_line import HELP_ALL, asks_for_help, describe_flags, make_parser
from dnazen.training.script import parse_arguments, run_script

_USAGE = "deepspeed dnazen/pretrain.py --deepspeed ds_configs/zero2.json [arguments]"
_DESCRIPTION = """
Pretrain DNAZEN. With no argument of ours: `tiny`, on the packaged E. coli 536 genome, prepared on the way.
"""


def main() -> int:
    """Run `dnazen/pretrain.py`'s command line; see `run_script`."""
    return run_script(lambda: _run(sys.argv[1:]))


def _run(words: list[str]) -> None:
    if asks_for_help(words):
        print(_help(everything=HELP_ALL in words))
        return
    data_args, rest = parse_arguments(make_parser(DataArguments, _USAGE), words, return_remaining_strings=True)
    values = _parse_training(rest)

    from dnazen.models import DNAZenConfig
    from dnazen.pretraining.prepare import PACKAGED_GENOME, genome_name, prepare_data
    from dnazen.pretraining.run import pretrain
    from dnazen.pretraining.training_arguments import PretrainingArguments

    if data_args.init_from is None:
        DNAZenConfig.from_size(data_args.model)
    if data_args.corpus is None:
        fasta = data_args.fasta or [str(PACKAGED_GENOME)]
        name = genome_name(fasta)
        corpus_dir, ngrams_dir = prepare_data(fasta, Path(data_args.work_dir) / name)
        data_args.corpus, data_args.ngrams = str(corpus_dir), str(ngrams_dir)
    else:
        name = Path(data_args.corpus).resolve().name
    if values.learning_rate is None:
        values.learning_rate = RECIPES.get(data_args.model, RECIPES["base"]).learning_rate
    if values.output_dir is None:
        values.output_dir = str(Path(data_args.work_dir) / name / data_args.model_name)
    # they join the process group, which would time out while the data is prepared
    pretrain(data_args, PretrainingArguments(**vars(values)))


def _parse_training(words: list[str]) -> Namespace:
    """What the command line says of training; None for a learning rate that depends on the model's size."""
    from dnazen.pretraining.training_arguments import PretrainingArguments

    parser = make_parser(PretrainingArguments, _USAGE)
    parser.set_defaults(learning_rate=None)
    values = parser.parse_args(words)
    PretrainingArguments.refuse(values)
    return values


def _help(everything: bool) -> str:
    from dnazen.pretraining.training_arguments import REFUSED, USUAL, PretrainingArguments

    title = "model, data and masking"
    return describe_flags(
        _USAGE, _DESCRIPTION, title, DataArguments, PretrainingArguments, USUAL, REFUSED.keys(), everything
    )
