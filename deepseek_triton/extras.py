"""Optional packages: which extra of this project brings each of them, and the command that installs it."""

from __future__ import annotations

from pathlib import Path

# Top-level module → the extra that installs it.
MODULE_EXTRAS = {
    "gguf": "build", "ml_dtypes": "build", "onnx": "build", "tqdm": "build", "google": "build",
    "httpx": "client", "tritonclient": "client", "grpc": "client",
    "onnxruntime": "serve", "tokenizers": "serve", "jinja2": "serve", "llguidance": "serve",
    "torch": "cuda", "cuda": "tensorrt", "tensorrt_rtx": "tensorrt",
    "matplotlib": "plot", "scipy": "fit", "sklearn": "fit", "locust": "load", "tomli": "load",
}  # fmt: skip

_ROOT = Path(__file__).resolve().parents[1]


def install_command(extra: str) -> str:
    """The command that installs `extra`. The package is not on PyPI yet, so it is installed from a clone."""
    if (_ROOT / "pyproject.toml").is_file():
        return f"pip install -e '{_ROOT}[{extra}]'"
    return f"pip install '.[{extra}]' (in a clone of deepseek-triton)"


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
