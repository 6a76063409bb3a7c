"""Processes that would choose attention differently."""

import json

import pytest

from tests.helpers.launch import PROGRAMS, run_program


def _choose(broken_rank, folder) -> list[dict]:
    run_program(PROGRAMS / "choose_attention.py", 2, broken_rank, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_all_run_what_the_first_process_chose(tmp_path):
    """The second one alone would take sdpa."""
    assert _choose(0, tmp_path) == [{"chosen": "eager", "runs": "eager", "error": None}] * 2


@pytest.mark.slow
def test_a_process_that_cannot_run_it_is_named_by_all(tmp_path):
    """The second one alone would take eager; none waits for the other."""
    first, second = _choose(1, tmp_path)
    assert first == second and first["chosen"] is None
    assert first["error"].startswith("process 1: attn_implementation: sdpa cannot run here: it differs from eager")
