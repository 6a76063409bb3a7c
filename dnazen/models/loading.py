"""Strict loading: weights that are missing, unexpected or misshaped are errors, and what may be absent is reported."""

import logging
import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dnazen.files import InputError

logger = logging.getLogger(__name__)

# Parts of the published models: patterns of parameter names without the prefix "bert.".
NGRAM_PART = ("ngram_embeddings.*", "encoder.ngram_layers.*")
POOLER = ("pooler.*",)
CLASSIFIER = ("classifier.*",)
MLM_HEAD = ("cls.predictions.*",)


class StrictLoading:
    """`from_pretrained` that lets no difference between file and model pass unsaid; stands before `PreTrainedModel`.

    Hugging Face initialises missing weights and drops unexpected ones with a warning. Here only whole parts may be
    absent from a file (`new_parts`; they start random) or be left unused (`unused_parts`); both are logged. What the
    configuration beside the file says is there may not be absent.
    """

    new_parts: tuple[tuple[str, ...], ...] = (NGRAM_PART,)  # DNABERT-2 has no G-grams
    unused_parts: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a folder or a model of the Hugging Face hub; see `PreTrainedModel.from_pretrained` for the arguments.

        Published folders load as they are, safetensors or `pytorch_model.bin`; code in them is never run. Fields of
        the configuration may be given by name, for example `ngram_vocab_size` for DNABERT-2.

        Args:
            ignore_mismatched_sizes: initialise misshaped weights anew, and say so, instead of raising.

        Raises:
            InputError: weights are missing, unexpected or misshaped (all are named), a file is damaged or cut short,
                or the decoder's weights are not those of the word embeddings though the configuration ties them.
        """
        source = pretrained_model_name_or_path
        transformers_logger = logging.getLogger("transformers.modeling_utils")
        transformers_logger.addFilter(_is_no_load_report)  # said below, in a line
        try:
            model, info = super().from_pretrained(  # type: ignore[misc]
                source, *model_args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
            )
        except Exception as error:
            _raise_for_damaged_file(source, error)
            raise
        finally:
            transformers_logger.removeFilter(_is_no_load_report)
        cls._check_weights(model, source, info, ignore_mismatched_sizes)
        return (model, info) if output_loading_info else model

    @classmethod
    def _check_weights(cls, model: Any, source: Any, info: dict[str, Any], ignore_mismatched_sizes: bool) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
        misshaped = {
            name: f"{name} (expected {list(expected)}, found {list(found)})"
            for name, found, expected in info["mismatched_keys"]
        }
        described = getattr(model.config, "_in_file", {})
        new: set[str] = set()
        for part in cls.new_parts:
            if _is_described(part, described):
                continue
            members = {name for name in parameters if _belongs(name, part)}
            if members <= missing:
                new |= members
        unused = {name for name in unexpected if any(_belongs(name, part) for part in cls.unused_parts)}

        problems = {"missing": missing - new, "unexpected": unexpected - unused}
        if not ignore_mismatched_sizes:
            problems["misshaped"] = set(misshaped.values())
        if found := "; ".join(f"{problem}: {', '.join(sorted(names))}" for problem, names in problems.items() if names):
            raise InputError(f"{source}: expected the weights of {cls.__name__}, found {found}")
        for name, tied_to in (model._tied_weights_keys or {}).items():
            if model.config.tie_word_embeddings and parameters[name] is not parameters[tied_to]:
                raise InputError(f"{source}: expected {name} to equal {tied_to} (tie_word_embeddings), found others")

        # under ZeRO-3 a parameter's own size is that of this process's share
        sizes = {name: getattr(parameter, "ds_numel", parameter.numel()) for name, parameter in parameters.items()}
        for names, reason in ((new, "not in its weights"), (misshaped.keys(), "misshaped in its weights")):
            if names:
                logger.warning(
                    "%s: newly initialised, because %s: %d tensors, %s parameters (%s)",
                    source, reason, len(names), f"{sum(sizes[name] for name in names):,}", _group(names),
                )  # fmt: skip
        if unused:
            logger.warning("%s: not used: %d tensors of its weights (%s)", source, len(unused), _group(unused))


def _belongs(name: str, part: Iterable[str]) -> bool:
    return any(fnmatchcase(name.removeprefix("bert."), pattern) for pattern in part)


def _is_described(part: tuple[str, ...], configuration: dict[str, Any]) -> bool:
    """Whether a file beside this configuration must have the part, so that its absence is damage."""
    if part == NGRAM_PART:
        return "ngram_vocab_size" in configuration
    architectures = configuration.get("architectures") or ()
    return CLASSIFIER[0] in part and any("Classification" in name for name in architectures)


def _group(names: Iterable[str]) -> str:
    """Patterns of parts that cover `names`; a name of no part stands for itself."""
    patterns = NGRAM_PART + POOLER + CLASSIFIER + MLM_HEAD
    return ", ".join(sorted({next((p for p in patterns if _belongs(name, (p,))), name) for name in names}))


def _is_no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def _raise_for_damaged_file(source: Any, error: Exception) -> None:
    """Raise an InputError that names the file if `error` came from one that cannot be read."""
    if source is None or not Path(source).is_dir():
        return
    for path in sorted([*Path(source).glob("*.safetensors"), *Path(source).glob("pytorch_model*.bin")]):
        try:
            if path.suffix == ".bin":
                torch.load(path, map_location="meta", weights_only=True)
            else:
                with safe_open(path, framework="pt"):
                    pass
        except Exception as problem:  # pickle, zip and safetensors each raise their own
            reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
            raise InputError(f"{path}: expected weights, found a damaged file or one cut short ({reason})") from error
