"""Compile a decoder's ONNX graph into a TensorRT plan with a KV cache, and report what is in it.

Both TensorRTs and float32, float16 and FP8 graphs take the same path, since the types come from the graph. This module
knows nothing about checkpoints or the model repository.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from deepseek_triton.builders.tensorrt.census import Census
from deepseek_triton.builders.tensorrt.compile import CompileJob, compile_graph, read_graph
from deepseek_triton.builders.tensorrt.compiler import resolve_target
from deepseek_triton.builders.tensorrt.errors import EngineError
from deepseek_triton.builders.tensorrt.inspector import EngineLayer, inspect_plan
from deepseek_triton.builders.tensorrt.network import ATTENTION_FORMS, decoder_profiles, has_causal_mask
from deepseek_triton.builders.tensorrt.progress import CompileProgress
from deepseek_triton.ensemble.artefacts.atomic_file import write_atomically
from deepseek_triton.ensemble.artefacts.tensorrt_api import PlanInfo


@dataclass(frozen=True)
class EngineReport:
    """The plan that was built.

    plan: for the manifest. census: of the network that was compiled. plan_bytes: the file's length. seconds:
    how long it took. layers: the compiled layers, if this machine has a GPU that can load the
    plan, else None.
    """

    path: Path
    plan: PlanInfo
    census: Census
    plan_bytes: int
    seconds: float
    layers: tuple[EngineLayer, ...] | None


def build_engine(
    onnx_path: Path,
    output_path: Path,
    *,
    target: str,
    precision: str,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_seq_len: int,
    compute_capability: str | None = None,
    fp8_modules: Sequence[str] = (),
    timing_cache: Path | None = None,
    optimization_level: int | None = None,
    progress: CompileProgress | None = None,
) -> EngineReport:
    """Compile the decoder graph at `onnx_path` into a plan at `output_path`.

    Args:
        onnx_path: decoder.py's graph with the last logits, quantised or not.
        target: "tensorrt" or "tensorrt-rtx".
        precision: the graph's: "fp32", "fp16" or "fp8".
        max_num_seqs: sequences decoded at once, at most. max_num_batched_tokens: prompt tokens in one call, at most.
        max_seq_len: positions in a slot's cache; the graph's own.
        compute_capability: the GPU's that will serve, as "8.9"; None: this machine's.
        fp8_modules: linear layers that must be FP8 in TensorRT's network.
        timing_cache: a file that spares later builds the timing of kernels; TensorRT for RTX times none.
        optimization_level: 0 to 5, of TensorRT's search for kernels; None: its own default.
        progress: called with the name of the step, and thousandths of it.

    Raises:
        EngineError: with one line; nothing was written.
        KeyboardInterrupt: TensorRT was stopped first.
    """
    for name, value in (("max_num_seqs", max_num_seqs), ("max_num_batched_tokens", max_num_batched_tokens)):
        if value < 1:
            raise EngineError(f"{name} is {value}, must be at least 1")
    if max_num_batched_tokens > max_seq_len:
        raise EngineError(
            f"max_num_batched_tokens is {max_num_batched_tokens}, must be at most max_seq_len {max_seq_len}"
        )
    settled = resolve_target(target, precision, compute_capability)
    model = read_graph(onnx_path)
    _check_cache(model, onnx_path, precision, max_seq_len)
    forms = ATTENTION_FORMS[precision]
    if not has_causal_mask(model):
        forms = tuple(form for form in forms if form.name == "mask")
    started = time.monotonic()
    compiled = compile_graph(
        CompileJob(
            settled, model, onnx_path, precision, decoder_profiles(max_num_seqs, max_num_batched_tokens), forms,
            gives_best_token=True, fp8_modules=fp8_modules, timing_cache=timing_cache,
            optimization_level=optimization_level, progress=progress,
        )
    )  # fmt: skip
    write_atomically(output_path, compiled.plan, EngineError)
    plan = PlanInfo(
        settled.name, settled.version, settled.compute_capability, compiled.form.name, compiled.form.is_fused,
        max_num_seqs, max_num_batched_tokens, max_seq_len,
    )  # fmt: skip
    seconds = time.monotonic() - started
    layers = inspect_plan(settled, output_path)
    return EngineReport(output_path, plan, compiled.census, output_path.stat().st_size, seconds, layers)


def _check_cache(model: onnx.ModelProto, path: Path, precision: str, max_seq_len: int) -> None:
    caches = [value for value in model.graph.input if value.name.startswith("past_")]
    if not caches:
        raise EngineError(f"{path} has no KV cache; build it as a scoring engine")
    tensor = caches[0].type.tensor_type
    is_float32 = tensor.elem_type == onnx.TensorProto.FLOAT
    if precision != "fp8" and is_float32 != (precision == "fp32"):
        raise EngineError(f"precision is {precision}, the graph's is {'fp32' if is_float32 else 'fp16'}")
    found = tensor.shape.dim[2].dim_value
    if found != max_seq_len:
        raise EngineError(f"max_seq_len is {max_seq_len}, the graph's cache holds {found}; build the graph again")
