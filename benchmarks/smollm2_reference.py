"""Write SmolLM2-135M's reference tokens for GPU tests: python -m benchmarks.smollm2_reference TEXT

Whole windows run through the real graphs on ONNX Runtime, float32 and FP8. Two correct computations of an FP8 graph may
choose different tokens: the same codes and scales are also computed in float32
(`builders/fp8/quality/evaluate.py`), and this difference is the allowance for another implementation. transformers'
BF16 logits are that of the BF16 model: at a few positions any BF16 computation is far from float32. Writes into
--output (default build/smollm2):
    reference.npz   windows of ids, the likeliest tokens by each, float16 logits of the first window: some 11 MB
    ranges.json     the activation ranges that the FP8 build used, so that another machine's has the same
With --pack, also what tests/ensemble/engine/runners/test_cuda_smollm2.py needs on a machine that has no package
registry, the checkpoint among it, as one archive in pieces of so many MiB, each with its digest; `python -m
benchmarks.smollm2_reference --join` there checks them and puts them together in --output.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

OUTPUT = Path("build") / "smollm2"
CHECKPOINT, REFERENCE, RANGES = "SmolLM2-135M-Instruct.gguf", "reference.npz", "ranges.json"
PIECE = "smollm2.tar."
WINDOW, NUM_WINDOWS, CHUNK = 512, 10, 8  # tokens, windows, tokens between the positions whose logits are kept


def main(argv: Sequence[str] | None = None) -> int | str:
    """Compute what isn't there yet and write it."""
    parser = argparse.ArgumentParser(description="SmolLM2's logits by the ONNX graphs, for tests on a GPU")
    parser.add_argument("text", type=Path, nargs="?", help="UTF-8 text to predict")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    parser.add_argument("--pack", type=int, metavar="MIB", help="write pieces of at most so many MiB")
    parser.add_argument("--join", action="store_true", help="put the pieces in --output together")
    arguments = parser.parse_args(argv)
    output: Path = arguments.output
    if arguments.join:
        return join(output)
    output.mkdir(parents=True, exist_ok=True)
    if arguments.text is not None:
        compute(arguments.text, output)
    if arguments.pack is not None:
        return pack(output, arguments.pack * 2**20)
    return 0


def compute(text: Path, output: Path) -> None:
    """Write ranges.json and reference.npz."""
    from benchmarks.weights import smollm2
    from deepseek_triton.builders.checkpoint.reader import open_checkpoint
    from deepseek_triton.builders.fp8.quality.evaluate import run_model, text_windows
    from deepseek_triton.builders.fp8.quality.graph_weights import Artefact
    from deepseek_triton.builders.fp8.quantize import quantized_graph
    from deepseek_triton.builders.fp8.recipe import RECIPES
    from deepseek_triton.builders.fp8.texts.calibration_text import load_or_calibrate, load_tokenizer, read_text
    from deepseek_triton.builders.graph.decoder import build_graph

    path = smollm2()
    checkpoint = open_checkpoint(path)
    spec = checkpoint.spec
    ids = load_tokenizer(checkpoint).encode(read_text(text))
    windows = text_windows(ids, WINDOW, NUM_WINDOWS * (WINDOW - 1), spec.vocab_size)
    windows = [window[:WINDOW] for window in windows if len(window) >= WINDOW]
    found: dict[str, NDArray[Any]] = {"windows": np.stack(windows).astype(np.int32)}
    calibration = load_or_calibrate(checkpoint, output / RANGES, None, _progress)
    with tempfile.TemporaryDirectory() as directory:
        places = {name: Path(directory) / name for name in ("float", "fp8")}
        for place in places.values():
            place.mkdir()
        build_graph(spec, checkpoint.read, places["float"], max_seq_len=WINDOW, precision="fp32", logits="all")
        quantized_graph(
            open_checkpoint(path), RECIPES["default"], calibration, places["fp8"],
            max_seq_len=WINDOW, logits="all", report=_progress,
        )  # fmt: skip
        for name, place in places.items():
            began = time.perf_counter()
            found[f"{name}_tokens"], found[f"{name}_logits"] = run_graph(place / "model.onnx", windows)
            print(f"{name} graph: {len(windows)} windows, {time.perf_counter() - began:.0f} s")
        final = run_model(Artefact(places["fp8"] / "model.onnx"), spec, windows, _progress)
    found["bf16_logits"] = bf16_logits(path, windows[0])
    likeliest = [(hidden @ final.head.T).argmax(axis=1) for hidden in final.hidden]
    found["fp8_float32_tokens"] = np.stack(likeliest).astype(np.int32)
    for name in ("float", "fp8_float32"):
        agreement = (found["fp8_tokens"] == found[f"{name}_tokens"]).mean()
        print(f"the FP8 graph agrees with {name} on {agreement:.2%} of {found['fp8_tokens'].size} tokens")
    with (output / REFERENCE).open("wb") as stream:
        np.savez_compressed(stream, **found)
    print(f"wrote {output / REFERENCE}, {(output / REFERENCE).stat().st_size / 1e6:.1f} MB")


def run_graph(graph: Path, windows: Sequence[NDArray[Any]]) -> tuple[NDArray[np.int32], NDArray[np.float16]]:
    """The likeliest tokens [windows, WINDOW], and the first window's logits [WINDOW / CHUNK, vocab_size] after CHUNK,
    2 CHUNK, … tokens, by a graph that gives every position's.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3  # it warns of every cache that is not updated in place
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    caches = {
        value.name: np.zeros([1, *value.shape[1:]], kinds[value.type])
        for value in session.get_inputs()
        if value.name.startswith("past_")
    }
    tokens, logits = [], np.empty(0, np.float16)
    for window in windows:
        ids, length = np.asarray(window, np.int64)[None], np.array([len(window)])
        feeds = {"input_ids": ids, "start": np.zeros(1, np.int64), "num_tokens": length, **caches}
        (rows,) = session.run(["logits"], feeds)
        tokens.append(rows[0].argmax(axis=1).astype(np.int32))
        if not len(logits):
            logits = rows[0, CHUNK - 1 :: CHUNK].astype(np.float16)
    return np.stack(tokens), logits


def bf16_logits(checkpoint: Path, window: NDArray[Any]) -> NDArray[np.float16]:
    """transformers' logits [WINDOW / CHUNK, vocab_size] in BF16 after CHUNK, 2 CHUNK, … tokens of the window."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.parent, gguf_file=checkpoint.name, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model(torch.from_numpy(np.asarray(window, np.int64)[None])).logits[0, CHUNK - 1 :: CHUNK]
    rows: NDArray[np.float16] = logits.float().numpy().astype(np.float16)
    return rows


def pack(output: Path, piece_bytes: int) -> int:
    """The checkpoint, reference.npz and ranges.json as pieces with a list of their digests."""
    from benchmarks.weights import smollm2

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:  # a quantised checkpoint doesn't get smaller
        archive.add(smollm2(), CHECKPOINT)
        for name in (REFERENCE, RANGES):
            archive.add(output / name, name)
    data = buffer.getbuffer()
    for old in output.glob(f"{PIECE}*"):
        old.unlink()
    lines = []
    for index, start in enumerate(range(0, len(data), piece_bytes)):
        part = data[start : start + piece_bytes]
        name = f"{PIECE}{index:02}"
        (output / name).write_bytes(part)
        lines.append(f"{hashlib.sha256(part).hexdigest()}  {name}\n")
        print(f"{output / name}: {len(part) / 2**20:.1f} MiB")
    (output / f"{PIECE}sha256").write_text("".join(lines), encoding="utf-8")
    return 0


def join(output: Path) -> int | str:
    """Check the pieces and unpack them."""
    buffer = io.BytesIO()
    for line in (output / f"{PIECE}sha256").read_text(encoding="utf-8").splitlines():
        digest, name = line.split()
        if not (output / name).is_file():
            return f"error: {output / name} is missing: copy it here too"
        part = (output / name).read_bytes()
        if hashlib.sha256(part).hexdigest() != digest:
            return f"error: {output / name} is damaged: copy it again"
        buffer.write(part)
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as archive:
        for name in (CHECKPOINT, REFERENCE, RANGES):  # by name: Python 3.11.2 has no filter of what is unpacked
            packed = archive.extractfile(name)
            assert packed is not None, f"{name} is no file"
            with packed, (output / name).open("wb") as file:
                shutil.copyfileobj(packed, file)
    print(f"{output}: {', '.join(sorted(path.name for path in output.iterdir() if PIECE not in path.name))}")
    return 0


def _progress(what: str, done: int, total: int) -> None:
    print(f"\r{what} {done}/{total}   ", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
