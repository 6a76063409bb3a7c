"""The evaluation of a trained model on what its corpus holds out, or on genomes it was not trained on."""

import tempfile
from pathlib import Path

from dnazen.data.corpus import Corpus, build_corpus
from dnazen.data.tokenizer import tokenizer_checksum
from dnazen.defaults import PRECISION
from dnazen.evaluation.held_out import Evaluation, evaluate_split, evaluation_record
from dnazen.files import InputError, atomic_directory, write_json
from dnazen.inference.loading import load_for_inference
from dnazen.models import DNAZenForMaskedLM


def evaluate(
    model: str,
    corpus: str,
    output_dir: str | Path,
    fasta: list[str] | None = None,
    precision: str = PRECISION,
    attn_implementation: str | None = None,
) -> tuple[Evaluation, str]:
    """Evaluate a trained model on what its corpus holds out, or on other genomes; write `evaluation.json`.

    Args:
        model: a folder, or a name on the Hugging Face hub.
        corpus: what it was trained on; its training split is what the baselines count.
        output_dir: a new folder.
        fasta: genomes to evaluate on instead of the corpus' held-out split; cut and tokenized as the corpus was.
        precision, attn_implementation: as in `load_for_inference`.

    Returns:
        The evaluation, and what it is of.

    Raises:
        InputError: model and corpus do not belong together, or a file cannot be used.
    """
    opened = Corpus.open(corpus)
    loaded = load_for_inference(model, DNAZenForMaskedLM, precision, attn_implementation)
    if tokenizer_checksum(loaded.tokenizer) != tokenizer_checksum(opened.tokenizer):
        raise InputError(f"{corpus}: expected a corpus made with the tokenizer of {model}, found another")
    with atomic_directory(output_dir) as directory, tempfile.TemporaryDirectory() as scratch:
        split, text = opened.validation, f"the held-out part of {corpus}"
        if fasta:
            options = {name: opened.manifest["parameters"][name] for name in ("max_tokens", "min_length")}
            # held out or not makes no difference here; half and half, because neither part may be empty
            build_corpus(fasta, loaded.tokenizer, Path(scratch) / "corpus", validation_fraction=0.5, **options)
            split, text = Corpus.open(Path(scratch) / "corpus", verify=False).everything(), ", ".join(fasta)
        evaluation = evaluate_split("model", loaded.model, loaded.tokenizer, loaded.vocabulary, opened.train, split)
        write_json(directory / "evaluation.json", evaluation_record(evaluation, text))
    return evaluation, text
