"""Tokenization and incremental detokenization with a checkpoint's tokenizer.json.

Input is a client's text or chat messages, as str or UTF-8 bytes; output is int32 ids, and str for ids. It reads a
directory in Hugging Face's layout without transformers. It knows nothing of Triton, tensor names or engines.
ensemble/text/chat.py renders chat messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tokenizers
from numpy.typing import NDArray

from deepseek_triton.ensemble.text.chat import ChatTemplate, parse_messages
from deepseek_triton.ensemble.text.errors import TextError, TokenizerLoadError, one_line, utf8_text
from deepseek_triton.ensemble.text.reasoning import opens_reasoning
from deepseek_triton.ensemble.text.tool_calls.formats import ToolFormat

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Prompt:
    """A prompt's text before tokenization, and the facts that parsing the answer needs.

    is_templated: a chat template rendered it, BOS included.
    is_reasoning_open: it ends inside `<think>`; None: the model doesn't reason.
    has_tools: the client passed tools.
    """

    text: str
    is_templated: bool = False
    is_reasoning_open: bool | None = None
    has_tools: bool = False


class Tokenizer:
    """Converts text and messages to ids, and ids to text, as the checkpoint's files define.

    If `tokenizer_config.json` has `add_bos_token`, it decides about BOS and EOS (as in transformers' Llama tokenizers;
    DeepSeek's tokenizer.json adds none itself); else tokenizer.json's post-processor does. A BOS that the text begins
    with is never doubled. A chat template writes its own BOS.

    `shown` lists special tokens that `decode` doesn't hide; by default the markers of the chat template, which
    ensemble/text/reasoning.py and ensemble/text/tool_calls/ parse. In DeepSeek's own tokenizer.json they are ordinary
    added tokens; in a converted checkpoint they may be special.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        chat_template: ChatTemplate | None = None,
        shown: frozenset[str] | None = None,
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
        self._chat_template = chat_template
        self.vocab_size: int = backend.get_vocab_size()  # including added tokens
        if shown is None:
            shown = frozenset() if chat_template is None else chat_template.markers
        self._hidden_ids = frozenset(
            index
            for index, token in backend.get_added_tokens_decoder().items()
            if token.special and token.content not in shown
        )
        decoder = backend.decoder
        self._has_byte_fallback = decoder is not None and decoder.decode(["<0x41>"]) == "A"

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json and, where present, tokenizer_config.json and chat_template.jinja.

        Raises:
            TokenizerLoadError: a file is missing or damaged; the message names it.
        """
        directory = Path(path)
        file = directory / "tokenizer.json"
        source = _read(file)
        try:
            backend = tokenizers.Tokenizer.from_str(source)
        except Exception as error:  # the library raises bare Exception for every defect of the file
            raise TokenizerLoadError(f"{file} is not a tokenizer: {one_line(error)}") from error
        file = directory / "tokenizer_config.json"
        try:
            config = json.loads(_read(file)) if file.exists() else {}
            return cls(
                backend,
                bos_token=_config_value(config, "bos_token", str),
                eos_token=_config_value(config, "eos_token", str),
                add_bos_token=_config_value(config, "add_bos_token", bool),
                add_eos_token=_config_value(config, "add_eos_token", bool),
                chat_template=_read_chat_template(directory, config),
            )
        except json.JSONDecodeError as error:
            raise TokenizerLoadError(f"{file} is not JSON: {error}") from error

    def text_prompt(self, text: str | bytes) -> Prompt:
        """Return the prompt for a text to be continued.

        Raises:
            TextError: the text is empty or not UTF-8.
        """
        prompt = _encodable(utf8_text(text, "text_input"), "text_input")
        if not prompt:
            raise TextError("text_input is empty: send at least one character, or messages")
        return Prompt(prompt, is_reasoning_open=opens_reasoning(prompt))

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[Ids]:
        """Return the ids [num_tokens] of each prompt, with BOS if the checkpoint adds it; encodes in parallel."""
        ids: list[Ids] = [np.empty(0, np.int32)] * len(prompts)
        for is_templated in (False, True):
            chosen = [index for index, prompt in enumerate(prompts) if prompt.is_templated == is_templated]
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
        """The model's format of tool calls, detected from its chat template; None if there is none."""
        return None if self._chat_template is None else self._chat_template.tool_format

    def encode_messages(self, messages_json: str | bytes, enable_thinking: bool | None = None) -> Ids:
        """Return the ids [num_tokens] of a chat; raises as `chat_prompt`."""
        return self.encode_prompt(self.chat_prompt(messages_json, enable_thinking))

    def chat_prompt(self, messages_json: str | bytes, enable_thinking: bool | None = None) -> Prompt:
        """Render a chat with the checkpoint's template.

        The JSON is a list of messages, or an object with `messages` and optionally `tools`, `add_generation_prompt`
        and `chat_template_kwargs`. `enable_thinking` overrides `chat_template_kwargs`.

        Raises:
            TextError: the JSON or a message is invalid, or the template can't switch thinking; the message says why.
        """
        template = self._chat_template
        if template is None:
            raise TextError("this model has no chat template: send text_input instead of messages")
        variables = parse_messages(messages_json)
        variables |= {"bos_token": self.bos_token or "", "eos_token": self.eos_token or ""}
        prompt = template.render(variables, enable_thinking)
        if not prompt:
            raise TextError("the model's chat template made an empty prompt of the messages")
        return Prompt(
            _encodable(prompt, "messages"),
            is_templated=True,
            is_reasoning_open=opens_reasoning(prompt) if template.has_reasoning else None,
            has_tools=variables["tools"] is not None,
        )

    def encode_continuation(self, text: str) -> Ids:
        """Return the ids [num_tokens] of a text that continues another, without BOS and EOS."""
        return np.array(self._ids([_encodable(text, "text")], add_special_tokens=False)[0], dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` [num_tokens] without hidden special tokens and ids outside the vocabulary."""
        visible = [index for index in map(int, ids) if index not in self._hidden_ids]
        text: str = self._backend.decode(visible, skip_special_tokens=False)
        return text

    def token_id(self, spelling: str) -> int | None:
        """Return the id of the token that `spelling` is in the vocabulary; None if there is none."""
        index: int | None = self._backend.token_to_id(spelling)
        return index

    def token_text(self, index: int) -> str:
        """Return the text of one token, also of a special one; U+FFFD for part of a character."""
        text: str = self._backend.decode([index], skip_special_tokens=False)
        return text

    def visible_token(self, index: int) -> str | None:
        """Return the vocabulary's spelling of an id; None if `decode` hides it."""
        token: str | None = None if index in self._hidden_ids else self._backend.id_to_token(index)
        return token or None

    def is_byte_token(self, token: str) -> bool:
        """Return whether the token is a byte of SentencePiece's byte fallback (`<0xE4>`)."""
        return self._has_byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">")

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


def _encodable(text: str, field: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(f"{field} holds a lone surrogate: escape both halves of the surrogate pair") from error
    return text


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerLoadError(f"{file} cannot be read: {one_line(error)}") from error


_T = TypeVar("_T")


def _config_value(config: Any, key: str, kind: type[_T]) -> _T | None:
    if not isinstance(config, dict):
        raise TokenizerLoadError("tokenizer_config.json must hold a JSON object")
    value = config.get(key)
    if kind is str and isinstance(value, dict):  # a serialised AddedToken
        value = value.get("content")
    if value is not None and not isinstance(value, kind):
        raise TokenizerLoadError(f"tokenizer_config.json: {key} must be a {kind.__name__}, got {value!r}")
    return value


def _read_chat_template(directory: Path, config: dict[str, Any]) -> ChatTemplate | None:
    file = directory / "chat_template.jinja"
    if file.exists():
        return ChatTemplate(_read(file), file.name)
    if isinstance(named := config.get("chat_template"), list):
        sources = [entry.get("template") for entry in named if entry.get("name") == "default"]
        if len(sources) != 1:
            raise TokenizerLoadError("tokenizer_config.json: chat_template must have one entry named default")
        config = {"chat_template": sources[0]}
    source = _config_value(config, "chat_template", str)
    return None if source is None else ChatTemplate(source, "tokenizer_config.json: chat_template")
