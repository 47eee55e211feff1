"""Calibration text that the model generates: it resembles what the model computes in service.

The float graph continues a few prompts; tokens are sampled with a fixed seed. This needs the whole float model in
memory, unlike calibration; `fits_in_memory` says whether there is room.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.read_ahead import TensorPrefetch
from deepseek_triton.builders.checkpoint.reader import Checkpoint
from deepseek_triton.builders.fp8.calibrate import Report
from deepseek_triton.builders.fp8.forward.generate import ArrayDecoder, can_generate
from deepseek_triton.builders.fp8.forward.layer_session import runnable_opset
from deepseek_triton.builders.fp8.rounding.arrays import best_arrays
from deepseek_triton.builders.graph.decoder import build_graph
from deepseek_triton.ensemble.decoder.spec import ModelSpec

Ids = NDArray[np.int64]
Choose = Callable[[NDArray[np.float32]], Ids]  # logits [n, vocab_size] → tokens [n, 1]
PROMPT_LEN = 16  # tokens; all prompts have the same length and run as one batch
TEMPERATURE = 0.8


def fits_in_memory(spec: ModelSpec) -> bool:
    """Whether the float32 model fits into a GPU, or the processor's free memory is at least twice as large."""
    arrays = best_arrays()
    if arrays.is_gpu and can_generate(spec, arrays):
        return True
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return spec.num_parameters() * 4 * 2 < free


def generate_windows(
    checkpoint: Checkpoint,
    prompts: Sequence[NDArray[Any]],
    *,
    num_tokens: int,
    seed: int = 0,
    report: Report = lambda what, done, total: None,
) -> list[NDArray[np.int64]]:
    """Continue each prompt by up to `num_tokens` tokens, or to the model's end token.

    Args:
        checkpoint: every read counts in its digest, so open the checkpoint again for the build.
        prompts: token ids. The first `PROMPT_LEN` of each are used; shorter prompts are left out.

    Returns:
        Prompt and continuation of each, [seq_len] ids.
    """
    starts = [np.asarray(prompt[:PROMPT_LEN], np.int64) for prompt in prompts if len(prompt) >= PROMPT_LEN]
    if not starts:
        return []
    spec, arrays = checkpoint.spec, best_arrays()
    run = _in_arrays if arrays.is_gpu and can_generate(spec, arrays) else _in_onnx_runtime
    random, done = np.random.default_rng(seed), 0

    def choose(logits: NDArray[np.float32]) -> NDArray[np.int64]:
        nonlocal done
        report("generate", done, num_tokens)
        done += 1
        return _sample(logits, random)

    tokens = run(checkpoint, np.stack(starts), num_tokens, choose)
    report("generate", num_tokens, num_tokens)
    return [_until_end(row, spec.eos_token_ids) for row in tokens]


def _in_arrays(checkpoint: Checkpoint, tokens: Ids, num_tokens: int, choose: Choose) -> Ids:
    with TensorPrefetch(checkpoint.read, list(checkpoint.spec.tensor_shapes())) as ahead:
        decoder = ArrayDecoder(checkpoint.spec, ahead.read, best_arrays(), tokens.shape[1] + num_tokens)
    return decoder.generate(tokens, num_tokens, choose)


def _in_onnx_runtime(checkpoint: Checkpoint, tokens: Ids, num_tokens: int, choose: Choose) -> Ids:
    import onnxruntime as ort

    spec, count, length = checkpoint.spec, len(tokens), tokens.shape[1] + num_tokens
    with tempfile.TemporaryDirectory(prefix="deepseek-triton-float-") as directory:
        path = build_graph(spec, checkpoint.read, Path(directory), max_seq_len=length, opset=runnable_opset())
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        for value in session.get_inputs():
            if value.name.startswith("past_"):
                cache = ort.OrtValue.ortvalue_from_numpy(np.zeros((count, *value.shape[1:]), np.float32))
                binding.bind_ortvalue_input(value.name, cache)
                binding.bind_ortvalue_output(value.name.replace("past_", "present_"), cache)
        step, position = tokens, 0
        for _ in range(num_tokens):
            feeds = {"input_ids": step, "start": np.full(count, position, np.int64)}
            feeds["num_tokens"] = np.full(count, step.shape[1], np.int64)
            for name, array in feeds.items():
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
            binding.bind_output("logits", "cpu")
            session.run_with_iobinding(binding)
            position += step.shape[1]
            step = choose(binding.get_outputs()[-1].numpy())
            tokens = np.concatenate([tokens, step], axis=1)
        del binding, session  # they map the files that are deleted next
    return tokens


def _sample(logits: NDArray[np.float32], random: np.random.Generator) -> NDArray[np.int64]:
    """Sample one token for each row of logits [n, vocab_size]: [n, 1] (Gumbel-max)."""
    # Minus the logarithm of an exponential is Gumbel's noise: the largest sum is a draw from the softmax.
    exponential = random.standard_exponential(logits.shape, np.float32)
    noisy = logits / np.float32(TEMPERATURE) - np.log(np.maximum(exponential, np.finfo(np.float32).tiny))
    choice: NDArray[np.int64] = noisy.argmax(axis=1)[:, None].astype(np.int64)
    return choice


def _until_end(row: NDArray[np.int64], end_ids: Sequence[int]) -> NDArray[np.int64]:
    ends = np.flatnonzero(np.isin(row[PROMPT_LEN:], list(end_ids)))
    return row if not len(ends) else row[: PROMPT_LEN + int(ends[0]) + 1]
