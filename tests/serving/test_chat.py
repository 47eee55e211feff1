"""`chat` against the real server: an answer on a terminal, and a context that is full."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from deepseek_triton.builders.cli import main
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.conftest import MAX_SEQ_LEN, NAME
from tests.support.terminal import terminal

pytestmark = pytest.mark.server


def test_a_chat_on_a_terminal(server: TritonServer, tmp_path: Path) -> None:
    with terminal("chat", NAME, "--url", server.grpc_url, "--temperature", "0") as chat:
        chat.wait_for(f"{NAME} at {server.grpc_url}, a context of {MAX_SEQ_LEN} tokens")
        chat.type("What is the capital of France?\n")
        chat.wait_for("tokens/s", timeout_s=60)
        assert b"Paris" in chat.screen
        chat.type(f"/save {tmp_path / 'chat.json'}\n")
        chat.wait_for("wrote ")
        chat.type("quit\n")
        assert chat.process.wait(60) == 0
    turns = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] and "Paris" in turns[1]["content"]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_full_context_is_trimmed(
    tiny_server: TritonServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], protocol: str
) -> None:
    lines = [" ".join(f"{word}{i}" for i in range(60)) for word in ("red", "blue", "green", "black")]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    url = tiny_server.grpc_url if protocol == "grpc" else tiny_server.http_url
    assert main(["chat", NAME, "--url", url, "--protocol", protocol, "--max-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) >= len(lines)
    assert f"the context of {MAX_SEQ_LEN} tokens is full: it no longer holds the oldest " in err
