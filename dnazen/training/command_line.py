"""Command lines made of dataclasses, whose help names each argument `--like-this`."""

import argparse

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


def make_parser(dataclass: type, usage: str) -> HfArgumentParser:
    """A parser of a dataclass, without `--help`; it takes no abbreviations, for what it does not know is another's."""
    return HfArgumentParser(dataclass, usage=usage, add_help=False, allow_abbrev=False, formatter_class=_KebabFormatter)


def format_help(parser: HfArgumentParser, title: str, names: set[str]) -> str:
    """The help of a parser's arguments with these names, under a title."""
    formatter = _KebabFormatter(parser.prog, max_help_position=36, width=120)
    formatter.start_section(title)
    # the `--no_...` beside each switch that is on
    shown = (action for action in parser._actions if not action.option_strings[0].startswith("--no_"))
    formatter.add_arguments(action for action in shown if action.dest in names)
    formatter.end_section()
    return formatter.format_help()
