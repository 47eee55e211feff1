"""Tokenization and incremental detokenization with a checkpoint's tokenizer.json.

Input is a client's text or chat messages, as str or UTF-8 bytes; output is int32 ids, and str for ids. It reads a
directory in Hugging Face's layout without transformers. It knows nothing of Triton, tensor names or engines.
ensemble/text/chat/ renders chat messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from deepseek_triton.ensemble.artefacts.tokenizer_files import DEFAULT_TEMPLATE, TOOL_TEMPLATE, read_tokenizer_files
from deepseek_triton.ensemble.text.chat import (
    NO_CONTROL_TOKENS,
    PARSE_CONTROL_TOKENS,
    ChatTemplate,
    ControlTokens,
    RenderLimits,
    parse_messages,
)
from deepseek_triton.ensemble.text.errors import TextError, TokenizerLoadError, check_size, utf8_text
from deepseek_triton.ensemble.text.reasoning import opens_reasoning
from deepseek_triton.ensemble.text.tool_calls.formats import ToolFormat

Ids = NDArray[np.int32]
JSON_BYTES_PER_BYTE = 6  # of "\\u00e9"
JSON_STRUCTURE_BYTES = 65536
# How a byte-level vocabulary spells bytes: those that can be printed as themselves, the others from U+0100 on.
_PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTE_LEVEL = {
    **{chr(byte): byte for byte in _PRINTED},
    **{chr(0x100 + i): byte for i, byte in enumerate(byte for byte in range(0x100) if byte not in _PRINTED)},
}
MIN_LONGEST_TOKEN = 16  # bytes; in a tiny vocabulary, white space and unknown characters may share one token


@dataclass(frozen=True)
class Prompt:
    """A prompt's text before tokenization, and the facts that parsing the answer needs.

    is_templated: a chat template rendered it, BOS included.
    mark: a character of the text, and no part of the prompt, that breaks control tokens in a client's messages.
    is_reasoning_open: it ends inside `<think>`; None: the model doesn't reason.
    has_tools: the client passed tools.
    """

    text: str
    is_templated: bool = False
    is_reasoning_open: bool | None = None
    has_tools: bool = False
    mark: str | None = None


class Tokenizer:
    """Converts text and messages to ids, and ids to text, as the checkpoint's files define.

    If `tokenizer_config.json` has `add_bos_token`, it decides about BOS and EOS (as in transformers' Llama tokenizers;
    DeepSeek's tokenizer.json adds none itself); else tokenizer.json's post-processor does. A BOS that the text begins
    with is never doubled. A chat template writes its own BOS.

    `shown` lists special tokens that `decode` doesn't hide; by default the markers of the chat template, which
    ensemble/text/reasoning.py and ensemble/text/tool_calls/ parse. In DeepSeek's own tokenizer.json they are ordinary
    added tokens; in a converted checkpoint they may be special.

    `max_prompt_tokens` bounds prompts before they are tokenized: one of more bytes than so many tokens can have is
    refused. None: no bound.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, ChatTemplate] | None = None,
        shown: frozenset[str] | None = None,
        max_prompt_tokens: int | None = None,
    ) -> None:
        self._backend = backend
        backend.no_truncation()  # some checkpoints ship truncation and padding settings of their training
        backend.no_padding()
        self.bos_token, self.eos_token = bos_token, eos_token
        self.bos_id = self._special_id("bos_token", bos_token)
        self.eos_id = self._special_id("eos_token", eos_token)
        self._bos = [] if self.bos_id is None else [self.bos_id]
        self._eos = [] if self.eos_id is None else [self.eos_id]
        for name, is_added, token in (("bos", add_bos_token, self._bos), ("eos", add_eos_token, self._eos)):
            if is_added and not token:
                raise TokenizerLoadError(f"tokenizer_config.json: add_{name}_token is true without {name}_token")
        self._add_bos, self._add_eos = add_bos_token, add_eos_token
        named = {"bos_token": bos_token, "eos_token": eos_token}
        self._special_tokens = {**(special_tokens or {}), **{name: token or "" for name, token in named.items()}}
        self._chat_templates = dict(chat_templates or {})
        self.vocab_size: int = backend.get_vocab_size()  # including added tokens
        self.base_vocab_size: int = backend.get_vocab_size(with_added_tokens=False)
        if shown is None:
            shown = frozenset[str]().union(*(template.markers for template in self._chat_templates.values()))
        self._shown = shown
        self._added: dict[int, tokenizers.AddedToken] = backend.get_added_tokens_decoder()
        self._hidden_ids = frozenset(
            index for index, token in self._added.items() if token.special and token.content not in shown
        )
        self._control_tokens = ControlTokens(
            [token.content for token in self._added.values() if token.special or token.content.startswith("<")],
            frozenset[str]().union(*(template.markers for template in self._chat_templates.values())),
        )
        self.max_prompt_bytes: int | None = None
        if max_prompt_tokens is not None:
            self.max_prompt_bytes = max_prompt_tokens * longest_token_bytes(backend)
        decoder = backend.decoder
        self._has_byte_fallback = decoder is not None and decoder.decode(["<0x41>"]) == "A"

    @classmethod
    def from_directory(cls, path: str | Path, max_prompt_tokens: int | None = None) -> Tokenizer:
        """Read the tokenizer's files (ensemble/artefacts/tokenizer_files.py says which).

        Raises:
            TokenizerLoadError: a file is missing or damaged; the message names it.
        """
        files = read_tokenizer_files(Path(path))
        return cls(
            files.backend,
            bos_token=files.special_tokens.get("bos_token"),
            eos_token=files.special_tokens.get("eos_token"),
            add_bos_token=files.add_bos_token,
            add_eos_token=files.add_eos_token,
            special_tokens=files.special_tokens,
            chat_templates={name: ChatTemplate(*source) for name, source in files.chat_templates.items()},
            max_prompt_tokens=max_prompt_tokens,
        )

    def text_prompt(self, text: str | bytes) -> Prompt:
        """Return the prompt for a text to be continued.

        Raises:
            TextError: the text is empty, not UTF-8 or longer than any prompt.
        """
        self._check_size(text, "text_input")
        prompt = _encodable(utf8_text(text, "text_input"), "text_input")
        if not prompt:
            raise TextError("text_input is empty: send at least one character, or messages")
        return Prompt(prompt, is_reasoning_open=opens_reasoning(prompt))

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[Ids]:
        """Return the ids [num_tokens] of each prompt, with BOS if the checkpoint adds it; encodes in parallel."""
        ids: list[Ids] = [np.empty(0, np.int32)] * len(prompts)
        for index, prompt in enumerate(prompts):
            if prompt.mark is not None:
                pieces = self._ids(prompt.text.split(prompt.mark), add_special_tokens=False)
                ids[index] = np.array([token for piece in pieces for token in piece], np.int32)
        for is_templated in (False, True):
            chosen = [
                index
                for index, prompt in enumerate(prompts)
                if prompt.is_templated == is_templated and prompt.mark is None
            ]
            texts = [prompts[index].text for index in chosen]
            encoded = self._ids(texts, add_special_tokens=not is_templated and self._add_bos is None)
            for index, own in zip(chosen, encoded, strict=True):
                ids[index] = np.array(own if is_templated else self._with_bos_eos(own), np.int32)
        return ids

    def encode_prompt(self, prompt: Prompt) -> Ids:
        """Return the ids [num_tokens] of one prompt."""
        return self.encode_prompts([prompt])[0]

    def encode(self, text: str | bytes) -> Ids:
        """Return the ids [num_tokens] of a text to be continued; raises as `text_prompt`."""
        return self.encode_prompt(self.text_prompt(text))

    @property
    def tool_format(self) -> ToolFormat | None:
        """The model's format of tool calls, detected from its chat templates; None if there is none."""
        names = (TOOL_TEMPLATE, DEFAULT_TEMPLATE, *self._chat_templates)
        formats = (self._chat_templates[name].tool_format for name in names if name in self._chat_templates)
        return next((found for found in formats if found is not None), None)

    def encode_messages(self, messages_json: str | bytes, enable_thinking: bool | None = None) -> Ids:
        """Return the ids [num_tokens] of a chat; raises as `chat_prompt`."""
        return self.encode_prompt(self.chat_prompt(messages_json, enable_thinking))

    def chat_prompt(self, messages_json: str | bytes, enable_thinking: bool | None = None) -> Prompt:
        """Render a chat with the checkpoint's template: the one called `tool_use`, where there are tools and it exists.

        The JSON is a list of messages, or an object with `messages` and optionally `tools`, `add_generation_prompt`,
        `chat_template_kwargs` and `chat_template`, the name of one of the checkpoint's templates. `enable_thinking`
        overrides `chat_template_kwargs`. Control tokens in the messages stay text, unless the object says
        `"parse_control_tokens": true`.

        Raises:
            TextError: the JSON or a message is invalid, or the template can't switch thinking; the message says why.
        """
        if not self._chat_templates:
            raise TextError("this model has no chat template: send text_input instead of messages")
        # Of JSON, one byte of text may take six, and its structure some more.
        self._check_size(messages_json, "messages", JSON_BYTES_PER_BYTE, JSON_STRUCTURE_BYTES)
        variables = parse_messages(messages_json)
        template = self._template(variables.pop("chat_template", None), has_tools=variables["tools"] is not None)
        if variables["tools"] is not None and not (template.knows_tools or template.tool_format):
            raise TextError("tools are given, but this model's chat template knows none: leave them out")
        control_tokens = NO_CONTROL_TOKENS if variables.pop(PARSE_CONTROL_TOKENS) else self._control_tokens
        limits = RenderLimits() if self.max_prompt_bytes is None else RenderLimits(max_chars=self.max_prompt_bytes)
        prompt, mark = template.render_protected(
            variables, enable_thinking, control_tokens, limits, own=self._special_tokens
        )
        self._check_size(prompt, "the prompt that the chat template makes of the messages")
        if not prompt:
            raise TextError("the model's chat template made an empty prompt of the messages")
        return Prompt(
            _encodable(prompt, "messages"),
            is_templated=True,
            is_reasoning_open=opens_reasoning(prompt) if template.has_reasoning else None,
            has_tools=variables["tools"] is not None,
            mark=mark,
        )

    def _template(self, name: str | None, *, has_tools: bool) -> ChatTemplate:
        if name is None:
            name = TOOL_TEMPLATE if has_tools and TOOL_TEMPLATE in self._chat_templates else DEFAULT_TEMPLATE
            if name not in self._chat_templates and len(self._chat_templates) == 1:
                name = next(iter(self._chat_templates))
        if name not in self._chat_templates:
            names = ", ".join(self._chat_templates)
            raise TextError(f"this model has no chat template {name!r}: set chat_template to one of {names}")
        return self._chat_templates[name]

    def encode_continuation(self, text: str) -> Ids:
        """Return the ids [num_tokens] of a text that continues another, without BOS and EOS."""
        return np.array(self._ids([_encodable(text, "text")], add_special_tokens=False)[0], dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` [num_tokens] without hidden special tokens and ids outside the vocabulary."""
        visible = [index for index in map(int, ids) if index not in self._hidden_ids]
        text: str = self._backend.decode(visible, skip_special_tokens=False)
        return text

    def text_of(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` [num_tokens], special tokens written out."""
        text: str = self._backend.decode([int(index) for index in ids], skip_special_tokens=False)
        return text

    def token_id(self, spelling: str) -> int | None:
        """Return the id of the token that `spelling` is in the vocabulary; None if there is none."""
        index: int | None = self._backend.token_to_id(spelling)
        return index

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be rendered."""
        return bool(self._chat_templates)

    def is_added(self, index: int) -> bool:
        """Whether an id is a token that no text is split inside of, special or not."""
        return index in self._added

    def leading_token(self, text: str) -> int | None:
        """Return the id of the longest added token that `text` begins with, markers aside; None if there is none."""
        found = [
            (len(token.content), index)
            for index, token in self._added.items()
            if text.startswith(token.content) and token.content not in self._shown
        ]
        return max(found)[1] if found else None

    def token_text(self, index: int) -> str:
        """Return the text of one token, also of a special one; U+FFFD for part of a character."""
        text: str = self._backend.decode([index], skip_special_tokens=False)
        return text

    def token_bytes(self, index: int) -> bytes:
        """Return the bytes of one token, which may be part of a character."""
        spelling: str = self._backend.id_to_token(index) or ""
        if index not in self._added:
            if self.is_byte_token(spelling):
                return bytes([int(spelling[3:5], 16)])
            if isinstance(self._backend.decoder, tokenizers.decoders.ByteLevel):
                return bytes(map(BYTE_LEVEL.__getitem__, spelling))
        return self.token_text(index).encode()

    def visible_token(self, index: int) -> str | None:
        """Return the vocabulary's spelling of an id; None if `decode` hides it."""
        token: str | None = None if index in self._hidden_ids else self._backend.id_to_token(index)
        return token or None

    def is_byte_token(self, token: str) -> bool:
        """Return whether the token is a byte of SentencePiece's byte fallback (`<0xE4>`)."""
        return self._has_byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">")

    def _check_size(self, text: str | bytes, field: str, factor: int = 1, more: int = 0) -> None:
        if self.max_prompt_bytes is not None:
            check_size(text, field, factor * self.max_prompt_bytes + more)

    def _ids(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def _with_bos_eos(self, ids: list[int]) -> list[int]:
        if self._add_bos and ids[:1] != self._bos:
            ids = self._bos + ids
        elif self._add_bos is None and self._bos and ids[:2] == self._bos * 2:
            ids = ids[1:]
        if self._add_eos and ids[-1:] != self._eos:
            ids = ids + self._eos
        return ids

    def _special_id(self, name: str, token: str | None) -> int | None:
        if token is None:
            return None
        index: int | None = self._backend.token_to_id(token)
        if index is None:
            raise TokenizerLoadError(f"tokenizer_config.json: {name} {token!r} is not in tokenizer.json")
        added = self._backend.get_added_tokens_decoder().get(index)
        if added is None or not added.special:  # DeepSeek Coder's <|EOT|> isn't marked as special
            self._backend.add_special_tokens([token])
        return index


class IncrementalDetokenizer:
    """Converts one sequence's ids to text incrementally.

    The joined texts of all pushes equal `Tokenizer.decode` of all ids. Incomplete characters, and text that a later id
    could change, are held back. Each push decodes its own ids after the last four shown ids, which are its context:

    - A byte-level decoder concatenates bytes. Four shown ids hold at least four bytes, so they hold the last complete
      character and the beginning of an incomplete one, which determines how the next bytes decode. Incomplete or
      invalid bytes at the end decode to one U+FFFD, which is held back.
    - SentencePiece's byte fallback decodes each run of byte tokens as a whole, valid or not, so a run is held back
      until another token ends it. The space that this decoder strips lies in the first of the four ids.
    """

    _CONTEXT_LEN = 4

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # the last shown ids; their text was returned, except a final U+FFFD
        self._pending: list[int] = []
        self._byte_run_len = 0  # number of byte tokens at the end of the pending ids
        self._is_final = False

    def push(self, ids: Iterable[int], final: bool = False) -> str:
        """Return the text that `ids` complete; `final` flushes what is held back. Nothing may be pushed after it."""
        if self._is_final:
            raise RuntimeError("push after the final push: make a new IncrementalDetokenizer for each sequence")
        self._is_final = final
        for index in map(int, ids):
            token = self._tokenizer.visible_token(index)
            if token is not None:
                self._pending.append(index)
                self._byte_run_len = self._byte_run_len + 1 if self._tokenizer.is_byte_token(token) else 0
        num_ready = len(self._pending) - (0 if final else self._byte_run_len)
        if num_ready == 0 and not final:
            return ""
        window = self._context + self._pending[:num_ready]
        old = self._tokenizer.decode(self._context).removesuffix("\ufffd")
        new = self._tokenizer.decode(window)
        if not final:
            new = new.removesuffix("\ufffd")
        self._context, self._pending = window[-self._CONTEXT_LEN :], self._pending[num_ready:]
        return new[len(old) :]

    @property
    def is_in_byte_run(self) -> bool:
        """Whether the last ids are byte tokens, whose text is held back until another token or the end follows."""
        return self._byte_run_len > 0

    def peek(self, ids: Iterable[int] = ()) -> str:
        """Return what `push(ids, final=True)` would return, without changing the state."""
        other = IncrementalDetokenizer(self._tokenizer)
        other._context, other._pending = self._context, list(self._pending)
        other._byte_run_len = self._byte_run_len
        return other.push(ids, final=True)


def longest_token_bytes(backend: tokenizers.Tokenizer) -> int:
    """Return how many bytes of text one token can stand for, at most."""
    is_byte_level = isinstance(backend.decoder, tokenizers.decoders.ByteLevel)
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    own = backend.get_vocab(with_added_tokens=False)
    # A byte-level vocabulary spells each byte as one character.
    lengths = map(len, own) if is_byte_level else (len(spelling.encode()) for spelling in own)
    return max(MIN_LONGEST_TOKEN, *lengths, *(len(content.encode()) for content in added))


def _encodable(text: str, field: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(f"{field} holds a lone surrogate: escape both halves of the surrogate pair") from error
    return text
