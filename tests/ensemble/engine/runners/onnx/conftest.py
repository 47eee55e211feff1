"""What the tests of compiled operators share."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest

from deepseek_triton.ensemble.engine.runners.onnx import operators


@pytest.fixture
def instructions() -> Iterator[Callable[[int], int]]:
    """Chooses what computes from now on; the test's end, the best again."""
    choose: Callable[[int], int] = ctypes.CDLL(str(operators.LIBRARY)).blocks_instructions
    yield choose
    choose(operators.AVX512)
