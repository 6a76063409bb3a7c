"""`dnazen variants`."""

import argparse
from typing import Any

from dnazen import defaults
from dnazen.cli.shared import add_attention, add_max_batch_tokens, add_model, add_precision, new_command


def add_command(commands: argparse._SubParsersAction) -> None:
    text = "score the variants of a VCF file with a pretrained model, as INFO fields"
    command = new_command(commands, "variants", text, run)
    add_model(command)
    command.add_argument("--vcf", required=True, metavar="FILE", help="the variants: VCF, plain or compressed")
    text = "the reference genome: FASTA, plain or compressed"
    command.add_argument("--fasta", required=True, metavar="FILE", help=text)
    text = "new file to write; its name ends in .vcf or .vcf.gz"
    command.add_argument("--output", required=True, metavar="FILE", help=text)
    text = "bases of the reference to read on either side of a variant (%(default)s)"
    command.add_argument("--flank", type=int, default=defaults.FLANK_BASES, metavar="BASES", help=text)
    add_max_batch_tokens(command, defaults.MAX_VARIANT_TOKENS)
    add_precision(command, default=defaults.PRECISION)
    add_attention(command)


def run(**parameters: Any) -> None:
    from dnazen.inference.variants import variants

    counts = variants(**parameters)
    print(f"records     {counts['records']:,} with {counts['alleles']:,} alternative alleles")
    print(f"ambiguous   {counts['ambiguous']:,} records have a base where the reference has another code, such as R")
    print(f"scored      {counts['scored']:,} alleles")
    reasons = {"unspelled": "not in A, C, G, T", "unchanged": "equal to REF", "long": "too long"}
    print(f"not scored  {'; '.join(f'{counts[name]:,} {reason}' for name, reason in reasons.items())}")
