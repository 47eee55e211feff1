from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from deepseek_triton.examples.image_report.repository import add_report_models
from tests.conftest import NAME, TINY_SMOLLM2, serve
from tests.support.checkpoints import write_tiny

REPORT_NAME = f"{NAME}-report"


@pytest.fixture(scope="package")
def report_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ensemble, its own trained ResNet, and a tiny random text model with SmolLM2's tokenizer."""
    from tests.support.real_tokenizers import smollm2_directory

    directory = tmp_path_factory.mktemp("image_report")
    checkpoint = write_tiny(directory / "checkpoint", **TINY_SMOLLM2)
    shutil.copytree(smollm2_directory(), checkpoint, dirs_exist_ok=True)
    repository = directory / "models"
    build(BuildOptions(checkpoint, NAME, repository, max_seq_len=1024))
    add_report_models(repository, NAME)
    return repository


@pytest.fixture(scope="package")
def report_server(report_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A real tritonserver on it."""
    yield from serve(report_repository, tmp_path_factory.mktemp("log"))
