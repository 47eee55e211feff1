"""Virtual environments that tests install packages into."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest

INSTALL_LIMIT_S = 240.0

# The packages run once or twice: to compile every module of theirs takes longer.
PIP_SETTINGS = {"PIP_NO_COMPILE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

# `python -m pip install …` by uv, which reads the same metadata and takes a tenth of pip's processor time; what uv
# can't do, pip does. Of this project, whose files change under one version, uv must not take what it has cached.
FAST_PIP = """
import os, subprocess, sys
uv, pip, words = {uv!r}, {pip!r}, [word for word in sys.argv[1:] if word != "--no-cache-dir"]
command = [uv, "pip", *words, "--python", sys.executable, "--refresh-package", "deepseek-triton"]
if words[:1] != ["install"] or subprocess.run(command).returncode:
    os.execve(sys.executable, [sys.executable, pip, *sys.argv[1:]], dict(os.environ))
"""


def make_environment(prefix: Path, *, with_uv: bool = True) -> Path:
    """Make an environment that has pip alone; returns its Python.

    Its pip is uv, unless uv is not installed or not wanted: then it is a link to the tests' own pip, since a copy for
    each environment takes five seconds of processor time.
    """
    venv.create(prefix, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(prefix)}))
    pip = find_spec("pip")
    assert pip is not None and pip.origin is not None
    real = Path(pip.origin).parent
    if with_uv and find_spec("uv") is not None:
        from uv import find_uv_bin

        (packages / "pip").mkdir()
        # Run by its path, pip takes what lies beside it for installed: the tests' own packages must not.
        alone = prefix / "pip-alone" / "pip"
        alone.parent.mkdir()
        alone.symlink_to(real)
        program = FAST_PIP.format(uv=find_uv_bin(), pip=str(alone))
        (packages / "pip" / "__main__.py").write_text(program, encoding="utf-8")
    else:
        (packages / "pip").symlink_to(real)
    return prefix / "bin" / "python"


def kept_environment(*packages: str) -> Path:
    """The Python of an environment that has `packages`, which pip takes from PyPI.

    It is kept in the tests' own environment, as `.venv/policies` is: the first run makes it, for all later ones.
    Skips the test where the packages can't be had.
    """
    prefix = Path(sys.prefix) / "environments" / hashlib.sha256(repr(packages).encode()).hexdigest()[:12]
    prefix.parent.mkdir(exist_ok=True)
    with prefix.with_suffix(".lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        python, mark = prefix / "bin" / "python", prefix / "packages.txt"
        if not mark.exists():
            shutil.rmtree(prefix, ignore_errors=True)
            try:
                install = [str(make_environment(prefix)), "-m", "pip", "install", "-q", *packages]
                done = subprocess.run(
                    install, env={**os.environ, **PIP_SETTINGS}, capture_output=True, text=True, timeout=INSTALL_LIMIT_S
                )
            except (subprocess.SubprocessError, OSError) as error:
                pytest.skip(f"no environment for {packages[0]}: {error}")
            if done.returncode:
                pytest.skip(f"pip can't install {packages[0]}: {done.stderr.strip().splitlines()[-1]}")
            mark.write_text("\n".join(packages), encoding="utf-8")
    return python
