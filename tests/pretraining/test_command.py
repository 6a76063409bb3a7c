"""The command line, and what a run says and writes down."""

import json
import re

import pytest

from dnazen.batches.collator import Masking, PackedCollator, PackedDataset
from dnazen.data.corpus import Corpus
from dnazen.models import DNAZenConfig, DNAZenForMaskedLM
from dnazen.ngram.vocab import load_ngrams
from dnazen.pretraining.command import main
from dnazen.pretraining.trainer import PretrainingTrainer
from dnazen.pretraining.training_arguments import REFUSED, PretrainingArguments
from dnazen.sizes import RECIPES
from dnazen.training.command_line import make_parser
from dnazen_kernels.ngram_masking import MASK_SHARE


@pytest.mark.parametrize("flag", ["--help", "--help-all"])
def test_help_has_ours_first_and_writes_flags_with_hyphens(monkeypatch, capsys, flag):
    monkeypatch.setattr("sys.argv", ["pretrain.py", flag])
    assert main() == 0
    shown = re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, flags=re.MULTILINE)
    assert shown[:5] == ["--fasta", "--corpus", "--ngrams", "--work-dir", "--model"]
    assert shown.index("--attn-implementation") < shown.index("--learning-rate")
    assert len(shown) == len(set(shown)) and not any("_" in name for name in shown)
    assert ("--adam-beta1" in shown) == (flag == "--help-all") and "--data-seed" not in shown


def test_both_spellings_are_the_same_argument():
    parser = make_parser(PretrainingArguments, "")
    for spelling in ("--learning-rate", "--learning_rate"):
        assert parser.parse_args([spelling, "0.25"]).learning_rate == 0.25


def test_the_papers_share_of_hidden_tokens():
    """Written out where the command line is read, which does without the operators."""
    assert RECIPES["base"].mask_share == MASK_SHARE


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_reports_that_need_a_package_say_which(prepared, refused, monkeypatch, name):
    monkeypatch.setattr(f"transformers.integrations.integration_utils.is_{name}_available", lambda: False)
    package = {"tensorboard": "tensorboardX"}.get(name, name)
    line = refused(**prepared.arguments(), report_to=name)
    assert line.endswith(f"--report-to {name} needs a package that is not installed: pip install {package}")


@pytest.mark.slow
def test_a_start_takes_five_lines_and_no_progress_bar(finished_run):
    output = (finished_run / "output.txt").read_text()
    first_words = [line.split()[0] for line in output.splitlines()[:6]]
    assert first_words == ["DNAZEN", "attention", "data:", "training:", "output:", "{'loss':"]
    assert "it/s" not in output and "bits per base" in output


@pytest.mark.slow
def test_what_has_no_effect_is_not_recorded(finished_run):
    record = json.loads((finished_run / "run.json").read_text())
    assert not REFUSED.keys() & record["training"].keys()
    assert record["training"]["max_steps"] == 4 and record["training"]["learning_rate"] == 5e-4


def test_the_trainer_leaves_its_callers_arguments_as_they_are(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # TrainingArguments set it
    corpus = Corpus.open(prepared.corpus)
    vocabulary = load_ngrams(prepared.ngrams, corpus)
    dataset = PackedDataset(corpus.train, PackedCollator(corpus.tokenizer, vocabulary, Masking(0.15, True, 42)))
    sizes = {"vocab_size": len(corpus.tokenizer), "ngram_vocab_size": vocabulary.vocab_size}
    args = PretrainingArguments(output_dir=str(tmp_path), bf16=False, num_train_epochs=1)
    before = args.to_dict()
    trainer = PretrainingTrainer(
        model=DNAZenForMaskedLM(DNAZenConfig.from_size(prepared.model, impl="reference", **sizes)),
        args=args,
        processing_class=corpus.tokenizer,
        train_dataset=dataset,
        eval_dataset=dataset,
        vocabulary=vocabulary,
        max_batch_tokens=640,
        run_fingerprint={},
    )
    assert args.to_dict() == before and args.max_steps == -1
    assert trainer.args.max_steps == trainer.sampler.end_of_epoch(0) > 40
