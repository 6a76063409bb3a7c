"""BPE tokenizers over A, C, G, T: train one, load one, tell two apart."""

import hashlib
import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from dnazen import __version__
from dnazen.data.fasta import FastaBlock, cut_runs, describe_sources, read_fasta
from dnazen.dna import BASES, is_clean
from dnazen.files import InputError, atomic_directory, read_json, write_json

logger = logging.getLogger(__name__)

# Five token ids are packed into one 63-bit key, so 12 bits for each.
MAX_VOCAB_SIZE = 4096
# Ids 0..4 as in DNABERT-2's tokenizer.
SPECIAL_TOKENS = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "cls", "sep", "pad", "mask")}
# BPE sees the text as words; 2,040 bases are what 510 tokens take up, and one word of a corpus.
_WORD_BASES = 2040
# Training holds about 60 bytes a base: 2 GB for this many.
_MAX_TRAINING_BASES = 2**25
_BASES_PER_VOCABULARY_TOKEN = 5_000
# As DNABERT-2's longest: otherwise tandem repeats double into tokens of hundreds of bases.
_MAX_TOKEN_BASES = 32

TOKENIZER_FILE, SOURCES_FILE = "tokenizer.json", "sources.json"


def choose_vocab_size(num_bases: int) -> int:
    """A size of vocabulary for a text of so many bases: the power of two nearest to a token for each 5,000 of them.

    From 256 to 4,096. A token of a short text must still be seen often enough (there, some thousand times) for a model,
    or for G-grams, to learn what stands beside it.
    """
    sizes = [2**exponent for exponent in range(8, 13)]
    return min(sizes, key=lambda size: abs(math.log(size * _BASES_PER_VOCABULARY_TOKEN / max(num_bases, 1))))


def build_tokenizer(
    fasta_paths: Sequence[str | PathLike], output_dir: str | PathLike, vocab_size: int | None = None
) -> PreTrainedTokenizerFast:
    """Train a tokenizer on FASTA files and write its folder, with a record of the files in `sources.json`.

    Raises:
        InputError: `output_dir` has something in it; a file is absent, given twice or not FASTA; see `train_tokenizer`.
    """
    with atomic_directory(output_dir) as directory:
        sources = describe_sources(fasta_paths)
        tokenizer = train_tokenizer(_read_sequences(fasta_paths), vocab_size)
        save_tokenizer(tokenizer, directory)
        write_json(directory / SOURCES_FILE, {"dnazen_version": __version__, "sources": sources})
    return tokenizer


def train_tokenizer(sequences: Iterable[str], vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """Train a BPE tokenizer like DNABERT-2's (Zhou et al. 2024, section 3.1) on the runs of A, C, G, T.

    Of more than 33 million bases an evenly spaced sample is taken. The same sequences always give the same tokenizer.
    A short text may give fewer than `vocab_size` tokens (default: `choose_vocab_size`); that is logged. The tokenizer
    reads lower-case bases as upper-case ones, and U as T.

    Raises:
        InputError: `vocab_size` is below 9 (five special tokens, four bases) or above 4096; there is no sequence.
    """
    smallest = len(SPECIAL_TOKENS) + len(BASES)
    if vocab_size is not None and not smallest <= vocab_size <= MAX_VOCAB_SIZE:
        raise InputError(
            f"vocab_size: expected {smallest} (special tokens and bases) to {MAX_VOCAB_SIZE} (five must fit one 63-bit "
            f"key), found {vocab_size}"
        )
    words, num_bases = _sample_words(sequences)
    if not words:
        raise InputError("no A, C, G or T in the sequences to train the tokenizer on")
    if vocab_size is None:
        vocab_size = choose_vocab_size(num_bases)
    backend = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS["unk_token"]))
    backend.normalizer = _to_upper_case()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=list(BASES),
        max_token_length=_MAX_TOKEN_BASES,
        show_progress=sys.stdout.isatty(),  # elsewhere it prints empty lines
    )
    backend.train_from_iterator(words, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    if (found := backend.get_vocab_size()) < vocab_size:
        logger.warning("found %d tokens of the %d asked for: no other pair occurs twice", found, vocab_size)
    return _wrap(backend, SPECIAL_TOKENS)


def load_tokenizer(path: str | PathLike) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a folder with `tokenizer.json`, or from that file; never from the network.

    One without a normalizer, such as DNABERT-2's, gets that of `train_tokenizer`: soft-masked (lower-case) bases are
    bases, and U is T. The tokens of A, C, G and T stay the same, and so does the checksum.

    Raises:
        InputError: there is no such file, it is no tokenizer, it tokenizes at random (BPE dropout), or it lacks one of
            the tokens unk, cls, sep, pad and mask.
    """
    path = Path(path)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file}: no such file; expected a tokenizer (tokenizer.json, or a folder with it)")
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises a bare Exception
        raise InputError(f"{file}: expected a tokenizer.json of the tokenizers library; {error}") from error
    if getattr(backend.model, "dropout", None):
        raise InputError(f"{file}: expected a tokenizer without BPE dropout, found {backend.model.dropout}")
    if backend.normalizer is None:
        backend.normalizer = _to_upper_case()
    config_file = file.with_name("tokenizer_config.json")
    config = read_json(config_file, "a tokenizer's configuration") if config_file.exists() else {}
    special_tokens = {}
    for role, default in SPECIAL_TOKENS.items():
        token = config.get(role) or default
        special_tokens[role] = token["content"] if isinstance(token, dict) else token
    missing = [f"{role} ({token})" for role, token in special_tokens.items() if backend.token_to_id(token) is None]
    if missing:
        raise InputError(f"{file}: a tokenizer with no {', '.join(missing)}")
    return _wrap(backend, special_tokens)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: str | PathLike) -> None:
    """Write the tokenizer's files into a folder; OSError when the disk is full."""
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:  # tokenizers raises a bare Exception
        raise OSError(f"cannot write the tokenizer: {error}") from error


def tokenizer_checksum(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of the tokenizer's model (vocabulary and merges) as canonical JSON: the same however it was saved.

    Nothing else counts, a normalizer neither: what it makes of lower case does not change the tokens of A, C, G and T.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()


def tokens_by_id(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of each token by its id; empty for an id that no token has."""
    vocabulary = tokenizer.get_vocab()
    id_to_token = [""] * (max(vocabulary.values()) + 1)
    for token, token_id in vocabulary.items():
        id_to_token[token_id] = token
    return id_to_token


def _read_sequences(paths: Sequence[str | PathLike]) -> Iterator[str]:
    with tqdm(desc="reading", disable=None, unit=" bases", unit_scale=True) as progress:
        for path in paths:
            for record in read_fasta(path):
                yield record.sequence
                progress.update(len(record.sequence))


def _wrap(backend: Tokenizer, special_tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    # A length limit kept in the file would cut sequences without a word.
    backend.no_truncation()
    backend.no_padding()
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=int(1e30), **special_tokens)


def _to_upper_case() -> normalizers.Normalizer:
    """The bases in upper case and U as T, letter for letter, so that offsets stay; other letters as they are."""
    upper = dict(zip(BASES.lower(), BASES)) | {"u": "T", "U": "T"}
    return normalizers.Sequence([normalizers.Replace(letter, base) for letter, base in upper.items()])


def _sample_words(sequences: Iterable[str]) -> tuple[list[str], int]:
    """Words of the runs of A, C, G and T, every k-th of them, and the number of bases in all runs.

    k is the smallest power of 2 that keeps the words within the limit.
    """
    words: list[str] = []
    stride, num_bases = 1, 0
    # one byte for each letter, whatever it is
    blocks = (FastaBlock("", 0, sequence.encode("ascii", "replace")) for sequence in sequences)
    runs = (block.sequence.decode() for block in cut_runs(blocks, _WORD_BASES))
    for ordinal, word in enumerate(filter(is_clean, runs)):
        num_bases += len(word)
        if ordinal % stride == 0:
            words.append(word)
        if len(words) * _WORD_BASES > _MAX_TRAINING_BASES:
            words = words[::2]
            stride *= 2
    return words, num_bases
