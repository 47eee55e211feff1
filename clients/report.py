"""What a client must know of an ensemble that writes a report on an image: its inputs, and where it generates.

The ensemble is named after the text model whose tokenizer, engine and detokenizer it shares: TEXT-report.
"""

from __future__ import annotations

from deepseek_triton.clients.request import Value
from deepseek_triton.ensemble.protocol.contract import IMAGE, STREAM, TensorSpec

REPORT_SUFFIX = "report"


def report_inputs(image: bytes) -> dict[TensorSpec, Value]:
    """The inputs for `stream_tensors`. image: the bytes of a JPEG or PNG file."""
    return {IMAGE: image, STREAM: True}


def report_engine(name: str) -> str:
    """The engine that generates for ensemble `name`: ("smollm2-report") → "smollm2-engine"."""
    return f"{name.removesuffix(f'-{REPORT_SUFFIX}')}-engine"
