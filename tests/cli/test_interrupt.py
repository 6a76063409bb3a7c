"""Ctrl-C in real processes, as a terminal sends it: to all of a group."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dnazen.data.tokenizer import train_tokenizer
from tests.helpers.forked import heed_interrupts
from tests.helpers.launch import SCRIPT, environment

COMMAND = [sys.executable, "-m", "dnazen.cli.main"]


def interrupt(line, is_time, cwd, **options):
    """Start `line`, send SIGINT to its group when `is_time(process)`; exit status and all output."""
    process = subprocess.Popen(
        [str(word) for word in line], cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True, preexec_fn=heed_interrupts, **options,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not is_time(process):
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output = process.stdout.read().decode()
    process.wait(240)
    return process.returncode, output


def imports_torch(process):
    return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()


def check(status, output):
    assert status == 130, output
    assert output.count("dnazen: interrupted") == 1 and output.endswith("dnazen: interrupted\n")
    assert "Traceback" not in output and "KeyboardInterrupt" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [[*COMMAND, "doctor"], [sys.executable, SCRIPT], [sys.executable, SCRIPT.with_name("finetune.py")]],
    ids=["command", "pretrain", "finetune"],
)
def test_while_torch_is_imported(line, tmp_path):
    check(*interrupt(line, imports_torch, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_corpus_that_waits_for_its_input_leaves_nothing(workers, tmp_path):
    train_tokenizer(["ACGT" * 100, "TTGACA" * 50], vocab_size=20).save_pretrained(tmp_path / "tokenizer")
    words = ["corpus", "--fasta", "-", "--tokenizer", "tokenizer", "--output-dir", "out", "--num-workers", workers]

    records = b"".join(b">record_%d\n%s\n" % (number, b"ACGTTGCA" * 4000) for number in range(50))

    def is_reading(process):
        if not fed:
            fed.append(threading.Thread(target=process.stdin.write, args=(records,), daemon=True))
            fed[0].start()
        return not fed[0].is_alive() and list(tmp_path.glob(".out.*"))

    fed = []
    status, output = interrupt([*COMMAND, *words], is_reading, tmp_path, stdin=subprocess.PIPE)
    check(status, output)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


@pytest.mark.slow
def test_training(prepared, tmp_path):
    line = [sys.executable, SCRIPT, "--output_dir", tmp_path / "out", "--max_steps", "100000"]
    arguments = {name: value for name, value in prepared.arguments().items() if name != "max_steps"}
    line += [word for name, value in arguments.items() for word in (f"--{name}", value)]
    check(*interrupt(line, lambda process: list(tmp_path.glob("out/checkpoint-*")), tmp_path))
