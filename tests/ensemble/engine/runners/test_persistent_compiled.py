"""The persistent kernels as NVRTC compiles them for Hopper, which needs no GPU: a C++ compiler's is another language.

Their speed depends on what is held here (benchmarks/decode_gpu_notes.md): a layer's instructions must fit into a cache,
and neither may registers be spilled nor a warpgroup's products wait for each other.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.engine.runners.cuda.driver import KernelError
from deepseek_triton.ensemble.engine.runners.cuda.nvrtc import compile_source, options_for
from deepseek_triton.ensemble.engine.runners.cuda.persistent.dense import DenseFamily
from deepseek_triton.ensemble.engine.runners.cuda.persistent.family import INSTRUCTIONS, SOURCES
from deepseek_triton.ensemble.engine.runners.cuda.persistent.latent import LatentFamily

pytestmark = pytest.mark.slow
RESULTS = Path(__file__).parents[4] / "benchmarks" / "results"
CAPABILITY, BLOCKS, SHARED_LIMIT = (9, 0), 132, 232448  # of an H100 or H200
# Bytes of the image, some more than were measured
MOST_BYTES = {"decode-gpu-v2-lite.json": 185_000, "decode-gpu-h200.json": 180_000}


def compiled(shape: DecoderShape, *, is_fp8: bool) -> tuple[bytes, str]:
    """The image of a shape's kernel with pages, and what the compiler tells of it."""
    family = (DenseFamily if shape.latent is None else LatentFamily)(shape, is_fp8, BLOCKS, SHARED_LIMIT)
    assert family.reason_against(1) is None
    macros = family.all_macros(vocab=shape.vocab_size, extent=65, page=64)
    source = family.source((SOURCES / INSTRUCTIONS).read_text("utf-8"))
    try:
        return compile_source(source, "kernel.cu", [*options_for(CAPABILITY, macros), "--ptxas-options=-v"])
    except KernelError as error:
        if "was not found" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("is_fp8", [True, False], ids=["codes", "bfloat16"])
@pytest.mark.parametrize("results", MOST_BYTES)
def test_it_is_compiled_as_it_was_measured(results: str, is_fp8: bool) -> None:
    shape = DecoderShape.from_dict(json.loads((RESULTS / results).read_text("utf-8"))["shape"])
    image, messages = compiled(shape, is_fp8=is_fp8)
    assert "Performance Loss" not in messages, messages
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", messages)
    assert spilled is not None and sum(map(int, spilled.groups())) <= (0 if is_fp8 else 64)
    assert len(image) < MOST_BYTES[results]
