"""Guides: every choice of allowed tokens is valid, every valid text is allowed, bad guides are refused."""

from __future__ import annotations

import ast
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deepseek_triton.ensemble.guided import (
    GUIDE_TYPES,
    Guide,
    GuideCompiler,
    GuideError,
    MaskThreads,
    apply_mask,
    compiler,
)
from deepseek_triton.ensemble.guided.grammar import GRAMMARS
from deepseek_triton.ensemble.text.tokenizer import Tokenizer
from tests.support.real_tokenizers import deepseek, deepseek_directory, smollm2, smollm2_directory
from tests.support.waiting import until

PADDING = 70  # ids that the model has and the tokenizer lacks; no multiple of 32
CLOSE_AFTER = 40  # tokens of free choice; from there on a walk takes what brings the end nearer
MAX_TOKENS = 600
CLOSERS = ('"', "}", "]", ":", ",")


@dataclass(frozen=True)
class Model:
    tokenizer: Tokenizer
    compiler: GuideCompiler
    vocab_size: int
    end_ids: tuple[int, ...]
    never: NDArray[np.int64]  # neither text nor an end
    closers: tuple[int, ...]

    def token(self, text: str) -> int:
        index = self.tokenizer._backend.token_to_id(text)
        assert index is not None
        return index


@cache
def model(name: str) -> Model:
    tokenizer, directory = {"deepseek": (deepseek, deepseek_directory), "smollm2": (smollm2, smollm2_directory)}[name]
    text, path = tokenizer(), directory()
    assert text.eos_id is not None
    end_ids = (text.eos_id,) if name == "deepseek" else (text.eos_id, 0)  # <|endoftext|> ends SmolLM2 too
    added = json.loads((path / "tokenizer.json").read_text())["added_tokens"]
    markers = {token["id"] for token in added if token["special"] or token["content"].startswith("<")}
    vocab_size = text.vocab_size + PADDING
    return Model(
        text,
        GuideCompiler(path, vocab_size, end_ids),
        vocab_size,
        end_ids,
        np.array(sorted((markers | set(range(text.vocab_size, vocab_size))) - set(end_ids))),
        tuple(text._backend.encode(closer, add_special_tokens=False).ids[0] for closer in CLOSERS),
    )


MODELS = ["deepseek", "smollm2"]
both = pytest.mark.parametrize("name", MODELS)


def allowed_bits(model: Model, guide: Guide) -> NDArray[np.uint8]:
    """For each token whether it is allowed."""
    mask = guide.mask()
    assert mask.dtype == np.uint32 and mask.shape == (-(-model.vocab_size // 32),)
    return np.unpackbits(mask.view(np.uint8), bitorder="little")


def allowed(model: Model, *guides: Guide) -> list[set[int]]:
    """For each guide the tokens that are allowed."""
    return [set(np.flatnonzero(allowed_bits(model, guide)).tolist()) for guide in guides]


def walk(model: Model, guide: Guide, seed: int) -> str:
    """The text of tokens chosen uniformly among those allowed, until the end; every promise is checked on the way."""
    random = np.random.default_rng(seed)
    tokens: list[int] = []
    while len(tokens) < MAX_TOKENS:
        bits = allowed_bits(model, guide)
        choices = np.flatnonzero(bits)
        ends = {token for token in model.end_ids if bits[token]}
        assert choices.size and not bits[model.never].any()
        assert guide.is_satisfied == bool(ends) and len(ends) in (0, len(model.end_ids))
        assert guide.is_complete == (choices.size == len(ends))
        token = int(random.choice(choices))
        if len(tokens) > CLOSE_AFTER:
            token = next((t for t in (*model.end_ids, *model.closers) if bits[t]), token)
        guide.accept(token)
        if token in ends:
            assert guide.is_complete and allowed(model, guide) == [set(model.end_ids)]
            return model.tokenizer.decode(tokens)
        tokens.append(token)
    raise AssertionError(f"no end after {MAX_TOKENS} tokens: {model.tokenizer.decode(tokens)[-100:]!r}")


def accepts(model: Model, guide: Guide, text: str) -> bool:
    """Does the guide allow this text, token by token, and then the end?"""
    for token in model.tokenizer._backend.encode(text, add_special_tokens=False).ids:
        if not allowed_bits(model, guide)[token]:
            return False
        guide.accept(token)
    return guide.is_satisfied


def can_write(model: Model, guide: Guide, text: str) -> bool:
    """Is there a way of allowed tokens to this text? For guides that allow few; the tokenizer would go another way."""
    decode, rest = model.compiler._vocabulary._tokenizer.decode_bytes, text.encode()
    while rest:
        pieces = {decode([token]): token for token in allowed(model, guide)[0] - set(model.end_ids)}
        fitting = [piece for piece in pieces if rest.startswith(piece)]
        if not fitting:
            return False
        longest = max(fitting, key=len)
        guide.accept(pieces[longest])
        rest = rest[len(longest) :]
    return guide.is_satisfied


def can_spell(model: Model, texts: Sequence[str]) -> bool:
    """SmolLM2's vocabulary lacks some bytes of rare characters."""
    return all(model.tokenizer.decode(model.tokenizer._backend.encode(text).ids) == text for text in texts)


def exact(text: str) -> Any:
    return json.loads(text, parse_float=Decimal)


def assert_valid(text: str, schema: Any) -> None:
    # Decimal: a walk writes 0.999… with more digits than a float holds
    jsonschema.Draft202012Validator(exact(json.dumps(schema))).validate(exact(text))


# --- what is generated is valid -------------------------------------------------------------------------------------

NAMES = st.text("abc é中_", min_size=1, max_size=4)
INTEGERS = st.integers(-2000, 2000)
BOUNDS = st.tuples(INTEGERS, INTEGERS).map(sorted)
LENGTHS = st.tuples(st.integers(0, 4), st.integers(0, 4)).map(sorted)
SCALARS = st.none() | st.booleans() | INTEGERS | st.decimals(-99, 99, places=2).map(float) | st.text(max_size=6)
UTF8_SCALARS = SCALARS.filter(lambda value: not re.search("[\ud800-\udfff]", str(value)))
LEAVES = st.one_of(
    st.builds(lambda b: {"type": "integer", "minimum": b[0], "maximum": b[1]}, BOUNDS),
    st.builds(lambda b: {"type": "number", "exclusiveMinimum": b[0], "exclusiveMaximum": b[1] + 1}, BOUNDS),
    st.builds(lambda n: {"type": "integer", "multipleOf": n}, st.integers(1, 30)),
    st.builds(lambda b: {"type": "string", "minLength": b[0], "maxLength": b[1]}, LENGTHS),
    st.sampled_from(["^[a-f]{2,5}$", "^(foo|bar)-[0-9]+$", "^(é|中){1,3}$", "^$"]).map(
        lambda p: {"type": "string", "pattern": p}
    ),
    st.lists(UTF8_SCALARS, min_size=1, max_size=4, unique_by=repr).map(lambda values: {"enum": values}),
    UTF8_SCALARS.map(lambda value: {"const": value}),
    st.sampled_from([{"type": "null"}, {"type": ["boolean", "null"]}, {"type": "number"}, {"type": "string"}]),
)


def _objects(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(NAMES, children, min_size=1, max_size=4)
    closed = st.just({"additionalProperties": False}) | children.map(lambda child: {"additionalProperties": child})
    return st.builds(
        lambda members, is_required, rest: {
            "type": "object", "properties": members, "required": list(members)[::2] if is_required else [], **rest,
        },
        properties, st.booleans(), closed,
    )  # fmt: skip


def _arrays(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(lambda c, n: {"type": "array", "items": c, "minItems": n[0], "maxItems": n[1]}, children, LENGTHS)


def _any_of(schemas: list[Any]) -> dict[str, Any]:
    return {"anyOf": schemas}


SCHEMAS = st.recursive(
    LEAVES,
    lambda children: _objects(children) | _arrays(children) | st.lists(children, min_size=2, max_size=3).map(_any_of),
    max_leaves=8,
)


EXAMPLES = settings(max_examples=40)


@pytest.mark.slow
@both
@EXAMPLES
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_every_walk_under_a_schema_validates(name: str, schema: Any, seed: int) -> None:
    assume(can_spell(model(name), [json.dumps(schema, ensure_ascii=False)]))
    guide = model(name).compiler.compile("json_schema", json.dumps(schema))
    assert_valid(walk(model(name), guide, seed), schema)


TREE = {
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}},
            },
            "required": ["value"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/tree",
}


@pytest.mark.slow
@both
@pytest.mark.parametrize("seed", range(5))
def test_recursive_schemas_and_plain_json(name: str, seed: int) -> None:
    compile = model(name).compiler.compile
    assert_valid(walk(model(name), compile("json_schema", json.dumps(TREE)), seed), TREE)
    assert isinstance(json.loads(walk(model(name), compile("json", "ignored"), seed)), dict)


ATOMS = st.sampled_from(["a", "Z", "[0-9]", "[^a-z\n]", "é", "中", r"\.", r"\n", " ", "[b-dé]", "😀", "(?:ab|c)"])
REGEXES = st.recursive(
    ATOMS,
    lambda parts: st.one_of(
        st.lists(parts, min_size=1, max_size=4).map("".join),
        st.lists(parts, min_size=2, max_size=3).map(lambda some: f"(?:{'|'.join(some)})"),
        st.tuples(parts, st.sampled_from(["?", "{1,3}", "{2}", "{0,2}"])).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    ),
    max_leaves=8,
)


@pytest.mark.slow
@both
@EXAMPLES
@given(regex=REGEXES, seed=st.integers(0, 2**32))
def test_every_walk_under_a_regex_matches_as_a_whole(name: str, regex: str, seed: int) -> None:
    text = walk(model(name), model(name).compiler.compile("regex", regex), seed)
    assert re.fullmatch(regex, text), f"{regex!r} made {text!r}"


TEXTS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), min_size=1, max_size=6)


@pytest.mark.slow
@both
@EXAMPLES
@given(texts=TEXTS, seed=st.integers(0, 2**32))
def test_every_walk_under_a_choice_is_one_of_the_texts(name: str, texts: list[str], seed: int) -> None:
    assume(can_spell(model(name), texts))
    compile = model(name).compiler.compile
    assert walk(model(name), compile("choice", json.dumps(texts)), seed) in texts
    assert all(can_write(model(name), compile("choice", json.dumps(texts)), text) for text in texts)


ARITHMETIC = {
    "grammar": 'start: sum\nsum: term (("+" | "-") term)*\nterm: NUMBER | "(" sum ")"\nNUMBER: /[1-9][0-9]{0,3}/\n',
    "ebnf_grammar": """root ::= sum
sum ::= term (("+" | "-") term)*
term ::= number | "(" sum ")"
number ::= [1-9] [0-9]{0,3}
""",
}


@pytest.mark.slow
@both
@pytest.mark.parametrize("guide_type", ARITHMETIC)
def test_every_walk_under_a_grammar_parses(name: str, guide_type: str) -> None:
    the, closer = model(name), model(name).token(")")
    with_closer = Model(**{**the.__dict__, "closers": (closer, the.token("7"))})
    for seed in range(10):
        text = walk(with_closer, the.compiler.compile(guide_type, ARITHMETIC[guide_type]), seed)
        assert re.fullmatch(r"[-+()0-9]+", text) and ast.parse(text, mode="eval"), text


# --- what is valid is allowed ---------------------------------------------------------------------------------------

KEYS = st.text('abé"\\\n', max_size=4)
DOCUMENTS = st.recursive(
    UTF8_SCALARS,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(KEYS, children, max_size=4),
    max_leaves=12,
)


@pytest.mark.slow
@both
@EXAMPLES
@given(document=st.dictionaries(st.sampled_from("abc"), DOCUMENTS), indent=st.sampled_from([None, 2]))
def test_any_object_is_json(name: str, document: Any, indent: int | None) -> None:
    text = json.dumps(document, ensure_ascii=False, indent=indent)
    assume("\x7f" not in text and can_spell(model(name), [text]))  # the library wants DEL escaped
    assert accepts(model(name), model(name).compiler.compile("json", ""), text)


ORDER = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1},
        "state": {"enum": ["open", "closed"]},
        "lines": {"type": "array", "items": {"$ref": "#/$defs/line"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["id", "state", "lines"],
    "additionalProperties": False,
    "$defs": {
        "line": {
            "type": "object",
            "properties": {
                "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
                "price": {"type": "number", "exclusiveMinimum": 0},
            },
            "required": ["sku", "price"],
            "additionalProperties": False,
        }
    },
}
LINE = '{"sku": "ABC-0123", "price": 9.5}'


@both
@pytest.mark.parametrize(
    ("text", "is_valid"),
    [
        (f'{{"id": 7, "state": "open", "lines": [{LINE}]}}', True),
        (f'{{\n  "id": 7,\n  "state": "closed",\n  "lines": [\n    {LINE},\n    {LINE}\n  ]\n}}', True),
        (f'{{"id":7,"state":"open","lines":[{LINE},{LINE},{LINE}]}}', True),
        (f'{{"id": 0, "state": "open", "lines": [{LINE}]}}', False),
        (f'{{"id": 7, "state": "shut", "lines": [{LINE}]}}', False),
        ('{"id": 7, "state": "open", "lines": []}', False),
        (f'{{"id": 7, "state": "open", "lines": [{LINE},{LINE},{LINE},{LINE}]}}', False),
        (f'{{"id": 7, "state": "open", "lines": [{LINE.replace("ABC", "AB")}]}}', False),
        (f'{{"id": 7, "state": "open", "lines": [{LINE.replace("9.5", "0")}]}}', False),
        (f'{{"id": 7, "state": "open", "lines": [{LINE}], "more": 1}}', False),
        (f'{{"id": 7, "lines": [{LINE}]}}', False),
        (f'{{"id": 7, "state": "open", "lines": [{LINE}]', False),
        (f'{{"id": 7, "state": "open", "lines": [{LINE}]}} ', False),
    ],
)
def test_documents_of_a_schema(name: str, text: str, is_valid: bool) -> None:
    assert accepts(model(name), model(name).compiler.compile("json_schema", json.dumps(ORDER)), text) == is_valid


def test_blanks_do_not_go_on_for_ever() -> None:
    guide = model("smollm2").compiler.compile("json", "")
    newline = model("smollm2").tokenizer._backend.encode("\n").ids[0]
    guide.accept(model("smollm2").token("{"))
    for _ in range(32):
        guide.accept(newline)
    with pytest.raises(GuideError, match="not allowed by the guide"):
        guide.accept(newline)


# --- one batch, many guides -----------------------------------------------------------------------------------------

MIXED = [
    ("json", ""),
    ("json_schema", json.dumps(ORDER)),
    ("regex", "[a-z ]{3,40}"),
    ("choice", '["yes", "no", "yesterday"]'),
    ("grammar", ARITHMETIC["grammar"]),
    ("json_schema", json.dumps(TREE)),
]


@pytest.mark.slow
@both
def test_guides_on_threads_have_the_masks_of_each_alone(name: str) -> None:
    the, random, threads = model(name), np.random.default_rng(3), MaskThreads()
    alone = [the.compiler.compile(*guide) for guide in MIXED * 4]
    together = [threads.guides(guide, 1)[0] for guide in alone]
    for _ in range(12):
        for guide, other in zip(alone, together, strict=True):
            mask = other.mask(timeout_s=60)
            assert mask is not None and (mask == guide.mask()).all()
        for guide, other in zip(alone, together, strict=True):
            if not guide.is_complete:
                token = int(random.choice(sorted(allowed(the, guide)[0] - set(the.end_ids))))
                guide.accept(token)
                other.accept(token)
    threads.close()


def test_a_copy_goes_its_own_way() -> None:
    the = model("smollm2")
    guide = the.compiler.compile("choice", '["ab", "ac", "b"]')
    a, b, c = (the.token(letter) for letter in "abc")
    guide.accept(a)
    copy = guide.copy()
    before = allowed(the, guide)
    copy.accept(b)
    copy.accept(the.end_ids[0])
    assert copy.is_complete and not guide.is_complete and allowed(the, guide) == before
    guide.accept(c)
    assert guide.is_complete and allowed(the, copy.copy()) == [set(the.end_ids)]
    assert accepts(the, the.compiler.compile("choice", '["ab", "ac", "b"]'), "b"), "the cached guide has moved"


def test_a_guide_that_is_stuck_has_no_token_and_disturbs_no_other() -> None:
    the = model("smollm2")
    good = the.compiler.compile("regex", "[a-z]+")
    stuck = the.compiler.compile("grammar", 'start: "a" <jupyter_text> "b"')  # a token that is no text
    stuck.accept(the.token("a"))
    with pytest.raises(GuideError, match="only special tokens"):
        stuck.mask()
    assert good.mask().any()
    with pytest.raises(GuideError, match="neither text nor an end"):
        stuck.accept(12)


def test_a_step_that_costs_too_much_is_an_error_not_a_hang() -> None:
    the, started = model("smollm2"), time.monotonic()
    a = the.token("a")
    with pytest.raises(GuideError, match="too many expressions"):
        the.compiler.compile("regex", "a?" * 200 + "a" * 200).accept(a)
    dear = the.compiler.compile("grammar", "start: " + "|".join(f'"a{number}"' for number in range(5000)))
    with pytest.raises(GuideError, match="5001 items") as error:
        dear.accept(a)
    good = the.compiler.compile("regex", "a+")
    assert "<" not in str(error.value) and not dear.is_complete
    with pytest.raises(GuideError, match="5001 items"):
        dear.mask()
    assert good.mask().any()
    assert time.monotonic() - started < 10


def test_what_accept_refuses() -> None:
    the = model("smollm2")
    a, b = (the.token(letter) for letter in "ab")
    for token in (b, 12, -1, the.vocab_size - 1, the.vocab_size, 10**9):
        with pytest.raises(GuideError, match=f"token {token} is not allowed by the guide"):
            the.compiler.compile("regex", "a{2}").accept(token)
    with pytest.raises(GuideError, match="came before the guide was satisfied"):
        the.compiler.compile("regex", "a{2}").accept(the.end_ids[0])
    guide = the.compiler.compile("regex", "a?")
    guide.accept(the.end_ids[1])
    with pytest.raises(GuideError, match="the guide has ended"):
        guide.accept(a)


@given(st.integers(1, 300), st.integers(0, 2**32))
def test_apply_mask_leaves_the_allowed_logits_alone(vocab_size: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    mask = random.integers(0, 2**32, -(-vocab_size // 32), dtype=np.uint32)
    logits = random.normal(size=vocab_size).astype(np.float32)
    expected = [x if int(mask[i // 32]) >> i % 32 & 1 else -np.inf for i, x in enumerate(logits)]
    apply_mask(logits, mask)
    assert logits.tolist() == expected


# --- what is refused ------------------------------------------------------------------------------------------------


def refuse(guide_type: str, guide: Any, match: str, **more: Any) -> Any:
    text = guide if isinstance(guide, str) else json.dumps(guide)
    return pytest.param(guide_type, text, match, id=f"{guide}"[:40], **more)


def refuse_after_work(guide_type: str, guide: str, match: str) -> Any:
    """A second's work for a thread that lets all others go first: on a busy machine it takes ten."""
    return refuse(guide_type, guide, match, marks=pytest.mark.timed)


@pytest.mark.parametrize(
    ("guide_type", "guide", "match"),
    [
        refuse("xml", "<a/>", "guided_decoding_guide_type is 'xml', must be one of json, json_schema, regex, grammar"),
        refuse("json_schema", "", "guided_decoding_guide is empty: send a json_schema"),
        refuse("regex", "", "empty"),
        refuse("json_schema", "{", "the json_schema is not JSON: Expecting"),
        refuse("json_schema", '{"minimum": NaN}', "NaN is not a finite number"),
        refuse("json_schema", '{"minimum": 1e999}', "1e999 is not a finite number"),
        refuse("json_schema", [], "must be a JSON object"),
        refuse("json_schema", {"type": "banana"}, "the json_schema is invalid: Invalid type: banana"),
        refuse("json_schema", {"not": {"type": "null"}}, 'Unimplemented keys: \\["not"\\]'),
        refuse("json_schema", {"type": "array", "uniqueItems": True}, 'Unimplemented keys: \\["uniqueItems"\\]'),
        refuse("json_schema", {"oneOf": [{"type": "integer"}, {"type": "number"}]}, "coerce_one_of"),
        refuse("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable schema"),
        refuse("json_schema", {"$ref": "#/$defs/missing"}, "'/\\$defs/missing' does not exist"),
        refuse("json_schema", {"$ref": "#"}, "no text satisfies it"),
        refuse("json_schema", {"$ref": "file:///etc/passwd"}, "does not fetch"),
        refuse("json_schema", {"type": "string", "pattern": "(?=a)b"}, "look-around"),
        refuse("json_schema", {"type": "string", "format": "banana"}, "Unknown format: banana"),
        refuse("json_schema", {"const": "\ud800"}, "the json_schema is invalid"),
        refuse("json_schema", {"description": "x" * 10**6}, "has 1000019 bytes, must have at most 65536"),
        refuse("json_schema", '{"items":' * 3000 + "{}" + "}" * 3000, "recursion"),
        refuse("json_schema", {"type": "integer", "multipleOf": 1000003}, "is 1000003: it needs too many states"),
        refuse("json_schema", {"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}, "it needs too many states"),
        refuse("regex", "(", "the regex is invalid: regex parse error: unclosed group$"),
        refuse("regex", r"(a)\1", "backreferences are not supported"),
        refuse("regex", r"[^\x00-\x{10FFFF}]", "the regex can't be used: no text satisfies it"),
        refuse_after_work("regex", "a?" * 5000 + "a" * 5000, "lexer"),
        refuse("regex", "(" * 5000 + "a" + ")" * 5000, "the regex is invalid"),
        refuse("regex", "a\ud800", "a lone surrogate"),
        refuse("regex", "()", "nothing but an empty text"),
        refuse("grammar", "start: foo", 'unknown name: "foo"'),
        refuse("grammar", "start: " + "(" * 9000 + '"a"' + ")" * 9000, "too deeply nested"),
        refuse_after_work(
            "grammar", "start: R0\n" + "".join(f"R{i}: R{i + 1} R{i + 1}\n" for i in range(29)) + 'R29: "b"', "big"
        ),
        refuse("grammar", 'start: %json {"type": "integer", "multipleOf": 1000003}', "it needs too many states"),
        refuse("grammar", 'start: %json {"$ref": "http://127.0.0.1/x"}', "does not fetch"),
        refuse("grammar", "start: start", "no text satisfies it"),
        refuse("grammar", "start: <jupyter_text>", "only special tokens"),
        refuse("grammar", 'start: a b\na[lazy]: /.*/\nb: "b"', "the guided decoding library can't handle it"),
        refuse("ebnf_grammar", 'root = "a"', "neither Lark nor EBNF: Expected ::="),
        refuse("ebnf_grammar", 'root ::= "' + "a" * 20000 + '"', "at most 16384"),
        refuse("choice", "yes", "the choice is not JSON"),
        refuse("choice", [], "a JSON list of at least one string"),
        refuse("choice", ["yes", 1], "a JSON list of at least one string"),
        refuse("choice", ["a" * 17000], "has 17004 bytes, must have at most 16384"),
        refuse("choice", [""], "nothing but an empty text"),
    ],
)  # fmt: skip
def test_bad_guides_are_refused_at_once_in_one_line(guide_type: str, guide: str, match: str) -> None:
    started = time.monotonic()
    with pytest.raises(GuideError, match=match) as error:
        model("smollm2").compiler.compile(guide_type, guide)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert time.monotonic() - started < 10


def test_a_remote_reference_is_not_fetched() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        schema = {"$ref": f"http://127.0.0.1:{server.getsockname()[1]}/schema.json"}
        with pytest.raises(GuideError, match="does not fetch"):
            model("smollm2").compiler.compile("json_schema", json.dumps(schema))
        with pytest.raises(TimeoutError):
            server.accept()


DEEP = """
import json, sys
from pathlib import Path
from deepseek_triton.ensemble.guided import GuideCompiler, GuideError
import numpy as np

compiler = GuideCompiler(Path(sys.argv[1]), int(sys.argv[2]), [2])
n = 1100
nested = {"$ref": "#/$defs/1"}
for _ in range(90):
    nested = {"items": nested}
guides = {
    "json_schema": [
        json.dumps({"$ref": "#/$defs/0", "$defs": {
            str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(2000)} | {"2000": {}}}),
        json.dumps({"$ref": "#/$defs/0", "$defs": {
            str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}, "type": "array"} for i in range(n)} | {str(n): {}}}),
        json.dumps({"$ref": "#/$defs/0", "$defs": {str(i): json.loads(
            json.dumps(nested).replace("/1", f"/{i + 1}")) for i in range(50)} | {"50": {}}}, separators=(",", ":")),
    ],
    "grammar": [
        "start: r0\\n" + "".join(f'r{i}:"a"r{i + 1}\\n' for i in range(4500)) + 'r4500:"b"',
        "start: r0\\n" + "".join(f'r{i}:r{i + 1}|"a"\\n' for i in range(4000)) + 'r4000:"b"',
        "start: R0\\n" + "".join(f'R{i}:"a"R{i + 1}\\n' for i in range(4500)) + 'R4500:"b"',
        "start: R0\\n" + "".join(f'R{i}:("a"R{i + 1})*\\n' for i in range(3500)) + 'R3500:"b"',
        "root ::= r0\\n" + "".join(f'r{i} ::= r{i + 1}\\n' for i in range(1000)) + 'r1000 ::= "b"',
    ],
}
for guide_type, several in guides.items():
    for number, guide in enumerate(several):
        try:
            compiled = compiler.compile(guide_type, guide)
            compiled.mask()
            print(guide_type, number, len(guide), "compiled")
        except GuideError as error:
            print(guide_type, number, len(guide), error)
"""


@pytest.mark.slow
def test_chains_of_rules_and_references_do_not_exhaust_the_stack() -> None:
    # in a process of its own: what went wrong would be a crash
    command = [sys.executable, "-c", DEEP, str(smollm2_directory()), str(model("smollm2").vocab_size)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("compiled") >= 6 and len(result.stdout.splitlines()) == 8, result.stdout


DEAR = """
import json, sys
from pathlib import Path
import numpy as np
from deepseek_triton.ensemble.guided import GuideCompiler, GuideError

def peak():
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

compiler = GuideCompiler(Path(sys.argv[1]), int(sys.argv[2]), [2])
guides = [
    ("regex", ".*a.{400}b"), ("regex", "((a{1,100}){1,100}){1,100}"), ("regex", ".*[a-m].{14}"),
    ("regex", r"[\\p{L}\\p{N}]{1,500}" * 20),
    ("json_schema", json.dumps({"const": list(range(9000))})),
    ("json_schema", json.dumps({"enum": [{"k": i, "v": "x" * 20} for i in range(1200)]})),
    ("json_schema", json.dumps({"properties": {f"p{i}": {"pattern": f".*[a-m].{{{10 + i % 9}}}"} for i in range(99)}})),
    ("json_schema", json.dumps({"$ref": "#/$defs/0", "$defs": {str(i): {"properties": {
        "a": {"$ref": f"#/$defs/{i + 1}"}, "b": {"$ref": f"#/$defs/{i + 1}"}}} for i in range(300)} | {"300": {}}})),
    ("grammar", "start: r0" + "".join(f'\\nr{i}: r{i + 1} r{i + 1} | "w{i}"' for i in range(1500)) + '\\nr1500: "z"'),
]
before, random = peak(), np.random.default_rng(0)
for guide_type, guide in guides:
    try:
        compiled = compiler.compile(guide_type, guide)
        for _ in range(80):
            mask = compiled.mask()
            if compiled.is_complete:
                break
            ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            compiled.accept(int(random.choice(ids[ids != 2])))
    except (GuideError, ValueError):
        pass
print(peak() - before)
"""


@pytest.mark.slow
def test_no_guide_needs_much_memory() -> None:
    command = [sys.executable, "-c", DEAR, str(smollm2_directory()), str(model("smollm2").vocab_size)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 200, "MiB of nine guides together"


@pytest.mark.slow
def test_guides_that_take_too_long_are_refused_and_hold_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def slow(guide: str) -> str:
        release.wait(10)
        raise GuideError("late")

    own = GuideCompiler(smollm2_directory(), model("smollm2").vocab_size, [2])
    monkeypatch.setattr(compiler, "COMPILE_TIMEOUT_S", 0.05)
    monkeypatch.setitem(GRAMMARS, "regex", slow)
    for number in range(compiler.MAX_CONCURRENT):
        if number:
            monkeypatch.setattr(compiler, "COMPILE_TIMEOUT_S", 5.0)
            assert own.compile("choice", f'["beside {number}"]')
            monkeypatch.setattr(compiler, "COMPILE_TIMEOUT_S", 0.05)
        for _ in range(2):  # the second waits for the first one's
            with pytest.raises(GuideError, match=r"takes over 0\.05 s to compile"):
                own.compile("regex", f"slow {number}")
    with pytest.raises(GuideError, match="other guides are still being compiled"):
        own.compile("choice", '["never seen"]')
    release.set()
    monkeypatch.undo()
    assert own.compile("choice", '["never seen"]') and own.is_cached("choice", '["never seen"]')
    assert not own.is_cached("choice", '["not yet"]')
    until(lambda: not own._compiling)


# --- the compiler ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_guides_are_kept_the_least_used_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    choice: Callable[[str], str] = GRAMMARS["choice"]

    def counting(guide: str) -> str:
        compiled.append(guide)
        return choice(guide)

    monkeypatch.setitem(GRAMMARS, "choice", counting)
    monkeypatch.setattr(compiler, "MAX_CACHED_GUIDES", 2)
    own = GuideCompiler(smollm2_directory(), model("smollm2").vocab_size, [2])
    a, b, c = '["a"]', '["b"]', '["c"]'
    for guide in (a, b, a, c, a, b):
        own.compile("choice", guide)
    assert compiled == [a, b, c, b]
    monkeypatch.setattr(compiler, "MAX_CACHED_BYTES", 6)  # one of these
    for guide in (a, c, a):
        own.compile("choice", guide)
    assert compiled == [a, b, c, b, c, a]


@pytest.mark.slow
def test_compiling_while_other_threads_compile_and_mask() -> None:
    the, failures = model("deepseek"), []
    expected = {guide: allowed(the, the.compiler.compile(*guide)) for guide in MIXED}

    def work(number: int) -> None:
        try:
            for guide in MIXED * 3:
                the.compiler.compile("regex", f"[a-z]{{{number},{number + 40}}}")
                assert allowed(the, the.compiler.compile(*guide)) == expected[guide]
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vocab_size", "end_ids", "match"),
    [
        (49152, [], "end_ids are \\[\\], must be at least one"),
        (49152, [49152], "each in 0 … 49151"),
        (49151, [2], "tokenizer.json.*49151"),
    ],
)
def test_a_compiler_for_another_model_is_refused(vocab_size: int, end_ids: Sequence[int], match: str) -> None:
    with pytest.raises(GuideError, match=match):
        GuideCompiler(smollm2_directory(), vocab_size, end_ids)


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"model": {"vocab": {}}}'])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(GuideError, match=r"tokenizer\.json can't be used for guided decoding"):
        GuideCompiler(tmp_path, 100, [1])


def test_the_types_are_those_of_the_documentation() -> None:
    assert GUIDE_TYPES == ("json", "json_schema", "regex", "grammar", "ebnf_grammar", "choice")


# --- real weights ---------------------------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "country": {"enum": ["France", "Spain", "Italy"]},
        "sights": {"type": "array", "items": {"type": "string", "maxLength": 30}, "minItems": 2, "maxItems": 2},
    },
    "required": ["city", "country", "sights"],
    "additionalProperties": False,
}


@pytest.mark.slow
def test_a_small_model_answers_by_the_schema(smollm2_repository: Path) -> None:
    from deepseek_triton.ensemble.engine.runners.onnx.runner import OnnxRunner

    the = model("smollm2")
    runner = OnnxRunner(smollm2_repository / "smollm2-engine" / "1" / "model.onnx", max_num_seqs=1)
    compiler = GuideCompiler(smollm2_directory(), runner.vocab_size, the.end_ids)
    question = [{"role": "user", "content": "What is the capital of France? Name two sights. Answer in JSON."}]
    ids = the.tokenizer.encode_messages(json.dumps(question)).astype(np.int64)
    guide, tokens = compiler.compile("json_schema", json.dumps(PERSON)), []
    logits = runner.prefill(0, ids, 0)
    free = int(logits.argmax())
    while not guide.is_complete:
        apply_mask(logits, guide.mask())
        token = int(logits.argmax())
        guide.accept(token)
        tokens.append(token)
        logits = runner.decode(np.array([token]), np.array([len(ids) + len(tokens) - 1]))[0]
    runner.close()
    text = the.tokenizer.decode(tokens)
    assert_valid(text, PERSON)
    assert free != tokens[0], "without the guide it would have begun otherwise"
    assert json.loads(text)["country"] == "France", text
