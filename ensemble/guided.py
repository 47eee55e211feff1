"""Structured output: which tokens a guide (a JSON schema, a regex, a grammar, a list) allows next.

What enters: a client's guide, and the tokens chosen so far. What leaves: bit masks over the model's vocabulary. It knows
tokenizer.json and the library llguidance; it knows nothing of logits' origin, of sampling, slots or Triton.

A client's guide is hostile until proven otherwise. Its size is bounded before anything reads it; the library bounds the
work of compiling it and of every step; what the library recurses over gets a stack that the longest guide can't exhaust;
a `$ref` never leaves the schema.
"""

from __future__ import annotations

import json
import queue
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ensemble.errors import one_line

if TYPE_CHECKING:
    import llguidance

GuideType = Literal["json", "json_schema", "regex", "grammar", "ebnf_grammar", "choice"]
GUIDE_TYPES: tuple[GuideType, ...] = get_args(GuideType)
Mask = NDArray[np.uint32]  # bit i of word j: is token 32 j + i allowed?

MAX_GUIDE_BYTES: dict[str, int] = {
    "json_schema": 64 * 1024,
    "regex": 16 * 1024,
    "grammar": 64 * 1024,
    "choice": 64 * 1024,
}
# The conversion of EBNF is Python, and quadratic in the number of rules.
MAX_EBNF_BYTES = 16 * 1024
MAX_MULTIPLE = 10_000  # of multipleOf: the automaton has a state for every remainder
MAX_CACHED_GUIDES = 64
COMPILE_TIMEOUT_S = 10.0
# The library recurses over chains of rules and references, up to 6 KiB of stack for 50 bytes of schema. Untouched pages
# cost nothing.
COMPILE_STACK_BYTES = 256 * 2**20
MAX_LEXER_STATES = 50_000  # of 1 to 2 kB each, for one guide

# Bounded: small models, when only whitespace and a token that they find unlikely are allowed, write blanks for ever.
WHITESPACE = r"[ \n\r\t]{1,32}"
_ANY_OBJECT = '{"type":"object"}'
_MAX_MESSAGE_LEN = 300
# For each byte of a mask, what to add to eight logits.
_ADDENDS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf)
_ADDENDS = _ADDENDS.astype(np.float32)


class GuideError(ValueError):
    """A guide can't be used, or the sequence left it; the message is one line for the client."""


class Guide:
    """What one sequence may still write. Not thread-safe; different guides may be used from different threads."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: _Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._has_ended = False

    def accept(self, token: int) -> None:
        """Go on behind `token`, the one that was chosen; an end token ends the guide.

        Raises:
            GuideError: the mask did not allow it; the guide is of no use any more.
        """
        if self._has_ended or not self._vocabulary.is_allowed(token):
            raise GuideError(f"token {token} is not allowed by the guide: {self._why_not()}")
        if token in self._vocabulary.end_ids:
            if not self._matcher.is_accepting():
                raise GuideError(f"end token {token} came before the guide was satisfied")
            self._has_ended = True
        elif not self._matcher.consume_token(token):
            raise GuideError(f"token {token} is not allowed by the guide: {_message(self._matcher)}")

    def copy(self) -> Guide:
        """An independent guide in the same state, for another sample of the same prompt."""
        copied = Guide(self._matcher.deep_copy(), self._vocabulary)
        copied._has_ended = self._has_ended
        return copied

    @property
    def is_satisfied(self) -> bool:
        """Whether the text so far is valid as it stands, so that an end token is allowed."""
        return self._has_ended or self._matcher.is_accepting()

    @property
    def is_complete(self) -> bool:
        """Whether only end tokens are allowed from here."""
        return self._has_ended or (self._matcher.is_stopped() and not self._matcher.is_error())

    def _why_not(self) -> str:
        return "it has ended" if self._has_ended else "neither text nor an end token"


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
        self._vocabulary = _Vocabulary.read(tokenizer_directory / "tokenizer.json", vocab_size, end_ids)
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
        key = _normalized(guide_type, guide)
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
        compiled = Guide(self._vocabulary.matcher(_GRAMMARS[guide_type](guide)), self._vocabulary)
        if compiled._matcher.is_error():
            raise GuideError(f"the {guide_type} is invalid: {_message(compiled._matcher)}")
        mask = np.zeros((1, self._vocabulary.num_words), np.uint32)
        for error in fill_masks([compiled], mask).values():
            raise GuideError(f"the {guide_type} can't be used: {error}")
        if not (mask[0] & ~self._vocabulary.end_mask).any():
            raise GuideError(f"the {guide_type} allows nothing but an empty text")
        return compiled


def fill_masks(guides: Sequence[Guide], out: Mask) -> dict[int, GuideError]:
    """Write what each guide allows into its row of `out` [len(guides), ceil(vocab_size / 32)]: one call for all.

    Args:
        guides: distinct ones, of one compiler.
        out: C-contiguous.

    Returns:
        For each guide that can't go on (nothing is allowed, or a step costs too much), its row and why; that row of
        `out` is all zeros. The others are not disturbed.
    """
    if not guides:
        return {}
    vocabulary = guides[0]._vocabulary
    if out.shape != (len(guides), vocabulary.num_words) or out.dtype != np.uint32 or not out.flags.c_contiguous:
        raise ValueError(f"out must be uint32 [{len(guides)}, {vocabulary.num_words}], C-contiguous")
    vocabulary.fill([guide._matcher for guide in guides], out)
    out &= vocabulary.allowed_mask
    errors = {}
    for row, (guide, is_any) in enumerate(zip(guides, out.any(axis=1), strict=True)):
        if guide._has_ended:
            out[row] = vocabulary.end_mask
        elif guide._matcher.is_error():  # the library then allows the end token
            errors[row] = GuideError(_message(guide._matcher))
        elif not is_any:
            errors[row] = GuideError("only tokens that are no text would satisfy it")
    for row in errors:
        out[row] = 0
    return errors


def apply_mask(logits: NDArray[np.float32], mask: Mask) -> None:
    """Set `logits` [vocab_size] to -inf, in place, where `mask` [ceil(vocab_size / 32)] has no bit."""
    logits += _ADDENDS.take(mask.view(np.uint8), axis=0).reshape(-1)[: len(logits)]


class _Vocabulary:
    """The tokenizer as the library wants it, with what is never allowed."""

    def __init__(self, tokenizer: llguidance.LLTokenizer, not_text: Collection[int], end_ids: Collection[int]) -> None:
        import llguidance

        self._tokenizer = tokenizer
        self._executor = llguidance.LLExecutor()
        self._limits = llguidance.LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        self.end_ids = frozenset(end_ids)
        self.num_words = -(-tokenizer.vocab_size // 32)
        ids = np.arange(self.num_words * 32)
        is_end = np.isin(ids, list(end_ids))
        is_text = ~np.isin(ids, list(not_text)) & (ids < tokenizer.vocab_size)
        self.end_mask: Mask = np.packbits(is_end, bitorder="little").view(np.uint32)
        self.allowed_mask: Mask = np.packbits(is_text | is_end, bitorder="little").view(np.uint32)

    @classmethod
    def read(cls, path: Path, vocab_size: int, end_ids: Collection[int]) -> _Vocabulary:
        import llguidance

        if not end_ids or min(end_ids) < 0 or max(end_ids) >= vocab_size:
            raise GuideError(f"end_ids are {sorted(end_ids)}, must be at least one, each in 0 … {vocab_size - 1}")
        try:
            source = json.loads(path.read_text(encoding="utf-8"))
            added = {token["id"]: token for token in source.get("added_tokens") or []}
            num_known = max([*source["model"]["vocab"].values(), *added]) + 1
            for token in added.values():
                # DeepSeek's <think> and tool markers are not "special", so that they show in a decoded text; but no
                # string of a JSON document may hold one.
                token["special"] = token["special"] or bool(re.fullmatch(r"<.+>", token["content"], re.DOTALL))
            source["truncation"] = source["padding"] = None
            tokenizer = llguidance.LLTokenizer(json.dumps(source), n_vocab=vocab_size, eos_token=sorted(end_ids))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise GuideError(f"{path} can't be used for guided decoding: {one_line(error)}") from error
        if num_known > vocab_size:
            raise GuideError(f"{path} has ids up to {num_known - 1}, the model has {vocab_size}")
        not_text = [index for index, token in added.items() if token["special"]]
        return cls(tokenizer, [*not_text, *range(num_known, vocab_size)], end_ids)

    def is_allowed(self, token: int) -> bool:
        """Is it text or an end token?"""
        return 0 <= token < self.num_words * 32 and bool(self.allowed_mask[token >> 5] >> np.uint32(token & 31) & 1)

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """Never raises for a bad grammar: ask `is_error`."""
        import llguidance

        return llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)

    def fill(self, matchers: Sequence[llguidance.LLMatcher], out: Mask) -> None:
        """One mask for each matcher; the library works without the GIL, on several cores where there are."""
        rows = [(matcher, row) for row, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(rows, out.ctypes.data, self.num_words * 4, len(rows))


def _normalized(guide_type: str, guide: str) -> tuple[str, str]:
    """The type without its alias, and the guide, of bounded size and valid in itself."""
    if guide_type not in GUIDE_TYPES:
        raise GuideError(f"guided_decoding_guide_type is {guide_type[:40]!r}, must be one of {', '.join(GUIDE_TYPES)}")
    if guide_type == "json":
        return "json_schema", _ANY_OBJECT
    if guide_type == "ebnf_grammar":
        guide_type = "grammar"
    try:
        size = len(guide.encode("utf-8"))
    except UnicodeEncodeError:
        raise GuideError(f"the {guide_type} holds half a surrogate pair: write the character whole") from None
    if not guide.strip():
        raise GuideError(f"guided_decoding_guide is empty: send a {guide_type}")
    if size > MAX_GUIDE_BYTES[guide_type]:
        raise GuideError(f"the {guide_type} has {size} bytes, at most {MAX_GUIDE_BYTES[guide_type]} are allowed")
    return guide_type, guide


def _from_schema(guide: str) -> str:
    import llguidance

    schema = _parse_json(guide, "json_schema")
    _check_multiples(schema)
    return llguidance.LLMatcher.grammar_from_json_schema(
        json.dumps(schema), defaults={"whitespace_pattern": WHITESPACE, "lenient": False}
    )


def _from_regex(guide: str) -> str:
    import llguidance

    return llguidance.LLMatcher.grammar_from_regex(guide)


def _from_grammar(guide: str) -> str:
    import llguidance
    from llguidance.gbnf_to_lark import any_to_lark, is_lark_syntax

    for match in re.finditer(r"%(?:json|regex)\s*", guide):
        try:
            inline, _ = json.JSONDecoder().raw_decode(guide, match.end())
        except (ValueError, RecursionError):
            continue  # the library will say so, unless it stands in a comment or a string
        _check_multiples(inline)
    if not is_lark_syntax(guide) and len(guide) > MAX_EBNF_BYTES:
        raise GuideError(f"the EBNF grammar has {len(guide)} characters, at most {MAX_EBNF_BYTES} are allowed")
    try:
        return llguidance.LLMatcher.grammar_from_lark(any_to_lark(guide))
    except Exception as error:  # the converter raises bare Exception
        raise GuideError(f"the grammar is neither Lark nor EBNF: {one_line(error)[:_MAX_MESSAGE_LEN]}") from error


def _from_choice(guide: str) -> str:
    import llguidance

    texts = _parse_json(guide, "choice")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise GuideError('the choice must be a JSON list of at least one string, as in ["yes", "no"]')
    return llguidance.LLMatcher.grammar_from_regex("|".join(map(_literal, dict.fromkeys(texts))))


_GRAMMARS: dict[str, Callable[[str], str]] = {
    "json_schema": _from_schema, "regex": _from_regex, "grammar": _from_grammar, "choice": _from_choice,
}  # fmt: skip


def _literal(text: str) -> str:
    """A regex for exactly this text."""
    return re.sub(r"[^0-9A-Za-z]", lambda match: rf"\x{{{ord(match[0]):x}}}", text)


def _parse_json(guide: str, guide_type: str) -> Any:
    try:
        return json.loads(guide, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise GuideError(f"the {guide_type} is not JSON: {one_line(error)}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_multiples(schema: Any) -> None:
    for value in _values_of(schema, "multipleOf"):
        if isinstance(value, int | float) and value:
            digits = int("".join(map(str, Decimal(str(value)).normalize().as_tuple().digits)))
            if digits > MAX_MULTIPLE:
                raise GuideError(
                    f"multipleOf is {value}: at most {MAX_MULTIPLE}, times a power of ten, can be enforced"
                )


def _values_of(schema: Any, key: str) -> Iterator[Any]:
    pending = [schema]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            if key in node:
                yield node[key]
            pending.extend(node.values())
        elif isinstance(node, list):
            pending.extend(node)


def _start_thread(target: Callable[[], None], stack_bytes: int) -> None:
    """The size is a setting of the whole process: a thread that starts elsewhere meanwhile gets more than it needs."""
    default = threading.stack_size(stack_bytes)
    try:
        threading.Thread(target=target, name="guide compiler", daemon=True).start()
    finally:
        threading.stack_size(default)


def _message(matcher: llguidance.LLMatcher) -> str:
    """Why it is in error, in one line: the library adds its state and, behind a panic, a backtrace."""
    text = re.split(r"\n<(?:state|backtrace)>", matcher.get_error())[0]
    if text.startswith("NoExtension") or not text:
        return "no text satisfies it"
    if text.startswith("panic"):
        return "it is beyond what the library can do"
    regex_error = re.search(r"regex parse error:.*\nerror: (.+)", text, re.DOTALL)
    if regex_error:
        text = f"regex parse error: {regex_error[1]}"
    return one_line(ValueError(text))[:_MAX_MESSAGE_LEN]
