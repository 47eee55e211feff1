"""Hopper's own prefill attention compiles where there is no GPU; test_cuda_kernels.py runs it where there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", minversion="3.6")

# In a process of its own: the interpreter that other tests use can't be left.
COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from deepseek_triton.ensemble.engine.runners.cuda.kernels import hopper_attention

kernel, head_dim = hopper_attention.prefill_attention, int(sys.argv[1])
boxes = f"tensordesc<bf16{hopper_attention.BOX_SHAPE},{hopper_attention.BOX_LAYOUT!r}>".replace(", 64]", ",64]")
types = {name: boxes for name in kernel.arg_names if name.endswith("_boxes")}
types |= {"table": "*i32", "tiles": "*i32", "out": "*bf16", "extent": "i32", "scale": "fp32"}
constants = {"HEADS": 28, "KV_HEADS": 4, "D": head_dim, "PDL": True}
source = GluonASTSource(
    kernel,
    {name: types.get(name, "constexpr") for name in kernel.arg_names},
    constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
)
options = {"num_warps": hopper_attention.NUM_WARPS}
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
print(compiled.metadata.shared, "wgmma" in compiled.asm["ptx"], ".local" in compiled.asm["ptx"])
"""


@pytest.mark.parametrize("head_dim", [64, 128])
def test_it_compiles_for_hopper_within_its_shared_memory(head_dim: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(head_dim)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    shared, has_wgmma, has_local = done.stdout.splitlines()[0].split()
    assert int(shared) <= 227 * 1024 and has_wgmma == "True" and has_local == "False"
