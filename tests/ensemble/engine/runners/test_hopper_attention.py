"""Hopper's own prefill attention compiles where there is no GPU; test_cuda_kernels.py runs it where there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")

from deepseek_triton.ensemble.engine.runners.cuda.attention import has_gluon  # noqa: E402  # after triton

# In a process of its own: the interpreter that other tests use can't be left.
COMPILE = r"""
import re
import subprocess
import sys
import tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton import knobs
from deepseek_triton.ensemble.engine.runners.cuda.attention import PREFILL_TILE
from deepseek_triton.ensemble.engine.runners.cuda.kernels import hopper_attention

assert PREFILL_TILE == 2 * hopper_attention.GROUP.value
assert hopper_attention.BLOCK.value == 2 * hopper_attention.PAGE.value == 2 * hopper_attention.BOX.value
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
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(compiled.asm["cubin"])
    file.flush()
    used = subprocess.check_output([knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name], text=True)
print(compiled.metadata.shared, "wgmma" in compiled.asm["ptx"], *re.findall(r"(?:STACK|LOCAL):\d+", used))
"""


@pytest.mark.skipif(not has_gluon(triton.__version__), reason="another version of Triton")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_it_compiles_for_hopper_within_its_shared_memory(head_dim: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(head_dim)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    shared, *others = done.stdout.splitlines()[0].split()
    assert int(shared) <= 227 * 1024 and others == ["True", "STACK:0", "LOCAL:0"], "no register is spilled"


def test_other_versions_of_triton_take_the_kernel_for_all_gpus() -> None:
    known = {version: has_gluon(version) for version in ("3.5.1", "3.6.0", "3.8.0+git1", "3.9.0", "3.10.0", "4.0.0")}
    assert known == {version: version in ("3.6.0", "3.8.0+git1") for version in known}
