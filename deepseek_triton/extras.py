"""Optional packages: which extra of this project brings each of them, and the command that installs it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote, urlsplit

DISTRIBUTION = "deepseek-triton"
# Top-level module → the extra that installs it.
MODULE_EXTRAS = {
    "gguf": "build", "ml_dtypes": "build", "onnx": "build", "tqdm": "build", "google": "build",
    "httpx": "client", "tritonclient": "client", "grpc": "client",
    "onnxruntime": "serve", "tokenizers": "serve", "jinja2": "serve", "llguidance": "serve",
    "huggingface_hub": "hub", "torch": "cuda", "triton": "cuda", "cuda": "tensorrt", "tensorrt_rtx": "tensorrt",
    "transformers": "train", "peft": "train", "accelerate": "train",
    "matplotlib": "plot", "PIL": "image", "scipy": "fit", "sklearn": "fit",
    "opentelemetry": "trace", "limits": "gateway", "redis": "gateway", "httptools": "gateway",
    "fastapi": "gateway", "starlette": "gateway", "pydantic": "gateway", "uvicorn": "gateway",
    "gevent": "load", "locust": "load", "prometheus_client": "load", "psutil": "load", "tomli": "load",
}  # fmt: skip

_CLONE = Path(__file__).resolve().parents[1]


def install_command(extra: str) -> str:
    """The command that installs `extra` from the clone or wheel that this package came from: PyPI lacks it yet."""
    if (_CLONE / "pyproject.toml").is_file():
        return f"pip install -e '{_CLONE}[{extra}]'"
    source = _installed_from()
    if source is not None:
        return f"pip install '{source}[{extra}]'"
    return f"pip install '.[{extra}]' (in a clone of {DISTRIBUTION})"


def explain_missing(error: BaseException) -> str | None:
    """One line for a package that is not installed; None if the error is about something else.

    tritonclient raises a RuntimeError, with the ModuleNotFoundError as its cause.
    """
    missing = error.__cause__ or error
    if not isinstance(missing, ModuleNotFoundError):
        return None
    name = missing.name or ""
    extra = MODULE_EXTRAS.get(name.split(".")[0])
    return None if extra is None else f"{name} is not installed; run: {install_command(extra)}"


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Run a program's `main` and exit with its status; a package that is missing is an error of one line."""
    try:
        sys.exit(main())
    except (ImportError, RuntimeError) as error:
        message = explain_missing(error)
        if message is None:
            raise
        sys.exit(f"error: {message}")


def _installed_from() -> Path | None:
    """The wheel or clone that pip installed this package from, if it is still there (direct_url.json, PEP 610)."""
    try:
        text = metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    url = urlsplit(json.loads(text or "{}").get("url", ""))
    path = Path(unquote(url.path))
    return path if url.scheme == "file" and path.exists() else None
