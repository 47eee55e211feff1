"""The tests' environments have what is installed into them, by whichever installer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.environments import INSTALL_LIMIT_S, PIP_SETTINGS, make_environment


@pytest.mark.slow
def test_what_uv_cannot_install_pip_does_though_the_tests_have_it_already(tmp_path: Path) -> None:
    python = make_environment(tmp_path / "environment")
    cannot = {"UV_OFFLINE": "1", "UV_CACHE_DIR": str(tmp_path / "cache")}
    command = [str(python), "-m", "pip", "install", "-q", "--no-deps", "iniconfig"]  # one of pytest's own
    subprocess.run(command, env={**os.environ, **PIP_SETTINGS, **cannot}, check=True, timeout=INSTALL_LIMIT_S)
    where = subprocess.run(
        [str(python), "-c", "import iniconfig; print(iniconfig.__file__)"], capture_output=True, text=True, check=True
    )
    assert Path(where.stdout.strip()).is_relative_to(tmp_path)
