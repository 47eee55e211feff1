"""Target onnx: the ONNX Runtime runner, on a CPU, with a KV cache that is updated in place.

Each of a layer's caches has a NumPy buffer [max_num_seqs, num_heads, max_seq_len, head_dim]. A binding gives a
slice of it to the graph as past input and as present output, so the graph writes into the memory that it reads, and no
cache is copied.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.engine.runners.base import Ids, Logits, RunnerError
from deepseek_triton.ensemble.engine.runners.onnx.scoring import OnnxScoringRunner
from deepseek_triton.ensemble.engine.runners.onnx.session import open_session, without_denormals
from deepseek_triton.ensemble.engine.runners.warm_up import warm_up
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from deepseek_triton.ensemble.scoring.rows import GRAPH_FILE
from deepseek_triton.ensemble.scoring.settings import ScoringSettings

log = logging.getLogger(__name__)
MIB = 2**20
MAX_KEPT_ROWS = 64


class OnnxRunner:
    """Runs the graph of `builders/graph/decoder.py` on the CPU.

    Args:
        path: model.onnx, its external data beside it.
        max_num_seqs: how many sequences have a cache at once.
        num_threads: for one operator; 0 takes every core this process may use.

    Raises:
        RunnerError: the file can't be loaded, or the caches don't fit into memory.
    """

    def __init__(self, path: Path, *, max_num_seqs: int, num_threads: int = 0) -> None:
        self._session = open_session(path, num_threads)
        inputs = {value.name: value for value in self._session.get_inputs()}
        caches = [name for name in inputs if name.startswith("past_")]
        self.max_seq_len = inputs[caches[0]].shape[2]
        self.max_num_seqs = max_num_seqs
        outputs = {value.name: value for value in self._session.get_outputs()}
        self.vocab_size = int(outputs["logits"].shape[-1])
        dtype = np.float16 if inputs[caches[0]].type == "tensor(float16)" else np.float32
        shapes = {name: (max_num_seqs, *inputs[name].shape[1:]) for name in caches}
        self.cache_bytes = sum(math.prod(shape) for shape in shapes.values()) * np.dtype(dtype).itemsize
        if self.cache_bytes > (available := _available_bytes()):
            # The kernel would grant the memory, and end this process later when the caches fill.
            raise RunnerError(
                f"{max_num_seqs} slots of {self.max_seq_len} tokens need {self.cache_bytes // MIB} MiB, "
                f"{available // MIB} MiB are free; lower max_num_seqs"
            )
        self._caches: dict[str, NDArray[Any]] = {name: _zeros(shape, dtype) for name, shape in shapes.items()}
        weight_bytes = path.with_name(path.name + ".data").stat().st_size
        log.info(
            "KV cache: %d slots x %d tokens x %d bytes = %d MiB; weights: %d MiB; %d threads",
            max_num_seqs, self.max_seq_len, self.cache_bytes // (max_num_seqs * self.max_seq_len),
            self.cache_bytes // MIB, weight_bytes // MIB, self._session.get_session_options().intra_op_num_threads,
        )  # fmt: skip
        self._logits = np.empty((max_num_seqs, self.vocab_size), np.float32)
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}
        self._shrinking = ort.RunOptions()
        self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def prefill(self, slot: int, ids: Ids, start: int) -> Logits:
        num_tokens = len(ids)
        if num_tokens == 1:
            # ONNX Runtime's attention has another path for one token, whose last bits differ. A second token, which the
            # next one overwrites, avoids that path: a prompt gives the same bits however it is cut into chunks.
            ids = np.append(ids, 0)
        logits = self._run(slot, ids[None, :], np.array([start]), np.array([num_tokens]))
        first: Logits = logits[0]
        return first

    def decode(self, ids: Ids, positions: Ids) -> Logits:
        return self._run(0, ids[:, None], positions, np.ones_like(positions))

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        for cache in self._caches.values():
            cache[target, :, :num_tokens] = cache[source, :, :num_tokens]

    def close(self) -> None:
        self._bindings.clear()
        self._caches.clear()
        del self._session

    def _run(self, first_slot: int, ids: Ids, start: Ids, num_tokens: Ids) -> Logits:
        """ids [n, seq_len], start [n], num_tokens [n] for slots first_slot, first_slot + 1, … → logits [n, vocab]."""
        n = len(ids)
        binding = self._binding(first_slot, n)
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids, np.int64))
        binding.bind_cpu_input("start", np.ascontiguousarray(start, np.int64))
        binding.bind_cpu_input("num_tokens", np.ascontiguousarray(num_tokens, np.int64))
        # What a long prompt took beside the caches goes back at its end; a step of a few rows keeps its own.
        with without_denormals():
            self._session.run_with_iobinding(binding, self._shrinking if ids.size > MAX_KEPT_ROWS else None)
        return self._logits[:n]

    def _binding(self, first_slot: int, n: int) -> ort.IOBinding:
        key = (first_slot, n)
        if key not in self._bindings:
            binding = self._session.io_binding()
            for name, cache in self._caches.items():
                value = ort.OrtValue.ortvalue_from_numpy(cache[first_slot : first_slot + n])
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(name.replace("past_", "present_"), value)
            binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self._logits[:n]))
            self._bindings[key] = binding
        return self._bindings[key]


def load(directory: Path, manifest: Manifest, settings: EngineSettings) -> OnnxRunner:
    """Load the runner of an engine that generates text.

    Raises:
        RunnerError: as `OnnxRunner`.
    """
    runner = OnnxRunner(directory / "model.onnx", max_num_seqs=settings.max_num_seqs, num_threads=settings.num_threads)
    warm_up(runner, settings.max_num_batched_tokens)
    return runner


def load_scoring(directory: Path, manifest: Manifest, settings: ScoringSettings) -> OnnxScoringRunner:
    """Load the runner of a scoring engine.

    Raises:
        RunnerError: as `OnnxScoringRunner`.
    """
    return OnnxScoringRunner(
        directory / GRAPH_FILE,
        settings,
        vocab_size=int(manifest.spec["vocab_size"]),
        max_seq_len=manifest.max_seq_len,
        prefix=manifest.engine.get("prefix_ids", ()),
    )


def _zeros(shape: tuple[int, ...], dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """Zeros whose memory is taken page by page as it is written.

    Not np.empty: masked positions are multiplied by 0, and 0 x NaN is NaN. Not np.zeros: NumPy asks for huge pages, so
    that a few tokens in a slot would take 2 MB of each cache.
    """
    pages = mmap.mmap(-1, int(np.prod(shape)) * np.dtype(dtype).itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype).reshape(shape)


def _available_bytes() -> int:
    """The memory that the kernel would grant without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
