"""Compile one graph into one plan.

This module knows TensorRT's builder, its timing cache and how to stop it. It doesn't know what a plan is for, and it
writes no plan.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from deepseek_triton.builders.tensorrt.census import Census, take_census
from deepseek_triton.builders.tensorrt.compiler import CompileTarget
from deepseek_triton.builders.tensorrt.errors import EngineError, GraphError
from deepseek_triton.builders.tensorrt.network import (
    AttentionForm,
    Network,
    OptimizationProfile,
    RaggedProfile,
    without_mask,
)
from deepseek_triton.builders.tensorrt.progress import CompileProgress, ProgressTracker, make_monitor, run_cancellable
from deepseek_triton.ensemble.artefacts.atomic_file import write_atomically

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompileJob:
    """What to compile.

    model: the graph without its weights, which lie beside `path`. precision: the graph's. forms: of
    attention, in the order in which to try them. gives_best_token: whether greedy decoding's outputs are
    added. fp8_modules: linear layers that must be FP8 in the network. timing_cache: a file kept from build to
    build. optimization_level: of the search for kernels; None: TensorRT's default.
    """

    target: CompileTarget
    model: onnx.ModelProto
    path: Path
    precision: str
    profiles: tuple[OptimizationProfile | RaggedProfile, ...]
    forms: tuple[AttentionForm, ...]
    gives_best_token: bool = False
    fp8_modules: Sequence[str] = field(default=())
    timing_cache: Path | None = None
    optimization_level: int | None = None
    progress: CompileProgress | None = None


@dataclass(frozen=True)
class Compiled:
    """plan: a buffer with the plan's bytes. form: the attention that compiled. census: of the network."""

    plan: Any
    form: AttentionForm
    census: Census


def compile_graph(job: CompileJob) -> Compiled:
    """Compile with the first form of attention that TensorRT takes.

    Raises:
        EngineError: with one line; GraphError where the graph is at fault.
    """
    for form in job.forms[:-1]:
        try:
            return _compile(job, form)
        except GraphError as error:
            if "ttention" not in str(error):
                raise
            log.warning("attention in the form %r, fused %s: %s; trying the next", form.name, form.is_fused, error)
    return _compile(job, job.forms[-1])


def _compile(job: CompileJob, form: AttentionForm) -> Compiled:
    api = job.target.api
    network = Network(job.target)
    network.parse(without_mask(job.model) if form.name == "lengths" else job.model, job.path)
    network.set_attention(form)
    if job.gives_best_token:
        network.add_best_token()
    census = take_census(api, network.network)
    census.require_fp8(job.fp8_modules)
    if bool(census.fp8) != (job.precision == "fp8"):
        found = f"{len(census.fp8)} of its {len(census.fp8 + census.not_fp8)} matrix multiplies are FP8"
        raise EngineError(f"precision is {job.precision}, but {found}; give the graph's own precision")

    config = network.builder.create_builder_config()
    if job.target.cross_compiles:
        config.num_compute_capabilities = 1
        name = "SM" + job.target.compute_capability.replace(".", "")
        config.set_compute_capability(getattr(api.ComputeCapability, name), 0)
    network.add_profiles(config, job.profiles)
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED  # what the inspector can tell later
    if job.optimization_level is not None:
        config.builder_optimization_level = job.optimization_level
    tracker = ProgressTracker(job.progress)
    monitor = make_monitor(api, tracker)  # a variable of its own: it must outlive the build
    config.progress_monitor = monitor
    cache = _load_timing_cache(config, job)
    plan = run_cancellable(lambda: network.builder.build_serialized_network(network.network, config), tracker)
    if plan is None:
        where = _node(job.model, network.messages.errors)
        raise GraphError(f"TensorRT can't compile {job.path.name}: {where}{network.messages.reason()}")
    if cache is not None and job.timing_cache is not None:
        write_atomically(job.timing_cache, cache.serialize(), EngineError)
    return Compiled(plan, form, census)


def read_graph(path: Path) -> onnx.ModelProto:
    """Read the graph without its weights.

    Raises:
        EngineError: the file isn't there or isn't ONNX.
    """
    try:
        return onnx.load(path, load_external_data=False)
    except OSError as error:
        raise EngineError(f"{path}: {error.strerror}") from error
    except Exception as error:  # protobuf's DecodeError, whose module differs between versions
        raise EngineError(f"{path} is not an ONNX graph: {error}") from error


def _load_timing_cache(config: Any, job: CompileJob) -> Any:
    """The job's timing cache, empty if the file is missing or another TensorRT wrote it; None if it has none."""
    path = job.timing_cache
    if path is None or job.target.cross_compiles:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        log.warning("%s is another TensorRT's or GPU's; timing anew", path)
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _node(model: onnx.ModelProto, errors: Sequence[str]) -> str:
    """ "node X: " with the longest name of a node that the errors mention, if they mention any."""
    text = " ".join(errors)
    named = [node.name for node in model.graph.node if len(node.name) > 3 and node.name in text]
    return f"node {max(named, key=len)}: " if named else ""
