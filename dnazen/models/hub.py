"""Where a model lies, on disk or on the Hugging Face hub, and the vocabularies beside it."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerFast

from dnazen.data.tokenizer import load_tokenizer
from dnazen.files import InputError, read_json
from dnazen.ngram.vocab import NGRAM_FILE, NgramVocabulary

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # the first that a folder has are read
# beside them: configuration and G-grams, and the tokenizers of other encoders
_OTHER_FILES = ("*.json", "*.txt", "*.model")


def fetch_model(name: str) -> Path:
    """The folder of a model: `name` itself, or where the Hugging Face hub's model of that name was downloaded to.

    Raises:
        InputError: there is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"{name}: expected a folder, or a model's name on the Hugging Face hub (owner/name)")
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*_OTHER_FILES, WEIGHTS[0]]))
        if not list(folder.glob(WEIGHTS[0])):
            folder = Path(snapshot_download(name, allow_patterns=[*_OTHER_FILES, WEIGHTS[1]]))
    except Exception as error:  # of the network, of the hub, of the name
        reason = str(error).splitlines()[0]
        raise InputError(f"{name}: no such folder, and the Hugging Face hub gave no such model: {reason}") from error
    return folder


def load_vocabularies(folder: Path) -> tuple[PreTrainedTokenizerFast, NgramVocabulary | None]:
    """The tokenizer and the G-grams (None: it has none) of a model's folder, both of which its embeddings must hold.

    Raises:
        InputError: a file is missing or does not fit the others.
    """
    tokenizer = load_tokenizer(folder)
    config = read_json(folder / "config.json", "a model's configuration")
    vocabulary = NgramVocabulary.from_pretrained(folder, tokenizer) if (folder / NGRAM_FILE).is_file() else None
    sizes = {"vocab_size": len(tokenizer), **({"ngram_vocab_size": vocabulary.vocab_size} if vocabulary else {})}
    for field, size in sizes.items():
        if config.get(field, 0) < size:
            raise InputError(f"{folder}/config.json: {field}: expected at least {size}, found {config.get(field)}")
    # 1 is the padding's embedding alone: a model made from DNABERT-2
    if vocabulary is None and config.get("ngram_vocab_size", 1) > 1:
        raise InputError(f"{folder}: expected {NGRAM_FILE}, because config.json has G-grams, found none")
    return tokenizer, vocabulary
