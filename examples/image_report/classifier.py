"""The ResNet on ONNX Runtime: pixels → logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from deepseek_triton.examples.image_report.contract import LOGITS, PIXELS

GRAPH_FILE = "resnet.onnx"


class Classifier:
    """Runs the graph at `path`. num_threads: the threads of one call."""

    def __init__(self, path: Path, num_threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def logits(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Pixels [n, 3, h, w] in 0 to 1 → the logits [n, findings]."""
        logits: NDArray[np.float32] = self._session.run([LOGITS.name], {PIXELS.name: pixels})[0]
        return logits
