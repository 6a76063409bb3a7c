"""The G-grams of a model, kept with it from folder to folder."""

import os
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from dnazen.files import read_json, write_json
from dnazen.ngram.vocab import NGRAM_FILE

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class KeptNgrams:
    """`from_pretrained` and `save_pretrained` that take `ngram.json` along; stands before `PreTrainedModel`.

    Without it nobody could use a saved copy, for the ids of its G-grams would mean nothing. `ngram_json` is the content
    of the file (`NgramVocabulary.to_dict`), None for a model without.
    """

    ngram_json: dict[str, Any] | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As in Hugging Face; `ngram.json` may be absent."""
        result = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)  # type: ignore[misc]
        model = result[0] if isinstance(result, tuple) else result
        if pretrained_model_name_or_path is not None:
            options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
            options["_raise_exceptions_for_missing_entries"] = False
            path = cached_file(pretrained_model_name_or_path, NGRAM_FILE, **options)
            model.ngram_json = None if path is None else read_json(path, "a G-gram vocabulary")
        return result

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As in Hugging Face, and `ngram.json`."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)  # type: ignore[misc]
        if is_main_process:
            self._save_ngrams(save_directory)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's last step of `push_to_hub=True`, before `save_pretrained` returns."""
        self._save_ngrams(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]

    def _save_ngrams(self, directory: str | os.PathLike) -> None:
        if self.ngram_json is not None:
            write_json(Path(directory) / NGRAM_FILE, self.ngram_json)
