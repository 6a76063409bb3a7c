"""`dnazen pretrain` and `dnazen finetune` of a package that pip installed, from an empty folder."""

import json
import os
import subprocess
import sys

import pytest

from dnazen.environment import free_port
from dnazen.files import InputError
from dnazen.training.configurations import find_configuration
from tests.finetuning.conftest import motif_row, write_splits
from tests.helpers.launch import environment

ZERO = ("zero1", "zero2", "zero3")


def test_bare_names_are_configurations_and_paths_stay(root):
    for name in ZERO:
        with open(find_configuration(name)) as file:
            assert json.load(file) == json.loads((root / "ds_configs" / f"{name}.json").read_text())
    for other in (None, "ds_configs/zero2.json", "./zero2", "zero2.json", '{"bf16": 1}', {"bf16": 1}):
        assert find_configuration(other) == other
    with pytest.raises(InputError, match="--deepspeed: expected a JSON file, or zero1, zero2, zero3, found zero9"):
        find_configuration("zero9")


@pytest.fixture(scope="module")
def installed(root, tmp_path_factory):
    """The folder that the package's wheel was installed into."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    source.mkdir()
    for name in ("dnazen", "kernels", "ds_configs", "setup.py", "pyproject.toml", "LICENSE"):
        subprocess.run(["cp", "-r", root / name, source], check=True)
    line = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*line, folder / "site", source], check=True)
    return folder / "site"


def run(installed, folder, *words):
    """The command, or another of the same environment, in an empty folder."""
    folder.mkdir()
    line = [sys.executable, installed / "bin" / "dnazen"] if words[0] != "deepspeed" else []
    variables = {**environment(), "PYTHONPATH": str(installed)}
    return subprocess.run(
        [str(word) for word in (*line, *words)], cwd=folder, env=variables, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip


def flags_of(arguments):
    return [word for name, value in arguments.items() for word in (f"--{name}", value)]


@pytest.mark.slow
@pytest.mark.parametrize("num_gpus", [1, 2])
def test_pretrain(installed, prepared, tmp_path, num_gpus):
    flags = flags_of({**prepared.arguments(), "max_steps": 2, "save_steps": 2, "eval_steps": 2})
    result = run(installed, tmp_path / "empty", "pretrain", *flags, "--num-gpus", num_gpus, "--output_dir", "out")
    assert result.returncode == 0, result.stdout[-4000:]
    assert f"{num_gpus} process(es)" in result.stdout and "DeepSpeed ZeRO-2" in result.stdout
    record = (tmp_path / "empty" / "out" / "run.json").read_text()
    assert str(installed / "dnazen_ds_configs" / "zero2.json") in record
    assert (tmp_path / "empty" / "out" / "final" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_script_by_its_path(installed, prepared, tmp_path):
    flags = flags_of({**prepared.arguments(), "max_steps": 2, "save_steps": 2, "eval_steps": 2})
    line = ["deepspeed", "--num_gpus", 1, "--master_port", free_port(), installed / "dnazen" / "pretrain.py"]
    result = run(installed, tmp_path / "empty", *line, "--deepspeed", "zero1", *flags, "--output_dir", "out")
    assert result.returncode == 0, result.stdout[-4000:]
    assert "DeepSpeed ZeRO-1" in result.stdout


@pytest.mark.slow
def test_finetune_forwards_its_exit_status(installed, tmp_path):
    write_splits(tmp_path / "data", motif_row)
    flags = ["--data", tmp_path / "data", "--model", tmp_path / "absent", "--output_dir", "out"]
    result = run(installed, tmp_path / "empty", "finetune", *flags)
    assert result.returncode == 1, result.stdout
    last = result.stdout.splitlines()[-1]
    assert last.startswith(f"dnazen: error: {tmp_path / 'absent'}: expected a folder, or a model's name")
    assert os.listdir(tmp_path / "empty") == []


@pytest.mark.slow
def test_flags_are_passed_on_as_they_are(tmp_path):
    """What is executed, seen from a process in which executing is refused."""
    code = (
        "import json, os, sys\n"
        "os.execv = lambda program, line: print(json.dumps([program, line]))\n"
        "from dnazen.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    words = "pretrain --fasta a.fa b.fa --num-gpus 1 --max_steps 3 --bf16 False --deepspeed own.json".split()
    output = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env=environment(), capture_output=True, text=True
    ).stdout
    program, line = json.loads(output.splitlines()[0])
    assert program == line[0] == sys.executable and line[1].endswith("dnazen/pretrain.py")
    flags = "--deepspeed zero2 --fasta a.fa b.fa --max_steps 3 --bf16 False --deepspeed own.json"
    assert " ".join(line[2:]) == flags
