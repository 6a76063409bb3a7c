"""`dnazen doctor`."""

import argparse

from dnazen.cli.shared import new_command


def add_command(commands: argparse._SubParsersAction) -> None:
    text = "say what this machine can do, and check that it computes correctly"
    new_command(commands, "doctor", text, run)


def run() -> int:
    from dnazen.cli.machine import conclude, examine

    faults = []
    for name, found, good in examine():
        print(f"{name:14}{found}" + ("" if good else "   <-- not in order"), flush=True)
        faults += [] if good else [name]
    print(f"{'in short':14}{conclude(faults)}")
    return 1 if faults else 0
