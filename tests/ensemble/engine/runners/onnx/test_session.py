"""Denormals are zeros in a graph, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from deepseek_triton.ensemble.engine.runners.base import RunnerError
from deepseek_triton.ensemble.engine.runners.onnx import session as onnx_session
from deepseek_triton.ensemble.engine.runners.onnx.session import open_session, without_denormals

ROWS = 1 << 16  # so many that all threads of a session get some
needs_glibc = pytest.mark.skipif(onnx_session._LIBM is None, reason="needs glibc on x86-64")


def write_product(path: Path) -> None:
    """y = x * 0.5."""
    half = helper.make_tensor("half", TensorProto.FLOAT, [1], [0.5])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Mul", ["x", "half"], ["y"])], "g", [x], [y], [half])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)


def count_denormals(values: NDArray[np.float32]) -> int:
    """Read as integers: what compares floats may take denormals for zeros."""
    bits = values.view(np.uint32) & 0x7FFFFFFF
    return int(np.count_nonzero((bits > 0) & (bits < 0x00800000)))


@needs_glibc
def test_denormals_are_zeros_in_the_block_alone() -> None:
    tiny = np.full(64, 1e-40, np.float32)
    with without_denormals():
        inside = tiny * np.float32(0.5)
    assert count_denormals(inside) == 0
    assert count_denormals(tiny * np.float32(0.5)) == 64
    with pytest.raises(ZeroDivisionError), without_denormals():
        raise ZeroDivisionError
    assert count_denormals(tiny * np.float32(0.5)) == 64


@needs_glibc
def test_no_thread_of_a_session_computes_with_denormals(tmp_path: Path) -> None:
    write_product(tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx", 2)
    x = np.full(ROWS, 1e-40, np.float32)
    x[::7] = 3.0
    with without_denormals():
        (y,) = session.run(None, {"x": x})
    assert count_denormals(y) == 0 and np.array_equal(y[::7], np.full(len(y[::7]), 1.5, np.float32))


@needs_glibc
def test_a_process_keeps_its_denormals_after_its_first_session(tmp_path: Path) -> None:
    write_product(tmp_path / "model.onnx")
    code = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from deepseek_triton.ensemble.engine.runners.onnx.session import open_session\n"
        "open_session(Path(sys.argv[1]), 2)\n"
        "print((np.full(8, 1e-40, np.float32) * np.float32(0.5)).view(np.uint32).any())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.onnx")], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_a_file_that_is_no_graph_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("no graph")
    with pytest.raises(RunnerError, match=r"model.onnx can't be loaded by ONNX Runtime"):
        open_session(tmp_path / "model.onnx", 1)


def test_elsewhere_the_block_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_session, "_LIBM", None)
    with without_denormals():
        inside = np.full(8, 1e-40, np.float32) * np.float32(0.5)
    assert count_denormals(inside) == 8
