"""Triton's adapter for the preprocessor: the bytes of an image → pixels. A repository's model.py imports it."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from deepseek_triton.ensemble.models.fields import check_fields
from deepseek_triton.ensemble.models.tensors import RequestError, marks_kind, read_inputs
from deepseek_triton.ensemble.protocol.contract import IMAGE
from deepseek_triton.ensemble.protocol.error_kind import ERROR_CODES, FailureKind, with_kind
from deepseek_triton.examples.image_report.contract import PIXELS, REPORT
from deepseek_triton.examples.image_report.images.decode import pixels_of
from deepseek_triton.examples.image_report.images.errors import ImageError

log = logging.getLogger(__name__)


class TritonPythonModel:
    """Answers each request with one response; a bad image is an error of its own request."""

    def execute(self, requests: list[Any]) -> list[Any]:
        """Decode the image of every request."""
        return [_answer(request) for request in requests]


def _answer(request: Any) -> Any:
    try:
        check_fields(request, REPORT.inputs)
        images = read_inputs(request)[IMAGE.name].reshape(-1)
        pixels = np.stack([pixels_of(bytes(image)) for image in images])
    except (ImageError, RequestError) as error:
        return _failure(str(error), "invalid", is_marked=marks_kind(request))
    except Exception as error:  # a lack of memory, for one: the next request may have a smaller image
        log.error("an image can't be decoded", exc_info=error)
        return _failure("the image can't be decoded here", "internal", is_marked=marks_kind(request))
    return pb_utils.InferenceResponse([pb_utils.Tensor(PIXELS.name, pixels)])


def _failure(message: str, kind: FailureKind, *, is_marked: bool) -> Any:
    text = with_kind(message, kind) if is_marked else message
    return pb_utils.InferenceResponse(
        error=pb_utils.TritonError(text, getattr(pb_utils.TritonError, ERROR_CODES[kind]))
    )
