"""Python's sources as syntax trees."""

from __future__ import annotations

import ast
import gc


def parse_source(source: str) -> ast.Module:
    """The syntax tree of a module's source text.

    Python 3.11 keeps one depth for all threads while it makes a tree: a collection in the middle, which lets another
    thread parse, ends in "AST constructor recursion depth mismatch" (github.com/python/cpython/issues/106905).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        if enabled:
            gc.enable()
