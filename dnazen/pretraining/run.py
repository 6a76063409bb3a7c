"""A pretraining run, from its arguments to its report."""

import dataclasses
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers import TrainerState, set_seed

from dnazen.data.corpus import Corpus
from dnazen.files import InputError, lock_run, publish_folder, write_json
from dnazen.models import DNAZenForMaskedLM
from dnazen.ngram.vocab import load_ngrams
from dnazen.pretraining.arguments import DataArguments
from dnazen.pretraining.build import build_config, build_datasets
from dnazen.pretraining.checkpoint import choose_checkpoint, copy_model
from dnazen.pretraining.initial_model import InitialModel
from dnazen.pretraining.record import build_fingerprint, run_record
from dnazen.pretraining.report import describe, report
from dnazen.pretraining.start import start_from_data
from dnazen.pretraining.trainer import PretrainingTrainer
from dnazen.pretraining.training_arguments import PretrainingArguments
from dnazen.training.attention import agree_on_attention
from dnazen.training.script import quieten
from dnazen_kernels._runtime import resolve_impl


def pretrain(data_args: DataArguments, args: PretrainingArguments) -> None:
    """Train, evaluate, save and report, going on from the newest whole checkpoint in `args.output_dir` if there is one.

    Raises:
        InputError: corpus, G-grams, model or checkpoint cannot be used together.
        FloatingPointError: the gradient is no longer finite.
    """
    main_process = args.process_index == 0
    quieten(main_process)
    set_seed(args.seed)
    corpus = Corpus.open(data_args.corpus, verify=main_process)
    vocabulary = load_ngrams(data_args.ngrams, corpus)
    if data_args.max_ngrams is not None:
        vocabulary = dataclasses.replace(vocabulary, max_ngrams=data_args.max_ngrams)
    train_dataset, eval_dataset, masking = build_datasets(data_args, args.seed, corpus, vocabulary)
    initial = InitialModel.open(data_args.init_from, corpus) if data_args.init_from else None
    config = build_config(data_args, corpus, vocabulary, initial)
    try:
        resolve_impl(config.impl, args.device)
    except RuntimeError as error:
        raise InputError(str(error)) from error

    output_dir = Path(args.output_dir)
    _lock = lock_run(output_dir) if main_process else None  # held until this function returns
    resume = None if args.resume_from_checkpoint in ("True", "true", "last", "latest") else args.resume_from_checkpoint
    (checkpoint,) = broadcast_object_list([choose_checkpoint(output_dir, resume) if main_process else None])
    model = DNAZenForMaskedLM(config)
    if data_args.start == "data" and checkpoint is None:
        start_from_data(model, corpus, vocabulary, args.seed)
    if initial is not None and checkpoint is None:
        started = initial.load_weights(model, vocabulary, args.deepspeed and args.hf_deepspeed_config)
        if main_process:
            print(started, flush=True)
    trainer = PretrainingTrainer(
        model=model,
        args=args,
        processing_class=corpus.tokenizer,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        vocabulary=vocabulary,
        max_batch_tokens=data_args.max_batch_tokens,
        residual_learning_rate=data_args.residual_learning_rate,
        checkpoint=checkpoint,
        run_fingerprint=build_fingerprint(data_args, args, corpus, vocabulary, masking, config, initial),
    )
    attention = agree_on_attention(trainer.model, args)
    is_finished = checkpoint is not None and checkpoint.manifest["step"] >= trainer.args.max_steps
    if main_process:
        if not is_finished:
            write_json(output_dir / "run.json", run_record(data_args, trainer))
        print(describe(data_args, corpus, vocabulary, masking, trainer, checkpoint, attention), flush=True)
    if is_finished:
        trainer.state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))
        last = checkpoint.path
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        last = output_dir / f"checkpoint-{trainer.state.global_step}"
    step = trainer.state.global_step
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] == step]
    if not evaluated:
        raise InputError(
            f"{last} is not before --max-steps {trainer.args.max_steps} and was not evaluated; train further"
        )
    if main_process:
        copy_model(last, output_dir / ".final.tmp")
        publish_folder(output_dir / ".final.tmp", output_dir / "final")
        print("\n" + report(trainer, corpus, vocabulary, data_args.model_name))
        print(f"model: {output_dir / 'final'}\nnewest checkpoint: {last}\nloss curve: {output_dir / 'loss_curve.png'}")
