"""The sandbox that chat templates run in."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


def make_environment() -> ImmutableSandboxedEnvironment:
    """The environment that Hugging Face's templates expect."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def find_variables(parsed: jinja2.nodes.Template, environment: jinja2.Environment) -> set[str]:
    """Return the variables that a template expects, as jinja2.meta's function, which computes constants on the way.

    A constant such as `'x' * 10**10` would take this process's time and memory.
    """
    finder = _VariableFinder(environment)
    finder.visit(parsed)
    return finder.undeclared_identifiers


class _VariableFinder(jinja2.meta.TrackingCodeGenerator):
    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.optimizer = None

    def _output_child_to_const(self, *_: Any) -> str:
        raise jinja2.nodes.Impossible

    def visit_EvalContextModifier(  # noqa: N802  # jinja2's name
        self, node: jinja2.nodes.EvalContextModifier, frame: jinja2.compiler.Frame
    ) -> None:
        for option in node.options:
            self.visit(option.value, frame)


class _GenerationTag(jinja2.ext.Extension):
    """The tag `{% generation %}`, which marks the assistant's text for training. It renders its body."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes HTML; models are trained on JSON without such escapes.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
