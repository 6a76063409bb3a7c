"""`dnazen doctor` tells what is right from what is not."""

import pytest
import torch

from dnazen.cli import doctor
from dnazen.cli.main import main


def test_operators_are_compared_with_the_reference(capsys):
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in output.splitlines())
    assert lines["torch"].strip() == torch.__version__
    assert lines["flash-attn-4"] and "Python" in lines["system"]
    assert "not flash_attention_4: " in output and lines["attention"].endswith("which agrees with eager attention")
    for name in ("matching", "masking", "fusion"):
        assert lines[name] == "kernels, which agree with the reference"


@pytest.mark.parametrize("name", ["matching", "masking", "fusion"])
def test_disagreement_is_said_and_the_exit_status_tells(monkeypatch, capsys, name):
    operator = getattr(doctor, f"_{name}")

    def wrong(device, impl):
        first, *rest = operator(device, impl)
        return [first + (impl == "triton"), *rest]

    monkeypatch.setattr(doctor, f"_{name}", wrong)
    assert main(["doctor"]) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(name))
    assert "DO NOT agree" in line and line.endswith("not in order")
