"""Datasets and model configuration of a pretraining run, from its arguments and data."""

from dnazen.batches.collator import Masking, PackedCollator, PackedDataset, calibrate_mlm_probability
from dnazen.data.corpus import Corpus
from dnazen.evaluation.held_out import HELD_OUT_MASKING
from dnazen.models import DNAZenConfig
from dnazen.ngram.vocab import NgramVocabulary
from dnazen.pretraining.arguments import DataArguments
from dnazen.pretraining.initial_model import InitialModel


def build_datasets(
    data_args: DataArguments, seed: int, corpus: Corpus, vocabulary: NgramVocabulary
) -> tuple[PackedDataset, PackedDataset, Masking]:
    """Training and held-out split, packed and masked, and the masking that training uses."""
    shares = data_args.mask_share, (1 - data_args.mask_share) / 2
    end = data_args.mlm_probability_end
    masking = Masking(data_args.mlm_probability, data_args.whole_ngram_masking, seed, *shares, end)
    collator = PackedCollator(corpus.tokenizer, vocabulary, masking, data_args.use_ngrams)
    train_dataset = PackedDataset(corpus.train, collator)
    if data_args.mask_target == "effective":
        # at both ends: the masked share is nearly linear in what is drawn, so that between them it is right too
        drawn = calibrate_mlm_probability(train_dataset, masking.mlm_probability)
        drawn_end = end and calibrate_mlm_probability(train_dataset, end)
        collator.masking = masking = masking._replace(mlm_probability=drawn, mlm_probability_end=drawn_end)
    held_out = PackedCollator(corpus.tokenizer, vocabulary, HELD_OUT_MASKING, data_args.use_ngrams)
    return train_dataset, PackedDataset(corpus.validation, held_out), masking


def build_config(
    data_args: DataArguments, corpus: Corpus, vocabulary: NgramVocabulary, initial: InitialModel | None
) -> DNAZenConfig:
    """The model's configuration, with sizes and ids that come from the data."""
    tokenizer = corpus.tokenizer
    from_data = {
        "ngram_vocab_size": vocabulary.vocab_size,
        "max_ngram_count": vocabulary.max_ngrams,
        "use_ngrams": data_args.use_ngrams,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep", "mask", "unk")},
    }
    if initial is None:
        config = DNAZenConfig.from_size(data_args.model, vocab_size=len(tokenizer), **from_data)
    else:
        config = DNAZenConfig.from_pretrained(initial.folder, **from_data)
    config.impl = data_args.impl
    if data_args.attn_implementation is not None:
        config._attn_implementation = data_args.attn_implementation
    return config
