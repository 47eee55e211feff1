"""Measure how often two computations of one FP8 model agree: python -m benchmarks.fp8_agreement ARTEFACT TEXT

ARTEFACT is the version directory of an engine built with `--target cuda --precision fp8`. Its decoder is computed in
plain torch: activations are rounded to E4M3 as the kernels do it, in float64 and float32, and with another order of
each product's sum. No implementation can be asked for more agreement. Writes benchmarks/results/fp8-agreement.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.cuda_reference import Reference
from benchmarks.machine import describe
from benchmarks.smollm2_reference import NUM_WINDOWS, WINDOW
from deepseek_triton.builders.fp8.quality.evaluate import text_windows
from deepseek_triton.builders.fp8.texts.calibration_text import read_text
from deepseek_triton.ensemble.artefacts.cuda_layout import WEIGHTS_FILE, DecoderShape
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.engine.runners.cuda.weights import StoredWeights
from deepseek_triton.ensemble.text.tokenizer import Tokenizer

FILE = Path(__file__).parent / "results" / "fp8-agreement.json"
WAYS = {
    "float64": (torch.float64, 1),
    "float32": (torch.float32, 1),
    "float32, sums in four parts": (torch.float32, 4),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Compute, print and write."""
    parser = argparse.ArgumentParser(description="agreement of one FP8 model with itself")
    parser.add_argument("artefact", type=Path)
    parser.add_argument("text", type=Path, help="UTF-8 text to predict")
    arguments = parser.parse_args(argv)
    manifest = Manifest.load(arguments.artefact)
    shape = DecoderShape.from_dict(manifest.engine)
    ids = Tokenizer.from_directory(arguments.artefact).encode(read_text(arguments.text))
    windows = text_windows(ids, WINDOW, NUM_WINDOWS * (WINDOW - 1), shape.vocab_size)
    source = StoredWeights(arguments.artefact / WEIGHTS_FILE)
    tokens = {}
    for name, (dtype, num_parts) in WAYS.items():
        reference = Reference(shape, source, dtype=dtype, num_parts=num_parts)
        found = [reference.logits(window[:WINDOW].tolist()).argmax(-1).numpy() for window in windows]
        tokens[name] = np.concatenate(found)
        print(f"{name}: {len(tokens[name])} tokens", flush=True)
    agreement = {
        f"{a} / {b}": round(float((tokens[a] == tokens[b]).mean()), 4) for a, b in itertools.combinations(WAYS, 2)
    }
    result = {"machine": describe(), "tokens": tokens["float64"].size, "agreement": agreement}
    FILE.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(agreement, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
