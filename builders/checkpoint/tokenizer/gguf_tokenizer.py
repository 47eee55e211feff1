"""A GGUF's tokenizer, written in Hugging Face's layout: what the serving side reads.

What enters: the metadata fields of a GGUF. What leaves: tokenizer.json, tokenizer_config.json and, where the
GGUF has one, chat_template.jinja. It knows nothing about tensors or models.

A GGUF names its pre-tokenizer (`tokenizer.ggml.pre`) instead of carrying it, so the rules stand here as a
table. They are those of the models' own tokenizer.json; llama.cpp's src/llama-vocab.cpp gives the names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from deepseek_triton.builders.checkpoint.tokenizer.byte_fallback import PieceType, byte_fallback_tokenizer
from deepseek_triton.builders.errors import CheckpointError
from deepseek_triton.ensemble.artefacts.tokenizer_files import TEMPLATE, TEMPLATES

_T = TypeVar("_T")


# Names in tokenizer_config.json → keys of GGUF, without `_token_id`.
SPECIAL_TOKENS = {
    "bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "sep_token": "seperator", "pad_token": "padding",
    "cls_token": "cls", "mask_token": "mask",
}  # fmt: skip
TEMPLATE_KEY = "tokenizer.chat_template"
TEMPLATE_NAMES = "tokenizer.chat_templates"  # an array of names


class GGUFTokenizerError(CheckpointError):
    """The GGUF lacks what its tokenizer needs, or needs what is not supported here."""


class GGUFMetadata(Protocol):
    """What is used of a `gguf.GGUFReader`: its fields, each with a `contents()`."""

    @property
    def fields(self) -> Mapping[str, Any]:
        """The metadata fields by key."""


@dataclass(frozen=True)
class BytePairRules:
    """How one family of byte-level BPE cuts text before merging."""

    splits: tuple[Any, ...]  # pre-tokenizers, one after the other
    normalizer: Any = None
    ignore_merges: bool = False  # a piece that is a token as a whole is never built by merges
    add_bos: bool = False  # where the GGUF does not say


def _split(regex: str) -> Any:
    return pre_tokenizers.Split(Regex(regex), behavior="isolated")


_DIGITS = pre_tokenizers.Digits(individual_digits=True)
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_GPT2_SPLIT = _split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
_NEWLINE = _split("[\r\n]")
_CJK = _split("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")
# Llama 3 and Qwen 2 differ in how many digits stand together.
_LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_V3_REGEX = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# DeepSeek LLM's own list of cased letters: no Unicode property. Escaped, because some are singletons that
# an editor's normalization would turn into other letters.
_DEEPSEEK_LLM_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)

_LLAMA3 = BytePairRules((_split(_LLAMA3_REGEX), _BYTES), ignore_merges=True, add_bos=True)
# llama.cpp leaves out the NFC that Qwen's own tokenizer.json has and its models were trained with.
_QWEN2 = BytePairRules((_split(_LLAMA3_REGEX.replace("{1,3}", "")), _BYTES), normalizer=normalizers.NFC())
BYTE_PAIR_RULES: dict[str, BytePairRules] = {
    "gpt-2": BytePairRules((_GPT2,)),
    "default": BytePairRules(  # llama.cpp's, for files whose converter did not know the model
        (_split(r"[\p{P}$+<=>^~|]+"), _GPT2_SPLIT, _split(r"\p{N}+"), _split("[0-9][0-9][0-9]"), _BYTES)
    ),
    "smollm": BytePairRules((_DIGITS, _GPT2)),
    "deepseek-llm": BytePairRules(
        (
            _NEWLINE,
            _split(rf"\s?[{_DEEPSEEK_LLM_LETTERS}]+"),
            _split(r"\s?[!-/:-~" "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"),
            _split(r"\s+$"),
            _CJK,
            _DIGITS,
            _BYTES,
        )
    ),
    "deepseek-coder": BytePairRules((_NEWLINE, _split(r"\s?\p{L}+"), _split(r"\s?\p{P}+"), _CJK, _DIGITS, _BYTES)),
    "deepseek-v3": BytePairRules(
        (
            _split(r"\p{N}{1,3}"),
            _split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
            _split(_DEEPSEEK_V3_REGEX),
            _BYTES,
        )
    ),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}


def write_tokenizer(reader: GGUFMetadata, directory: str | Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja from a GGUF's metadata.

    Raises:
        GGUFTokenizerError: a key is missing or wrong, or the tokenizer is of a kind unknown here.
    """
    metadata = _Metadata(reader)
    build = _lookup(_BUILDERS, "model", metadata)
    tokenizer, add_bos = build(metadata)
    tokens, types = metadata.tokens, metadata.token_types
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind != PieceType.USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.USER_DEFINED)
        ]
    )
    if tokenizer.get_vocab_size() != len(tokens):
        raise GGUFTokenizerError(f"the tokenizer has {tokenizer.get_vocab_size()} ids, the GGUF {len(tokens)}")
    special = {name: metadata.special_token(f"{key}_token_id") for name, key in SPECIAL_TOKENS.items()}
    bos = special["bos_token"]
    if special["eos_token"] is None and metadata.special_token("eot_token_id") is None:
        raise GGUFTokenizerError("tokenizer.ggml.eos_token_id is missing: no text would ever end")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **special,
        "add_bos_token": metadata.get("add_bos_token", bool, add_bos),
        "add_eos_token": metadata.get("add_eos_token", bool, False),
    }
    if config["add_bos_token"]:
        if bos is None:
            raise GGUFTokenizerError("tokenizer.ggml.bos_token_id is missing, though a BOS must be added")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(target / "tokenizer.json"), pretty=False)
    (target / "tokenizer_config.json").write_text(
        json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    for key, field in reader.fields.items():
        if not key.startswith(TEMPLATE_KEY) or key == TEMPLATE_NAMES:
            continue
        template = field.contents()
        if not isinstance(template, str):
            raise GGUFTokenizerError(f"{key} must be a text, got {template!r:.60}")
        if key == TEMPLATE_KEY:
            (target / TEMPLATE).write_text(template, encoding="utf-8", newline="\n")
        elif key.startswith(f"{TEMPLATE_KEY}."):
            name = key.removeprefix(f"{TEMPLATE_KEY}.")
            if not re.fullmatch(r"[\w-]+", name):
                raise GGUFTokenizerError(f"{key} names a chat template {name!r}: use letters, digits, '_' and '-'")
            (target / TEMPLATES).mkdir(exist_ok=True)
            (target / TEMPLATES / f"{name}.jinja").write_text(template, encoding="utf-8", newline="\n")


class _Metadata:
    """The `tokenizer.ggml.*` fields, checked."""

    def __init__(self, reader: GGUFMetadata) -> None:
        self._fields = reader.fields
        self.tokens: list[str] = self.get("tokens", list)
        self.vocab = {token: index for index, token in enumerate(self.tokens)}
        if len(self.vocab) != len(self.tokens):
            token = next(token for index, token in enumerate(self.tokens) if self.vocab[token] != index)
            raise GGUFTokenizerError(f"tokenizer.ggml.tokens holds {token!r} twice")
        self.token_types: list[int] = self.per_token("token_type")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `tokenizer.ggml.KEY`; without a default it must be there."""
        field = self._fields.get(f"tokenizer.ggml.{key}")
        if field is None:
            if default is None:
                raise GGUFTokenizerError(f"tokenizer.ggml.{key} is missing: convert the model to GGUF again")
            return default
        value = field.contents()
        if not isinstance(value, kind):
            raise GGUFTokenizerError(f"tokenizer.ggml.{key} must be a {kind.__name__}, got {value!r:.60}")
        return value

    def per_token(self, key: str) -> list[Any]:
        """A list with one entry for each token."""
        values: list[Any] = self.get(key, list)
        if len(values) != len(self.tokens):
            raise GGUFTokenizerError(f"tokenizer.ggml.{key} has {len(values)} entries for {len(self.tokens)} tokens")
        return values

    def special_token(self, key: str) -> str | None:
        """The token whose id `tokenizer.ggml.KEY` gives; None where the key is absent."""
        index: int = self.get(key, int, -1)
        if index == -1:
            return None
        if not 0 <= index < len(self.tokens):
            raise GGUFTokenizerError(f"tokenizer.ggml.{key} is {index}, outside of {len(self.tokens)} tokens")
        return self.tokens[index]


def _byte_level(metadata: _Metadata) -> tuple[Tokenizer, bool]:
    rules = _lookup(BYTE_PAIR_RULES, "pre", metadata)
    pairs = (merge.partition(" ") for merge in metadata.get("merges", list))
    merges = [(left, right) for left, _, right in pairs]
    tokenizer = Tokenizer(_bpe(metadata, merges, ignore_merges=rules.ignore_merges))
    if rules.normalizer is not None:
        tokenizer.normalizer = rules.normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(rules.splits))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rules.add_bos


def _sentencepiece(metadata: _Metadata) -> tuple[Tokenizer, bool]:
    scores = metadata.per_token("scores")
    unknown = metadata.special_token("unknown_token_id")
    has_prefix = metadata.get("add_space_prefix", bool, True)
    try:
        return byte_fallback_tokenizer(
            metadata.tokens, scores, metadata.token_types, unknown=unknown, has_prefix=has_prefix
        ), True
    except Exception as error:  # the library raises bare Exception: a merge of what is no token, a malformed pair
        raise GGUFTokenizerError(f"the GGUF's tokens and merges make no tokenizer: {error}") from error


def _bpe(metadata: _Metadata, merges: Sequence[tuple[str, str]], **options: Any) -> BPE:
    try:
        return BPE(vocab=metadata.vocab, merges=merges, **options)
    except Exception as error:  # the library raises bare Exception: a merge of what is no token, a malformed pair
        raise GGUFTokenizerError(f"the GGUF's tokens and merges make no tokenizer: {error}") from error


def _lookup(table: Mapping[str, _T], key: str, metadata: _Metadata) -> _T:
    name = metadata.get(key, str)
    if name not in table:
        raise GGUFTokenizerError(f"tokenizer.ggml.{key} is {name!r}: known are {', '.join(table)}")
    return table[name]


# tokenizer.ggml.model: what builds it, giving also whether a BOS is added where the GGUF does not say.
_BUILDERS: dict[str, Callable[[_Metadata], tuple[Tokenizer, bool]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}
