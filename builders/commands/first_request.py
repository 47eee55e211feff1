"""One request to each model of a server that has just started, so that a client's first one isn't slow.

Triton's Python stubs, and its own tensorrt backend, take some hundred milliseconds more for the first request that goes
through them; a runner's warm-up at load doesn't reach that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TEXT = "Hello"
TIMEOUT_S = 60.0


def send_first_requests(server: Any, repository: Path, models: Sequence[str], say: Callable[[str], None]) -> None:
    """Ask each of `models` that is ready for one token or one label; `say` gets a line on one that can't answer."""
    from deepseek_triton.builders.repository.check import is_scoring_model
    from deepseek_triton.clients.api import GenerateRequest
    from deepseek_triton.clients.connect import connect
    from deepseek_triton.clients.errors import ClientError
    from deepseek_triton.clients.score import ScoreRequest

    for model in models:
        if not server.is_ready(model):
            continue
        with connect("grpc", model, server.grpc_url, TIMEOUT_S) as client:
            try:
                if is_scoring_model(repository, model):
                    client.score(ScoreRequest(texts=TEXT, labels=("a", "b")))
                else:
                    client.generate(GenerateRequest(prompt=TEXT, max_tokens=1))
            except ClientError as error:
                say(f"{model} is ready, but can't answer: {error}")
