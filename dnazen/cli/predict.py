"""`dnazen predict`."""

import argparse
from typing import Any

from dnazen.cli.shared import add_attention, add_output_dir, add_precision, new_command


def add_command(commands: argparse._SubParsersAction) -> None:
    command = new_command(commands, "predict", "apply a fine-tuned model to sequences", run)
    text = "folder of the fine-tuned model: `final/` of a run of `dnazen finetune`"
    command.add_argument("--model", required=True, metavar="DIR", help=text)
    text = "CSV (its name ends in .csv) with columns as in training, `label` or not; else FASTA; plain or compressed"
    command.add_argument("--data", required=True, metavar="FILE", help=text)
    add_precision(command, "of the computation (as in training)")
    add_attention(command)
    add_output_dir(command)


def run(output_dir: str, **parameters: Any) -> None:
    from dnazen.finetuning.predict import predict

    num_rows, metrics = predict(output_dir=output_dir, **parameters)
    print(f"rows        {num_rows:,}")
    for name, value in metrics.items():
        print(f"{name:12}{value:.4f}")
