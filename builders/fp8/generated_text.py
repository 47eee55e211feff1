"""Text that the model writes itself, for calibration: the nearest thing to what it will meet in service.

The float graph continues a few prompts, sampled with a fixed seed. It needs the whole float model in memory, which
calibration itself does not; `fits_in_memory` says whether to try.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.reader import Checkpoint
from deepseek_triton.builders.fp8.calibrate import Report
from deepseek_triton.builders.fp8.layer_session import runnable_opset
from deepseek_triton.builders.graph.decoder import build_graph
from deepseek_triton.ensemble.decoder.spec import ModelSpec

PROMPT_LEN = 16  # tokens; all prompts have as many, so that they run as one batch
TEMPERATURE = 0.8


def fits_in_memory(spec: ModelSpec) -> bool:
    """Is there memory for the float32 model and as much again?"""
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
        checkpoint: read once: open another for the build.
        prompts: token ids; the first `PROMPT_LEN` of each are used, shorter ones are left out.

    Returns:
        Prompt and continuation of each, [seq_len] ids.
    """
    import onnxruntime as ort

    starts = [np.asarray(prompt[:PROMPT_LEN], np.int64) for prompt in prompts if len(prompt) >= PROMPT_LEN]
    if not starts:
        return []
    spec, length = checkpoint.spec, PROMPT_LEN + num_tokens
    with tempfile.TemporaryDirectory(prefix="deepseek-triton-float-") as directory:
        path = build_graph(spec, checkpoint.read, Path(directory), max_seq_len=length, opset=runnable_opset())
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        for value in session.get_inputs():
            if value.name.startswith("past_"):
                cache = ort.OrtValue.ortvalue_from_numpy(np.zeros((len(starts), *value.shape[1:]), np.float32))
                binding.bind_ortvalue_input(value.name, cache)
                binding.bind_ortvalue_output(value.name.replace("past_", "present_"), cache)
        tokens = np.stack(starts)
        random = np.random.default_rng(seed)
        step, position = tokens, 0
        for done in range(num_tokens):
            report("generate", done, num_tokens)
            feeds = {"input_ids": step, "start": np.full(len(starts), position, np.int64)}
            feeds["num_tokens"] = np.full(len(starts), step.shape[1], np.int64)
            for name, array in feeds.items():
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
            binding.bind_output("logits", "cpu")
            session.run_with_iobinding(binding)
            position += step.shape[1]
            step = _sample(binding.get_outputs()[-1].numpy(), random)
            tokens = np.concatenate([tokens, step], axis=1)
        report("generate", num_tokens, num_tokens)
        del binding, session  # before the files they map
    return [_until_end(row, spec.eos_token_ids) for row in tokens]


def _sample(logits: NDArray[np.float32], random: np.random.Generator) -> NDArray[np.int64]:
    """One token for each row of [n, vocab_size]: [n, 1]."""
    noise = random.gumbel(size=logits.shape)
    choice: NDArray[np.int64] = (logits / TEMPERATURE + noise).argmax(axis=1)[:, None].astype(np.int64)
    return choice


def _until_end(row: NDArray[np.int64], end_ids: Sequence[int]) -> NDArray[np.int64]:
    ends = np.flatnonzero(np.isin(row[PROMPT_LEN:], list(end_ids)))
    return row if not len(ends) else row[: PROMPT_LEN + int(ends[0]) + 1]
