"""Guides of one model: compiled once, within bounds of time, memory and stack, and kept for the next request."""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from deepseek_triton.ensemble.guided.errors import GuideError
from deepseek_triton.ensemble.guided.grammar import GRAMMARS, normalize
from deepseek_triton.ensemble.guided.guide import Guide, fill_masks
from deepseek_triton.ensemble.guided.vocabulary import Vocabulary

MAX_CACHED_GUIDES = 64
COMPILE_TIMEOUT_S = 10.0
# The library recurses over chains of rules and references, with up to 6 KiB of stack for 50 bytes of schema. Untouched
# pages cost nothing.
COMPILE_STACK_BYTES = 256 * 2**20


class GuideCompiler:
    """Compiles guides for one model; thread-safe.

    Args:
        tokenizer_directory: holds tokenizer.json.
        vocab_size: the model's. Ids that the tokenizer lacks, special tokens and markers such as `<think>` are never
            allowed, whatever a guide says.
        end_ids: the tokens that end a sequence: allowed exactly where the guide is satisfied.

    Raises:
        GuideError: tokenizer.json is damaged or doesn't fit the other arguments.
    """

    def __init__(self, tokenizer_directory: Path, vocab_size: int, end_ids: Collection[int]) -> None:
        self._vocabulary = Vocabulary.read(tokenizer_directory / "tokenizer.json", vocab_size, end_ids)
        self._cache: OrderedDict[tuple[str, str], Guide] = OrderedDict()
        self._cache_lock = threading.Lock()
        self._compile_lock = threading.Lock()

    def compile(self, guide_type: str, guide: str) -> Guide:
        """The beginning of a sequence under `guide`.

        json: any JSON object; `guide` is ignored.
        json_schema: a JSON schema of draft 2020-12 (or what its `$schema` says), as text. Properties come in the
            schema's order. llguidance's options are taken from a top-level `x-guidance`; without them a keyword that it
            can't enforce is refused, by name, and so is a `oneOf` whose branches may overlap.
        regex: in the syntax of Rust's `regex`, over the whole text; no look-around, no back references.
        grammar, ebnf_grammar: Lark as llguidance has it, beginning with a rule `start` or `%llguidance {}`; anything
            else is read as EBNF in llama.cpp's dialect (GBNF), beginning with a rule `root`.
        choice: a JSON list of strings, one of which is the whole text.

        Raises:
            GuideError: the type is unknown, or the guide is empty, too long, invalid, too complex, or impossible to
                satisfy.
        """
        key = normalize(guide_type, guide)
        with self._cache_lock:
            cached = self._cache.get(key)
            if cached is not None:
                self._cache.move_to_end(key)
                return cached.copy()
        compiled = self._compile_apart(*key)
        with self._cache_lock:
            self._cache[key] = compiled
            if len(self._cache) > MAX_CACHED_GUIDES:
                self._cache.popitem(last=False)
            return compiled.copy()

    def _compile_apart(self, guide_type: str, guide: str) -> Guide:
        """`_compile` on a thread with a large stack, one at a time, so that neither depth nor number can do harm."""
        outcomes: queue.SimpleQueue[Guide | Exception] = queue.SimpleQueue()

        def work() -> None:
            try:
                outcomes.put(self._compile(guide_type, guide))
            except Exception as error:  # whatever it is belongs to the caller, who waits for it
                outcomes.put(error)
            finally:
                self._compile_lock.release()  # not before: one that overran its time still uses its core and memory

        if not self._compile_lock.acquire(timeout=COMPILE_TIMEOUT_S):
            raise GuideError("another guide is still being compiled: try again later")
        try:
            _start_thread(work, COMPILE_STACK_BYTES)
        except BaseException:
            self._compile_lock.release()
            raise
        try:
            outcome = outcomes.get(timeout=COMPILE_TIMEOUT_S)
        except queue.Empty:
            raise GuideError(f"the {guide_type} takes over {COMPILE_TIMEOUT_S:g} s to compile: simplify it") from None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _compile(self, guide_type: str, guide: str) -> Guide:
        """The guide, with the first step taken: what is impossible or too complex shows there."""
        compiled = Guide(self._vocabulary.matcher(GRAMMARS[guide_type](guide)), self._vocabulary)
        if compiled.error:
            raise GuideError(f"the {guide_type} is invalid: {compiled.error}")
        mask = np.zeros((1, self._vocabulary.num_words), np.uint32)
        for error in fill_masks([compiled], mask).values():
            raise GuideError(f"the {guide_type} can't be used: {error}")
        if not (mask[0] & ~self._vocabulary.end_mask).any():
            raise GuideError(f"the {guide_type} allows nothing but an empty text")
        return compiled


def _start_thread(target: Callable[[], None], stack_bytes: int) -> None:
    """The size is a setting of the whole process: a thread that starts elsewhere meanwhile gets more than it needs."""
    default = threading.stack_size(stack_bytes)
    try:
        threading.Thread(target=target, name="guide compiler", daemon=True).start()
    finally:
        threading.stack_size(default)
