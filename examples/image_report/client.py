"""Ask the ensemble for a report; what enters are an image's bytes, what leaves are the pieces of the report's text."""

from __future__ import annotations

from collections.abc import Generator

from deepseek_triton.clients import GrpcClient
from deepseek_triton.clients.report import REPORT_SUFFIX, report_engine, report_inputs
from deepseek_triton.ensemble.protocol.pipelines import model_name
from deepseek_triton.examples.image_report.report import ImageReport, read_report


class ReportClient:
    """Calls the ensemble whose reports `text_model` writes at `url`, host:port of Triton's gRPC."""

    def __init__(self, url: str, text_model: str, timeout_s: float = 60.0) -> None:
        name = model_name(text_model, REPORT_SUFFIX)
        self._client = GrpcClient(url, name, timeout_s)
        self._client.engine = report_engine(name)

    def stream(self, image: bytes) -> Generator[str, None, None]:
        """The pieces of the report's text as they come. Raises `ClientError`."""
        for chunk in self._client.stream_tensors(report_inputs(image)):
            yield chunk.text

    def report(self, image: bytes) -> ImageReport:
        """The whole report. Raises `ClientError`, `ReportError`."""
        return read_report("".join(self.stream(image)))

    def close(self) -> None:
        """Release the connection."""
        self._client.close()

    def __enter__(self) -> ReportClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
