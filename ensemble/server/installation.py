"""Find the stock tritonserver of this machine, and what it needs to run.

    a container's tritonserver   on PATH or in /opt/tritonserver/bin; has its own backends
    the nvidia-pytriton wheel    a tritonserver and the Python backend, one stub for each version of Python

The wheel's files are used without importing it: its other dependencies need not be installed. Nothing is started here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CONTAINER_BINARY = Path("/opt/tritonserver/bin/tritonserver")
WHEEL = "nvidia-pytriton==0.7.0"
STUB = "triton_python_backend_stub"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class ServerError(Exception):
    """The server can't be found, started or kept running; the message is one line: what is wrong and what to do."""


class ServerDiedError(ServerError):
    """The server or a model's process died of a signal or by itself: another start may succeed."""


@dataclass(frozen=True)
class Installation:
    """A tritonserver and what it needs.

    python_backend: the files of the wheel's Python backend and the stub of this Python, to be put into one
    directory; None: the server has its own backends. library_dirs: searched first, by server and stubs.
    """

    binary: Path
    python_backend: tuple[Path, ...] | None = None
    library_dirs: tuple[Path, ...] = ()

    def make_backends(self, directory: Path) -> list[str]:
        """Make the backend directory, if one is needed; returns the server's options for it."""
        if self.python_backend is None:
            return []
        target = directory / "backends" / "python"
        target.mkdir(parents=True)
        for path in self.python_backend:
            (target / path.name).symlink_to(path)
        return [f"--backend-directory={target.parent}"]

    def environment(self) -> dict[str, str]:
        """The server's environment: this process's, with this Python and the libraries first."""
        environment = dict(os.environ)
        if self.python_backend is not None or _stub_python() in (None, PYTHON):
            # The interpreter in the stub takes the first python3 on PATH for its own, and so finds this environment's
            # packages. A stub of another Python version would find none, so PATH stays as it is there.
            _put_first(environment, "PATH", Path(sys.executable).parent)
        for directory in reversed(self.library_dirs):
            _put_first(environment, "LD_LIBRARY_PATH", directory)
        return environment


def find_tritonserver() -> Installation:
    """The tritonserver to use: a container's own, else the wheel's.

    Raises:
        ServerError: there is none that can run here.
    """
    if on_path := shutil.which("tritonserver"):
        return Installation(Path(on_path))
    if CONTAINER_BINARY.is_file():
        return Installation(CONTAINER_BINARY)
    return _wheel()


def _wheel() -> Installation:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        here = f"{sys.platform} {platform.machine()}"
        raise ServerError(f"no tritonserver on PATH, and none to install on {here}; use NVIDIA's Triton container")
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerError(f"no tritonserver on PATH; run: pip install --no-deps {WHEEL}")
    package = Path(spec.origin).parent
    server = package / "tritonserver"
    binary = server / "bin" / "tritonserver"
    backend = server / "backends" / "python"
    for needed in (binary, backend):
        if not needed.exists():
            raise ServerError(f"{needed} is missing; run: pip install --force-reinstall --no-deps {WHEEL}")
    stub = server / "python_backend_stubs" / PYTHON / STUB
    libraries = package.parent / "nvidia_pytriton.libs"
    # The stubs need numpy 1, which has no wheels for Python 3.13.
    if not stub.exists() or sys.version_info >= (3, 13):
        raise ServerError(f"the tritonserver of {WHEEL} can't run Python {PYTHON} models; use Python 3.10 to 3.12")
    _check_numpy()
    files = tuple(path for path in backend.iterdir() if path.is_file())
    return Installation(binary, (*files, stub), (libraries, _python_library_dir()))


def _check_numpy() -> None:
    """Refuse numpy 2: the wheel's stubs misread its arrays, and abort at the first text."""
    try:
        version = importlib.metadata.version("numpy")
    except importlib.metadata.PackageNotFoundError:
        raise ServerError("numpy is not installed; run: pip install 'numpy<2'") from None
    if int(version.split(".")[0]) >= 2:
        raise ServerError(f"the tritonserver of {WHEEL} can't work with numpy {version}; run: pip install 'numpy<2'")


def _python_library_dir() -> Path:
    """The directory of this Python's shared library, which the stub is linked to."""
    name = f"libpython{PYTHON}.so.1.0"
    for directory in _library_dirs():
        if (directory / name).exists():
            return directory
    package = f"libpython{PYTHON}"
    raise ServerError(f"{name} is missing; run: apt-get install {package}, or use a Python built with --enable-shared")


def _library_dirs() -> Iterator[Path]:
    variables = sysconfig.get_config_vars()
    if directory := variables.get("LIBDIR"):
        yield Path(directory)
        yield Path(directory) / str(variables.get("MULTIARCH") or "")
    yield Path(sys.base_prefix) / "lib"  # an interpreter that was moved after its build


def _stub_python() -> str | None:
    """The version of Python that a container's stub embeds; None if that can't be told."""
    stub = CONTAINER_BINARY.parent.parent / "backends" / "python" / STUB
    if not stub.is_file():
        return None
    match = re.search(rb"libpython(3\.\d+)\.so", stub.read_bytes())
    return match[1].decode() if match else None


def _put_first(environment: dict[str, str], variable: str, directory: Path) -> None:
    rest = environment.get(variable)
    environment[variable] = f"{directory}{os.pathsep}{rest}" if rest else str(directory)
