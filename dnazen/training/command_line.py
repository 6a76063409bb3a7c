"""Command lines made of dataclasses, whose help names each argument `--like-this`."""

import argparse
from collections.abc import Collection, Sequence
from dataclasses import field
from typing import Any

from transformers import HfArgumentParser

HELP_ALL = "--help-all"
_VALUES = {"int": "N", "float": "X", "string_to_bool": "BOOL"}


class _KebabFormatter(argparse.HelpFormatter):
    """Shows each flag with hyphens alone (underscores are accepted too), and its default unless the text says it."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags = ", ".join(text for text in action.option_strings if "_" not in text)
        values = self._format_args(action, _VALUES.get(getattr(action.type, "__name__", ""), "TEXT"))
        return f"{flags} {values}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        is_said = action.default in (None, argparse.SUPPRESS) or "default" in text.lower()
        return text if is_said else f"{text} (default: %(default)s)".lstrip()


def described(value: object, text: str) -> Any:
    """The field of an argument with a default and a help text."""
    return field(default=value, metadata={"help": text})


def make_parser(dataclass: type, usage: str) -> HfArgumentParser:
    """A parser of a dataclass, without `--help`; it takes no abbreviations, for what it does not know is another's."""
    return HfArgumentParser(dataclass, usage=usage, add_help=False, allow_abbrev=False, formatter_class=_KebabFormatter)


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether a command line asks for help, of one length or the other."""
    return not {"-h", "--help", HELP_ALL}.isdisjoint(words)


def describe_flags(
    usage: str, text: str, title: str, ours: type, training: type, usual: set[str], refused: Collection[str],
    everything: bool,
) -> str:  # fmt: skip
    """The help of a script: our arguments under a title, then those of training.

    Args:
        ours, training: their dataclasses, the second one of Hugging Face's `TrainingArguments`.
        usual: arguments of training to show beside those whose default is ours.
        refused: those never to show.
        everything: show all others, too.
    """
    own = make_parser(ours, usage)
    names = set(training.__dataclass_fields__) if everything else {*training.__annotations__, *usual}
    parts = [own.format_usage(), text.strip() + "\n", _format_flags(own, title, set(ours.__dataclass_fields__))]
    parts.append(_format_flags(make_parser(training, usage), "training", names.difference(refused)))
    if not everything:
        parts.append(f"{HELP_ALL} shows the other arguments of Hugging Face's Trainer too.")
    return "\n".join(parts)


def _format_flags(parser: HfArgumentParser, title: str, names: set[str]) -> str:
    formatter = _KebabFormatter(parser.prog, max_help_position=36, width=120)
    formatter.start_section(title)
    # the `--no_...` beside each switch that is on
    shown = (action for action in parser._actions if not action.option_strings[0].startswith("--no_"))
    formatter.add_arguments(action for action in shown if action.dest in names)
    formatter.end_section()
    return formatter.format_help()
