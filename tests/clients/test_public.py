"""`deepseek_triton.clients` offers what an application needs, and imports what is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from deepseek_triton import clients


@pytest.mark.parametrize("name", clients.__all__)
def test_every_name_can_be_imported(name: str) -> None:
    assert getattr(clients, name).__name__ == name
    assert name in dir(clients)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Grpc'"):
        clients.Grpc  # noqa: B018


def imported_with(source: str) -> set[str]:
    program = f"import sys\n{source}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "absent"),
    [
        ("GenerateRequest, Generation, RequestRejected", {"httpx", "grpc", "tritonclient", "numpy", "asyncio"}),
        ("GrpcClient, AsyncGrpcClient, GenerateRequest", {"httpx"}),
        ("HttpClient, AsyncHttpClient, GenerateRequest", {"grpc", "tritonclient"}),
    ],
)
def test_a_library_that_is_not_needed_is_not_imported(names: str, absent: set[str]) -> None:
    assert not absent & imported_with(f"from deepseek_triton.clients import {names}")
