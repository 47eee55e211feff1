"""Compiles and caches one model's guides, with limits of time, memory and stack."""

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
# llguidance recurses over chains of rules and references, with up to 6 KiB of stack per 50 bytes of schema. Stack pages
# that aren't touched use no memory.
COMPILE_STACK_BYTES = 256 * 2**20


class GuideCompiler:
    """Compiles guides for one model; thread-safe.

    Args:
        tokenizer_directory: holds tokenizer.json.
        vocab_size: the model's. No guide allows ids that the tokenizer lacks, special tokens or markers such as
            `<think>`.
        end_ids: the tokens that end a sequence. They are allowed if and only if the guide is satisfied.

    Raises:
        GuideError: tokenizer.json is damaged or doesn't fit the other arguments.
    """

    def __init__(self, tokenizer_directory: Path, vocab_size: int, end_ids: Collection[int]) -> None:
        self._vocabulary = Vocabulary.read(tokenizer_directory / "tokenizer.json", vocab_size, end_ids)
        self._cache: OrderedDict[tuple[str, str], Guide] = OrderedDict()
        self._cache_lock = threading.Lock()
        self._compile_lock = threading.Lock()

    def compile(self, guide_type: str, guide: str) -> Guide:
        """Return a guide in its initial state.

        Args:
            guide_type: one of:
                json: any JSON object; `guide` is ignored.
                json_schema: a JSON schema of draft 2020-12 (or the draft that its `$schema` names). Properties are
                    generated in the schema's order. A top-level `x-guidance` holds llguidance's options; without them a
                    keyword that llguidance can't enforce, or a `oneOf` whose branches may overlap, is an error.
                regex: the syntax of Rust's `regex` without look-around and back references. It matches the whole text.
                grammar, ebnf_grammar: llguidance's Lark dialect, with a rule `start` or `%llguidance {}`; anything else
                    is parsed as llama.cpp's EBNF dialect (GBNF), with a rule `root`.
                choice: a JSON list of strings, one of which is the whole text.
            guide: the schema, regex, grammar or list, as text.

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
        """Run `_compile` on a thread with a large stack. One runs at a time, which bounds memory and CPU."""
        outcomes: queue.SimpleQueue[Guide | Exception] = queue.SimpleQueue()

        def work() -> None:
            try:
                outcomes.put(self._compile(guide_type, guide))
            except Exception as error:  # re-raised on the caller's thread
                outcomes.put(error)
            finally:
                self._compile_lock.release()  # not earlier: after a timeout the thread still uses a core and memory

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
        """Compile a guide and compute its first mask, which reveals guides that are unsatisfiable or too complex."""
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
    """Start a thread with a stack of `stack_bytes`.

    The stack size is a process-wide setting: another thread that starts at the same moment may get the large stack too.
    """
    default = threading.stack_size(stack_bytes)
    try:
        threading.Thread(target=target, name="guide compiler", daemon=True).start()
    finally:
        threading.stack_size(default)
