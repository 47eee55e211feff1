"""Examples to paste into a shell, as `serve` prints them."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

PROMPT = "The capital of France is"

PYTHON = """\
from deepseek_triton.clients import GenerateRequest, GrpcClient
with GrpcClient({grpc_url!r}, {model!r}) as client:
    for chunk in client.stream(GenerateRequest(prompt={prompt!r}, max_tokens=16)):
        print(chunk.text, end="", flush=True)
    print()"""


def examples(model: str, http_url: str, grpc_url: str) -> dict[str, str]:
    """A shell command for each way to ask `model`: title → command."""
    here = Path(sys.executable).parent
    body = json.dumps({"text_input": PROMPT, "max_tokens": 16, "stream": True})
    console = [
        str(here / "deepseek-triton"),
        "generate",
        model,
        PROMPT,
        "--url",
        grpc_url,
        "--max-tokens",
        "16",
    ]
    return {
        "gRPC": shlex.join(console),
        "HTTP": shlex.join(["curl", "-sN", f"{http_url}/v2/models/{model}/generate_stream", "-d", body]),
        "Python": f"{shlex.quote(sys.executable)} - <<'END'\n"
        + PYTHON.format(grpc_url=grpc_url, model=model, prompt=PROMPT)
        + "\nEND",
    }


SCORED_TEXT = "A wonderful film, I loved it."
SCORED_LABELS = ("positive", "negative")

SCORE_PYTHON = """\
from deepseek_triton.clients import GrpcClient, ScoreRequest
with GrpcClient({grpc_url!r}, {model!r}) as client:
    for score in client.score(ScoreRequest({fields})):
        print(score.label, score.probabilities)"""


def score_examples(model: str, http_url: str, grpc_url: str, *, has_labels: bool = False) -> dict[str, str]:
    """A shell command for each way to ask scoring `model`: title → command.

    has_labels: whether the model was built with labels, which then are the ones to choose among.
    """
    labels = () if has_labels else SCORED_LABELS
    command = str(Path(sys.executable).parent / "deepseek-triton")
    console = [command, "score", model, SCORED_TEXT, *(("--labels", ",".join(labels)) if labels else ())]
    body = {"text_input": SCORED_TEXT} | ({"labels": labels} if labels else {})
    fields = f"texts=[{SCORED_TEXT!r}]" + (f", labels={labels!r}" if labels else "")
    program = SCORE_PYTHON.format(grpc_url=grpc_url, model=model, fields=fields)
    return {
        "gRPC": shlex.join([*console, "--url", grpc_url]),
        "HTTP": shlex.join(["curl", "-s", f"{http_url}/v2/models/{model}/generate", "-d", json.dumps(body)]),
        "Python": f"{shlex.quote(sys.executable)} - <<'END'\n{program}\nEND",
    }
