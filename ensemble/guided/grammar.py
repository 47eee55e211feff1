"""Converts a client's guide to an llguidance grammar, with one function per guide type.

Guides are untrusted: their size is checked before they are parsed, and so are costs that llguidance doesn't limit.
llguidance itself validates the grammar and enforces the other limits (see compiler.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

from deepseek_triton.ensemble.guided.errors import GuideError
from deepseek_triton.ensemble.protocol.request_options import GUIDE_TYPES
from deepseek_triton.ensemble.text.errors import one_line

MAX_GUIDE_BYTES = {"json_schema": 64 * 1024, "regex": 16 * 1024, "grammar": 64 * 1024, "choice": 16 * 1024}
MAX_EBNF_LEN = 16 * 1024  # characters; the conversion to Lark is Python code, quadratic in the number of rules
MAX_MULTIPLE = 100_000  # least common multiple of a schema's multipleOf values

# Bounded, because small models may generate white space endlessly if all other allowed tokens are unlikely.
WHITESPACE = r"[ \n\r\t]{1,32}"
_ANY_OBJECT = '{"type":"object"}'


def normalize(guide_type: str, guide: str) -> tuple[str, str]:
    """Resolve the aliases of the guide type and check the guide's size; returns (type, guide).

    Raises:
        GuideError: the type is unknown, or the guide is empty or too long.
    """
    if guide_type not in GUIDE_TYPES:
        raise GuideError(f"guided_decoding_guide_type is {guide_type[:40]!r}, must be one of {', '.join(GUIDE_TYPES)}")
    if guide_type == "json":
        return "json_schema", _ANY_OBJECT
    if guide_type == "ebnf_grammar":
        guide_type = "grammar"
    try:
        size = len(guide.encode("utf-8"))
    except UnicodeEncodeError:
        raise GuideError(f"the {guide_type} holds a lone surrogate: write the whole character") from None
    if not guide:
        raise GuideError(f"guided_decoding_guide is empty: send a {guide_type}")
    if size > MAX_GUIDE_BYTES[guide_type]:
        raise GuideError(f"the {guide_type} has {size} bytes, must have at most {MAX_GUIDE_BYTES[guide_type]}")
    return guide_type, guide


def _from_schema(guide: str) -> str:
    import llguidance

    schema = _parse_json(guide, "json_schema")
    if not isinstance(schema, dict):
        raise GuideError("the json_schema must be a JSON object")
    _check_multiples(schema)
    try:
        return llguidance.LLMatcher.grammar_from_json_schema(
            json.dumps(schema), defaults={"whitespace_pattern": WHITESPACE, "lenient": False}
        )
    except ValueError as error:  # a lone surrogate
        raise GuideError(f"the json_schema is invalid: {one_line(error)}") from error


def _from_regex(guide: str) -> str:
    import llguidance

    return llguidance.LLMatcher.grammar_from_regex(guide)


def _from_grammar(guide: str) -> str:
    import llguidance
    from llguidance.gbnf_to_lark import any_to_lark, is_lark_syntax

    for match in re.finditer(r"%(?:json|regex)\s*", guide):
        try:
            inline, _ = json.JSONDecoder(parse_float=_finite).raw_decode(guide, match.end())
        except (ValueError, RecursionError):
            continue  # llguidance reports invalid JSON, unless this is in a comment or a string
        _check_multiples(inline)
    if not is_lark_syntax(guide) and len(guide) > MAX_EBNF_LEN:
        raise GuideError(f"the EBNF grammar has {len(guide)} characters, must have at most {MAX_EBNF_LEN}")
    try:
        return llguidance.LLMatcher.grammar_from_lark(any_to_lark(guide))
    except Exception as error:  # the converter raises bare Exception
        raise GuideError(f"the grammar is neither Lark nor EBNF: {one_line(error)[:300]}") from error


def _from_choice(guide: str) -> str:
    import llguidance

    texts = _parse_json(guide, "choice")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise GuideError('the choice must be a JSON list of at least one string, as in ["yes", "no"]')
    return llguidance.LLMatcher.grammar_from_regex("|".join(map(_literal, dict.fromkeys(texts))))


GRAMMARS: dict[str, Callable[[str], str]] = {
    "json_schema": _from_schema, "regex": _from_regex, "grammar": _from_grammar, "choice": _from_choice,
}  # fmt: skip


def _literal(text: str) -> str:
    """Return a regex that matches exactly this text."""
    return re.sub(r"[^0-9A-Za-z]", lambda match: rf"\x{{{ord(match[0]):x}}}", text)


def _parse_json(guide: str, guide_type: str) -> Any:
    try:
        return json.loads(guide, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise GuideError(f"the {guide_type} is not JSON: {one_line(error)}") from None


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is not a finite number")
    return value


def _check_multiples(schema: Any) -> None:
    """Bound the size of the automaton for multipleOf.

    It has a state for each remainder of the values' least common multiple, since `allOf` may combine them.

    Raises:
        GuideError: the least common multiple is above MAX_MULTIPLE.
    """
    multiple = 1
    for value in _values_of(schema, "multipleOf"):
        if isinstance(value, int | float) and value:
            digits = Decimal(str(value)).normalize().as_tuple().digits
            multiple = math.lcm(multiple, int("".join(map(str, digits))))
            if multiple > MAX_MULTIPLE:
                raise GuideError(f"multipleOf is {value}: it needs too many states, use a rounder number")


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
