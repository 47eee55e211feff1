"""A wrong model or port of a real server: the command says what to write instead; a build is known by its identity."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek_triton.builders.cli import main
from deepseek_triton.clients.connect import PROTOCOLS, ProtocolName, connect
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.conftest import NAME

pytestmark = pytest.mark.server
PART = f"is a part of {NAME}, which only {NAME} calls: ask {NAME}"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("generate", NAME[:-1], "x"), f"did you mean {NAME}?"),
        (("generate", NAME.upper(), "x"), f"did you mean {NAME}?"),
        (("chat", NAME[:-1]), f"did you mean {NAME}?"),
        (("score", NAME[:-1], "x"), f"did you mean {NAME}?"),
        (("score", "zebra", "x", "--labels", "a,b"), f"has no model 'zebra'; there is {NAME}"),
        (("score", NAME, "x", "--labels", "a,b"), "generates text, it is no scoring model"),
        (("generate", f"{NAME}-engine", "x"), PART),
        (("generate", f"{NAME}-tokenizer", "x"), PART),
        (("score", f"{NAME}-engine", "x"), PART),
        (("score", f"{NAME}-tokenizer", "x"), PART),
        (("generate", f"{NAME}-detokenizer", "x"), PART),
        (("chat", f"{NAME}-engine"), PART),
        (("generate", NAME, ""), "error: text_input is empty: send at least one character, or messages\n"),
    ],
)
def test_a_wrong_model(
    tiny_server: TritonServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    protocol: ProtocolName,
    words: tuple[str, ...],
    expected: str,
) -> None:
    url = tiny_server.grpc_url if protocol == "grpc" else tiny_server.http_url
    # On ports of their usual numbers the names come from the metrics.
    names = [f"{NAME}-engine", NAME]
    monkeypatch.setattr("deepseek_triton.clients.server.diagnosis.ask_names", lambda *_: names)
    assert main([*words, "--url", url]) == 1
    out, err = capsys.readouterr()
    assert out == "" and expected in err and err.count("\n") == 1, err


def test_a_wrong_port(tiny_server: TritonServer, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = tiny_server.metrics_url.removesuffix("/metrics")
    for url, expected in (
        (metrics, "is the port of Triton's metrics"),
        (metrics.removeprefix("http://"), "is the port of Triton's metrics"),
        (f"http://{tiny_server.grpc_url}", f"use --url grpc://{tiny_server.grpc_url}"),
        (tiny_server.http_url.removeprefix("http://"), f"use --url {tiny_server.http_url}"),
        (f"{tiny_server.http_url}/proxy", "leave the path out of --url"),
        (f"{tiny_server.http_url}/v2", f"url must name the server alone, as {tiny_server.http_url}"),
    ):
        for words in (("generate", NAME, "x"), ("chat", NAME), ("score", NAME, "x")):
            assert main([*words, "--url", url]) == 1
            assert expected in capsys.readouterr().err, (url, words)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_build_that_is_served(tiny_server: TritonServer, protocol: ProtocolName) -> None:
    url = tiny_server.grpc_url if protocol == "grpc" else tiny_server.http_url
    with connect(protocol, NAME, url, 10) as client:
        assert client.build_identity() == Manifest.load(Path(tiny_server.repository) / f"{NAME}-engine" / "1").identity
