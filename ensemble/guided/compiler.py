"""Compiles and caches one model's guides, with limits of time, memory and stack."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

from deepseek_triton.ensemble.guided.errors import GuideError
from deepseek_triton.ensemble.guided.grammar import GRAMMARS, normalize
from deepseek_triton.ensemble.guided.guide import Guide
from deepseek_triton.ensemble.guided.vocabulary import Vocabulary
from deepseek_triton.ensemble.processes.low_priority import NICENESS, lower_priority
from deepseek_triton.ensemble.protocol.contract import RETRY

MAX_CONCURRENT = 16  # guides compiled at once, which bounds memory; a costly one holds up no other
# The first few yield a CPU to the engine's threads, and the others to these: all together slow it down by a third.
NUM_PREFERRED = 4
OTHERS_NICENESS = 15
MAX_CACHED_GUIDES = 64
# Of the cached guides' sources together. A compiled guide has up to 300 bytes for each byte of its source.
MAX_CACHED_BYTES = 2**20
COMPILE_TIMEOUT_S = 20.0
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
        self._lock = threading.Lock()
        self._compiling: dict[tuple[str, str], Future[Guide]] = {}
        self._places = threading.Semaphore(MAX_CONCURRENT)
        self._num_running = 0

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
        if (cached := self._find(key)) is not None:
            return cached
        with self._lock:
            is_first = key not in self._compiling
            future = self._compiling.setdefault(key, Future())
        if is_first:
            self._start(key, future)
        try:
            compiled = future.result(COMPILE_TIMEOUT_S)
        except FutureTimeoutError:
            raise GuideError(f"the {key[0]} takes over {COMPILE_TIMEOUT_S:g} s to compile: simplify it") from None
        with self._lock:
            return compiled.copy()

    def is_cached(self, guide_type: str, guide: str) -> bool:
        """Return whether `compile` returns at once: the guide is cached, or refused for its type or size."""
        try:
            key = normalize(guide_type, guide)
        except GuideError:
            return True
        with self._lock:
            return key in self._cache

    def _find(self, key: tuple[str, str]) -> Guide | None:
        with self._lock:
            cached = self._cache.get(key)
            if cached is None:
                return None
            self._cache.move_to_end(key)
            return cached.copy()

    def _start(self, key: tuple[str, str], future: Future[Guide]) -> None:
        """Compile on a thread with a large stack, whose outcome goes to `future`.

        llguidance can't be interrupted: a guide that takes too long is compiled to its end, and is cached then.
        """

        def work() -> None:
            with self._lock:
                self._num_running += 1
                is_preferred = self._num_running <= NUM_PREFERRED
            lower_priority(NICENESS if is_preferred else OTHERS_NICENESS)
            try:
                compiled = self._compile(*key)
            except Exception as error:  # re-raised on the threads that wait for it
                self._end(key)
                future.set_exception(error)
            else:
                self._end(key, compiled)
                future.set_result(compiled)

        try:
            if not self._places.acquire(timeout=COMPILE_TIMEOUT_S):
                raise GuideError(f"other guides are still being compiled{RETRY}")
            try:
                _start_thread(work, COMPILE_STACK_BYTES)
            except BaseException:
                self._places.release()
                raise
        except BaseException as error:
            with self._lock:
                del self._compiling[key]
            future.set_exception(error)

    def _end(self, key: tuple[str, str], compiled: Guide | None = None) -> None:
        with self._lock:
            self._num_running -= 1
            del self._compiling[key]
            if compiled is not None:
                self._cache[key] = compiled
                while len(self._cache) > MAX_CACHED_GUIDES or sum(map(_num_bytes, self._cache)) > MAX_CACHED_BYTES:
                    self._cache.popitem(last=False)
        self._places.release()

    def _compile(self, guide_type: str, guide: str) -> Guide:
        """Compile a guide and compute its first mask, which reveals guides that are unsatisfiable or too complex."""
        compiled = Guide(self._vocabulary.matcher(GRAMMARS[guide_type](guide)), self._vocabulary)
        if compiled.error:
            raise GuideError(f"the {guide_type} is invalid: {compiled.error}")
        try:
            mask = compiled.mask()
        except GuideError as error:
            raise GuideError(f"the {guide_type} can't be used: {error}") from None
        if not (mask & ~self._vocabulary.end_mask).any():
            raise GuideError(f"the {guide_type} allows nothing but an empty text")
        return compiled


def _num_bytes(key: tuple[str, str]) -> int:
    return len(key[1].encode())


def _start_thread(target: Callable[[], None], stack_bytes: int) -> None:
    """Start a thread with a stack of `stack_bytes`.

    The stack size is a process-wide setting: another thread that starts at the same moment may get the large stack too.
    """
    default = threading.stack_size(stack_bytes)
    try:
        threading.Thread(target=target, name="guide compiler", daemon=True).start()
    finally:
        threading.stack_size(default)
