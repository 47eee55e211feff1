"""A Hugging Face directory's tokenizer, copied for the serving side.

What leaves is a directory that ensemble/artefacts/tokenizer_files.py reads. tokenizer.json is written anew where other
files name tokens that it lacks, for guides read that file alone, and where there is only sentencepiece's model.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_triton.builders.checkpoint.config.known_keys import TOKENIZER_KEYS, describe_unknown
from deepseek_triton.builders.checkpoint.files.hub_cache import Snapshot
from deepseek_triton.builders.checkpoint.files.missing import open_file, reason_missing
from deepseek_triton.builders.checkpoint.tensor_checks import read_json
from deepseek_triton.builders.checkpoint.tokenizer.sentencepiece_model import convert_sentencepiece
from deepseek_triton.builders.errors import CheckpointError
from deepseek_triton.ensemble.artefacts.tokenizer_files import (
    CONFIG,
    FILES,
    TEMPLATE,
    TEMPLATES,
    TOKENIZER,
    read_tokenizer_files,
)

SENTENCEPIECE = "tokenizer.model"
PROCESSOR_TEMPLATE = "chat_template.json"
# Tokenizers that no file here converts → what they are.
OTHERS = {
    "tekken.json": "Mistral's own format",
    "vocab.json": "a vocabulary without tokenizer.json",
    "vocab.txt": "a vocabulary without tokenizer.json",
    "tokenizer.tiktoken": "tiktoken's format",
    "qwen.tiktoken": "tiktoken's format",
}


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Write what is served of the tokenizer in `source` into `directory`.

    Raises:
        CheckpointError: there is none, or one that can't be converted.
        TokenizerLoadError: a file is damaged or at odds with another.
    """
    for name in FILES:
        if (source / name).exists() or (source / name).is_symlink():
            with open_file(source / name) as stream, (directory / name).open("wb") as copy:
                shutil.copyfileobj(stream, copy)
    if (source / TEMPLATES).is_dir():
        (directory / TEMPLATES).mkdir()
        for file in sorted((source / TEMPLATES).glob("*.jinja")):
            shutil.copyfile(file, directory / TEMPLATES / file.name)
    if not (directory / TOKENIZER).exists():
        if not (source / SENTENCEPIECE).is_file():
            raise CheckpointError(_reason_missing(source))
        convert_sentencepiece(source / SENTENCEPIECE, _config(source)).save(str(directory / TOKENIZER), pretty=False)
    files = read_tokenizer_files(directory)
    if files.has_more_tokens:
        files.backend.save(str(directory / TOKENIZER), pretty=False)


def unknown_tokenizer_keys(source: Path) -> tuple[str, ...]:
    """The warnings about keys of tokenizer_config.json that nothing here reads.

    Raises:
        UnsupportedError: a key with a value that is not supported.
    """
    config = _config(source)
    TOKENIZER_KEYS.refuse(config, CONFIG)
    tokens = [
        key for key in TOKENIZER_KEYS.unknown_keys(config) if not key.endswith(("_token", "_token_id", "_tokens"))
    ]
    notes = describe_unknown(CONFIG, tokens)
    if (source / PROCESSOR_TEMPLATE).is_file() and not has_template(source, config):
        notes += (f"warning: {PROCESSOR_TEMPLATE} is a processor's and isn't read: put its template into {TEMPLATE}",)
    return notes


def has_template(source: Path, config: Mapping[str, Any]) -> bool:
    """Whether a file that is read has a chat template."""
    return config.get("chat_template") is not None or (source / TEMPLATE).is_file() or (source / TEMPLATES).is_dir()


def _config(source: Path) -> dict[str, Any]:
    return read_json(source / CONFIG) if (source / CONFIG).is_file() else {}


def _reason_missing(source: Path) -> str:
    found = next(((name, what) for name, what in OTHERS.items() if (source / name).is_file()), None)
    how = "convert the tokenizer with transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…)"
    if found is None and Snapshot.of(source):
        return reason_missing(source / TOKENIZER)
    if found is None:
        return f"{source / TOKENIZER} does not exist; {how}"
    return f"{source / TOKENIZER} does not exist, only {found[0]} ({found[1]}); {how}"
