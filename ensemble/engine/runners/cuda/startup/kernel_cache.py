"""Compiled kernels, kept beside the repository: Triton's own cache, and NVRTC's images.

An engine directory is REPOSITORY/NAME-engine/VERSION; the cache is .REPOSITORY-kernels beside REPOSITORY, because a
server reads what lies inside. Where nothing can be written, each library keeps to its own default.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

TRITON_VARIABLE = "TRITON_CACHE_DIR"  # read by Triton; a rank's process inherits it


def use_kernel_cache(engine: Path) -> None:
    """Let Triton and NVRTC keep the kernels of the engine in `engine`, unless the environment names another cache."""
    repository = engine.resolve().parents[1]
    directory = repository.parent / f".{repository.name}-kernels"
    try:
        directory.mkdir(exist_ok=True)
    except OSError:
        return
    if os.access(directory, os.W_OK):
        os.environ.setdefault(TRITON_VARIABLE, str(directory))


def cached_image(source: str, options: Sequence[str], version: str, compile_image: Callable[[], bytes]) -> bytes:
    """The image of `source`, compiled at most once.

    version: of the compiler. compile_image: makes the image where none is kept.
    """
    directory = os.environ.get(TRITON_VARIABLE)
    if not directory:
        return compile_image()
    name = sha256("\0".join([version, *options, source]).encode()).hexdigest()
    file = Path(directory) / f"nvrtc-{name}.cubin"
    try:
        return file.read_bytes()
    except OSError:
        image = compile_image()
    try:
        with tempfile.NamedTemporaryFile(dir=directory, delete=False) as stream:
            stream.write(image)
        Path(stream.name).replace(file)
    except OSError:
        pass  # it is compiled again next time
    return image
