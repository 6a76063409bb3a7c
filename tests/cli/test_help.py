"""Help comes at once, and says what the functions do."""

import argparse
import inspect
import subprocess
import sys

import pytest

from dnazen.cli import ngrams
from dnazen.cli.main import main, parse_arguments
from dnazen.ngram.extract import extract_ngrams

COMMANDS = [
    "plan",
    "tokenizer", "corpus", "ngrams", "ngrams extract", "ngrams count", "ngrams merge", "ngrams stats", "ngrams motifs",
    "pretrain", "finetune", "evaluate", "predict", "embed", "explain", "variants", "export", "gue", "bench", "doctor",
]  # fmt: skip
PROGRAM = """\
import sys
from dnazen.cli.main import main
for words in ["--help", *sys.argv[1:]]:
    try:
        main([*words.split(), "--help"])
    except SystemExit as end:
        assert end.code == 0
heavy = {"torch", "transformers", "numpy", "deepspeed", "triton", "matplotlib", "tokenizers"} & sys.modules.keys()
assert not heavy, heavy
"""


def help_of(capsys, *words):
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_imports_nothing_heavy():
    result = subprocess.run([sys.executable, "-c", PROGRAM, *COMMANDS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("usage: dnazen") == len(COMMANDS) + 1


def test_all_commands_are_listed(capsys):
    text = help_of(capsys)
    assert all(f"\n    {name.split()[0]}" in text for name in COMMANDS)
    text = help_of(capsys, "ngrams")
    assert all(f"\n    {name}" in text for name in ("extract", "count", "merge", "stats", "motifs"))


def test_arguments_are_in_kebab_and_explained(monkeypatch):
    """Every argument of every command."""
    seen = []
    add_argument = argparse.ArgumentParser.add_argument

    def watch(self, *names, **options):
        seen.append((self.prog, names, options.get("help")))
        return add_argument(self, *names, **options)

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", watch)
    parse_arguments(["doctor"])
    assert {prog.removeprefix("dnazen ") for prog, names, _ in seen} >= set(COMMANDS)
    for prog, names, text in seen:
        assert (text or names == ("--version",)) and "_" not in "".join(names), (prog, names, text)


def test_defaults_of_extraction_are_the_functions_own():
    options = {name: default for name, default, *_ in (*ngrams._THRESHOLDS, ngrams._MIN_COUNT, *ngrams._RESOURCES)}
    parameters = inspect.signature(extract_ngrams).parameters
    assert options == {name: parameter.default for name, parameter in parameters.items() if name in options}
    assert parameters.keys() - options.keys() == {"shards", "vocab_size"}


@pytest.mark.parametrize("words", [["embed", "--fast"], ["ngrams", "merge", "--min-pmi", "2"], ["ngrams"], []])
def test_unknown_and_missing_arguments_are_refused(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and "dnazen" in capsys.readouterr().err


def test_plain_ngrams_is_extract():
    words = ["--corpus", "c", "--output-dir", "o", "--min-pmi", "1"]
    assert parse_arguments(["ngrams", *words]) == parse_arguments(["ngrams", "extract", *words])


def test_messages_name_flags(tmp_path, capsys):
    (tmp_path / "a.fa").write_text(">a\nACGT\n")
    line = ["embed", "--model", "m", "--input", str(tmp_path / "a.fa"), "--output", str(tmp_path / "v.npy")]
    assert main([*line, "--window", "5", "--stride", "6"]) == 1
    assert "error: --window, --stride: expected 1 <= stride <= window" in capsys.readouterr().err


def test_paths_are_looked_at_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "a.fa").write_text(">a\nACGT\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    for words, message in (
        ("embed --model m --input absent.fa --output v.npy", "absent.fa: no such file or folder, given as --input"),
        ("embed --model m --input a.fa --output a.fa", "a.fa: already exists"),
        ("tokenizer --fasta a.fa absent --output-dir new", "absent: no such file or folder, given as --fasta"),
        ("tokenizer --fasta a.fa --output-dir taken", "taken: already exists"),
    ):
        code = (
            "import sys; from dnazen.cli.main import main; status = main(sys.argv[1:]); "
            "assert 'numpy' not in sys.modules; sys.exit(status)"
        )
        line = [sys.executable, "-c", code, *words.split()]
        result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
        assert (result.returncode, result.stderr.startswith(f"dnazen: error: {message}")) == (1, True), result.stderr
        assert result.stderr.count("\n") == 1
