"""`dnazen doctor` tells what is right from what is not."""

import functools

import pytest
import torch

from dnazen.cli import machine
from dnazen.cli.main import main

OPERATORS = {name: functools.cache(getattr(machine, f"_{name}")) for name in ("matching", "masking", "fusion")}


@pytest.fixture(autouse=True)
def remember_results(monkeypatch):
    """Each operator runs once by each implementation, in whichever test asks first: they are interpreted here."""
    for name, operator in OPERATORS.items():
        monkeypatch.setattr(machine, f"_{name}", operator)


@pytest.mark.slow
def test_operators_are_compared_with_the_reference(capsys):
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in output.splitlines())
    assert lines["torch"].strip() == torch.__version__
    assert lines["flash-attn-4"] and "Python" in lines["system"]
    assert "not flash_attention_4: " in output and lines["attention"].endswith("which agrees with eager attention")
    assert output.splitlines()[-1].startswith("in short") and "ready to" in output.splitlines()[-1]
    for name in OPERATORS:
        assert lines[name] == "kernels, which agree with the reference"


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_disagreement_is_said_and_the_exit_status_tells(monkeypatch, capsys, name):

    def wrong(device, impl):
        first, *rest = OPERATORS[name](device, impl)
        return [first + (impl == "triton"), *rest]

    monkeypatch.setattr(machine, f"_{name}", wrong)
    assert main(["doctor"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith(name))
    assert "DO NOT agree" in line and line.endswith("not in order")
    assert last.startswith("in short") and "not ready" in last and last.endswith(f"({name})")
