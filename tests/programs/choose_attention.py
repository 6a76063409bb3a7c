"""Choose attention in each process of a group; the first argument is the rank on which `sdpa` gives wrong results."""

import json
import os
import sys

from transformers import TrainingArguments

from dnazen.files import InputError
from dnazen.layers.attention import BACKENDS
from dnazen.models import DNAZenConfig, DNAZenModel
from dnazen.training.attention import agree_on_attention
from dnazen.training.script import exit_process, leave_process_group


def main(broken_rank: int, output_dir: str) -> None:
    if int(os.environ["RANK"]) == broken_rank:
        eager = BACKENDS["eager"]
        BACKENDS["sdpa"] = lambda *args: lambda query, key, value: eager(*args)(query * 1.1, key, value)
    args = TrainingArguments(output_dir=output_dir, use_cpu=True)
    model = DNAZenModel(DNAZenConfig(
        vocab_size=50, ngram_vocab_size=20, hidden_size=24, num_attention_heads=3, intermediate_size=40,
        num_hidden_layers=1, num_hidden_ngram_layers=1,
    ))  # fmt: skip
    try:
        chosen, error = agree_on_attention(model, args).name, None
    except InputError as raised:
        chosen, error = None, str(raised)
    found = {"chosen": chosen, "runs": model.config._attn_implementation, "error": error}
    with open(f"{output_dir}/{args.process_index}.json", "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
    leave_process_group()
    exit_process(0)
