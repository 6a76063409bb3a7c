"""`dnazen export`."""

import argparse

from dnazen.cli.shared import add_output_dir, new_command


def add_command(commands: argparse._SubParsersAction) -> None:
    text = "write a trained model in the form of the published ones, for programs made for those"
    command = new_command(commands, "export", text, run)
    text = "folder of the model: `final/` or `checkpoint-N/` of a run"
    command.add_argument("--model", required=True, metavar="DIR", help=text)
    add_output_dir(command)


def run(model: str, output_dir: str) -> None:
    from dnazen.models.export import export_model

    print(f"parameters  {export_model(model, output_dir):,}, in fp32, under their published names")
