"""The files of a tokenizer in Hugging Face's layout, read together as transformers reads them.

A directory enters; the library's tokenizer, its special tokens' names and its chat templates' sources leave.
It knows nothing of templates' contents, requests or Triton.

| file | what is read |
|---|---|
| tokenizer.json | the tokenizer |
| tokenizer_config.json | special tokens, `added_tokens_decoder`, `add_bos_token`, `add_eos_token`, `chat_template` |
| special_tokens_map.json, added_tokens.json | the same of older files: where there is no `added_tokens_decoder` |
| chat_template.jinja, additional_chat_templates/NAME.jinja | templates; before those of tokenizer_config.json |
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from deepseek_triton.ensemble.text.errors import TokenizerLoadError, one_line

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
FILES = (TOKENIZER, CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, TEMPLATE)
DEFAULT_TEMPLATE, TOOL_TEMPLATE = "default", "tool_use"
# tokenizer_class, without Tokenizer or TokenizerFast → the special tokens that the class has where no file names them.
CLASS_DEFAULTS: dict[str, dict[str, str]] = {
    "Llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "CodeLlama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2": {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "GPT2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
}


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files of one tokenizer say.

    backend: the library's tokenizer, the tokens of every file added. special_tokens: name (`bos_token`, …, and the
        model's own, as `image_token`) → spelling.
    add_bos_token, add_eos_token: whether a text gets them; None: tokenizer.json decides. chat_templates: name → its
    source, and where that stands. has_more_tokens: other files name tokens that tokenizer.json doesn't have.
    """

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    add_bos_token: bool | None
    add_eos_token: bool | None
    chat_templates: dict[str, tuple[str, str]]
    has_more_tokens: bool = False


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """Read the tokenizer in `directory`.

    Raises:
        TokenizerLoadError: a file is missing, damaged or at odds with another; the message names it.
    """
    file = directory / TOKENIZER
    source = _text(file)
    try:
        backend = tokenizers.Tokenizer.from_str(source)
    except Exception as error:  # the library raises bare Exception for every defect of the file
        raise TokenizerLoadError(f"{file} is not a tokenizer: {one_line(error)}") from error
    config = _json(directory / CONFIG)
    special = {name: _token(CONFIG, name, config[name]) for name in SPECIAL_NAMES if name in config}
    special |= _model_specific(config)
    more = _more_specials(CONFIG, config)
    if config.get("added_tokens_decoder") is None:
        older = _json(directory / SPECIAL_TOKENS)
        special |= {name: _token(SPECIAL_TOKENS, name, older[name]) for name in SPECIAL_NAMES if name in older}
        more += _more_specials(SPECIAL_TOKENS, older)
    for name, spelling in _class_defaults(config).items():
        if name not in special and backend.token_to_id(spelling) is not None:
            special[name] = AddedToken(spelling, special=True)
    named = {name: token for name, token in special.items() if token is not None}
    spellings = {token.content for token in (*named.values(), *more)}
    num_before = len(backend.get_added_tokens_decoder()), backend.get_vocab_size()
    _add_tokens(backend, _added_tokens(directory, config, spellings))
    # A beginning or an end that is in no vocabulary is an error, which the user of these files reports.
    present = [token for name, token in named.items() if name not in SPECIAL_NAMES[:2] or _is_in(backend, token)]
    _add_special_tokens(backend, (*present, *more))
    return TokenizerFiles(
        backend,
        {name: token.content for name, token in named.items()},
        _flag(config, "add_bos_token"),
        _flag(config, "add_eos_token"),
        _chat_templates(directory, config),
        has_more_tokens=(len(backend.get_added_tokens_decoder()), backend.get_vocab_size()) != num_before,
    )


def _added_tokens(directory: Path, config: Mapping[str, Any], specials: set[str]) -> dict[int, tuple[AddedToken, str]]:
    """Id → a token that is added to the vocabulary, and the file that says so; in the order of the ids."""
    decoder = config.get("added_tokens_decoder")
    where, values = f"{CONFIG}: added_tokens_decoder", decoder
    if decoder is None:
        where, values = ADDED_TOKENS, _json(directory / ADDED_TOKENS)
        values = {index: _plain_token(spelling, spelling in specials) for spelling, index in values.items()}
    if not isinstance(values, dict):
        raise TokenizerLoadError(f"{where} must hold a JSON object")
    added = {}
    for key, value in values.items():
        if isinstance(key, bool) or not str(key).isdecimal():
            raise TokenizerLoadError(f"{where} has id {key!r}, must be a whole number")
        token = value if isinstance(value, AddedToken) else _token(where, str(key), value, is_special=False)
        if token is not None:
            added[int(key)] = (token, where)
    return dict(sorted(added.items()))


def _add_tokens(backend: tokenizers.Tokenizer, added: Mapping[int, tuple[AddedToken, str]]) -> None:
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    for index, (token, where) in added.items():
        if repr(token) in known:
            continue
        is_new = backend.token_to_id(token.content) is None
        backend.add_tokens([token])
        if is_new and (given := backend.token_to_id(token.content)) != index:
            raise TokenizerLoadError(f"{where} gives {token.content!r} id {index}, beside {TOKENIZER} it gets {given}")


def _add_special_tokens(backend: tokenizers.Tokenizer, tokens: Iterable[AddedToken]) -> None:
    """Make each one a token that no text is split inside of; one that isn't in the vocabulary gets the next id."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in tokens:
        if token.content not in known:
            token.special = True
            backend.add_tokens([token])


def _is_in(backend: tokenizers.Tokenizer, token: AddedToken) -> bool:
    return backend.token_to_id(token.content) is not None


def _more_specials(where: str, values: Mapping[str, Any]) -> list[AddedToken]:
    """The special tokens that have no name of their own."""
    tokens: list[AddedToken] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = values.get(key)
        entries = list(value.values()) if isinstance(value, dict) else value or []
        if not isinstance(entries, list):
            raise TokenizerLoadError(f"{where}: {key} must be a list, got {value!r:.60}")
        tokens += [token for entry in entries if (token := _token(where, key, entry)) is not None]
    return tokens


def _model_specific(config: Mapping[str, Any]) -> dict[str, AddedToken | None]:
    """Name → a special token that this model alone has: `image_token`, and what objects of tokens name."""
    named = {
        name: value
        for name, value in config.items()
        if name.endswith("_token") and name not in SPECIAL_NAMES and isinstance(value, str | dict)
    }
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        value = config.get(key)
        named |= value if isinstance(value, dict) else {}
    return {name: _token(CONFIG, name, value) for name, value in named.items()}


def _class_defaults(config: Mapping[str, Any]) -> dict[str, str]:
    name = config.get("tokenizer_class")
    family = name.removesuffix("Fast").removesuffix("Tokenizer") if isinstance(name, str) else ""
    return CLASS_DEFAULTS.get(family, {})


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    value, where = config.get("chat_template"), f"{CONFIG}: chat_template"
    if isinstance(value, list):
        entries = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        if len(entries) != len(value) or not all(isinstance(one, str) for pair in entries.items() for one in pair):
            raise TokenizerLoadError(f"{where} must be a list of templates, each with a name of its own")
        templates = {str(name): (str(source), f"{where} {name!r}") for name, source in entries.items()}
    elif value is None or isinstance(value, str):
        templates = {} if value is None else {DEFAULT_TEMPLATE: (value, where)}
    else:
        raise TokenizerLoadError(f"{where} must be a str, got {value!r:.60}")
    files = {file.stem: file for file in sorted((directory / TEMPLATES).glob("*.jinja"))}
    if (directory / TEMPLATE).exists():
        files[DEFAULT_TEMPLATE] = directory / TEMPLATE
    own = {name: (_text(file), str(file.relative_to(directory))) for name, file in files.items()}
    if not own:
        return templates
    # Files replace what tokenizer_config.json says; its default is kept where they have none.
    return {**{name: one for name, one in templates.items() if name == DEFAULT_TEMPLATE}, **own}


def _token(where: str, name: str, value: Any, *, is_special: bool = True) -> AddedToken | None:
    """A token, from its spelling or the JSON object of an AddedToken; is_special: where that doesn't say it."""
    if value is None:
        return None
    if isinstance(value, str):
        return _plain_token(value, True)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
        given = {flag: bool(value[flag]) for flag in flags if value.get(flag) is not None}
        return AddedToken(value["content"], **{"special": is_special, **given})
    raise TokenizerLoadError(f"{where}: {name} must be a str, got {value!r:.60}")


def _plain_token(spelling: str, is_special: bool) -> AddedToken:
    return AddedToken(spelling, normalized=not is_special, special=is_special)


def _flag(config: Mapping[str, Any], name: str) -> bool | None:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise TokenizerLoadError(f"{CONFIG}: {name} must be a bool, got {value!r:.60}")
    return value


def _json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; empty where there is no such file."""
    if not file.exists():
        return {}
    try:
        value = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        if isinstance(error, TokenizerLoadError):
            raise
        raise TokenizerLoadError(f"{file} is not JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise TokenizerLoadError(f"{file.name} must hold a JSON object")
    return value


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerLoadError(f"{file} cannot be read: {one_line(error)}") from error
