"""What a model or a server sends does nothing to the terminal, and stays what it is in a pipe."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from deepseek_triton.builders.cli import main
from deepseek_triton.clients.printable import printable
from deepseek_triton.clients.printing import json_line
from tests.clients.test_fakes import MODEL, Fail, FakeGrpcServer, reply, say
from tests.support.terminal import terminal

EVIL = "\x1b]0;title\x07\x1b[2J\x9b31mred\x08\r\x7f"
SHOWN = r"\x1b]0;title\x07\x1b[2J\x9b31mred\x08\r\x7f"


@pytest.mark.parametrize("code", [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029])
def test_every_control_character_but_tab_and_newline_is_shown(code: int) -> None:
    text = chr(code)
    assert printable(f"a{text}b") == (f"a{text}b" if text in "\t\n" else f"a{ascii(text)[1:-1]}b")


def test_other_characters_stay() -> None:
    text = "a\tb\nc é 你好 🗼 \u200d \u00a0"
    assert printable(text) == text


@pytest.mark.slow
def test_an_answer_on_a_terminal_and_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeGrpcServer(say("one\ttwo\n", EVIL)) as server:
        assert main(["generate", MODEL, "x", "--url", server.url]) == 0
        assert capsys.readouterr().out == f"one\ttwo\n{EVIL}\n"
        with terminal("generate", MODEL, "x", "--url", server.url, "-q") as run:
            run.wait_for("red")
            assert run.process.wait(60) == 0
            assert SHOWN.encode() in run.screen and not {0x1B, 0x07, 0x08, 0x7F} & set(run.screen)


@pytest.mark.slow
def test_reasoning_on_a_terminal() -> None:
    answer = reply("yes", "stop", reasoning_output=f"mm{EVIL}")
    with (
        FakeGrpcServer(lambda received: iter([answer])) as server,
        terminal("generate", MODEL, "x", "--url", server.url, "-q") as run,
    ):
        run.wait_for("yes")
        assert SHOWN.encode() in run.screen and b"\x07" not in run.screen


def test_an_error_of_the_server(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeGrpcServer(lambda received: iter([Fail(f"no{EVIL}")])) as server:
        assert main(["generate", MODEL, "x", "--url", server.url]) == 1
        assert capsys.readouterr().err == f"error: no{SHOWN}\n".replace(r"\r", " ")
        monkeypatch.setattr("sys.stdin", io.StringIO("x\n"))
        assert main(["chat", MODEL, "--url", server.url]) == 1
        assert capsys.readouterr().err == f"error: no{SHOWN}\n".replace(r"\r", " ")


def test_an_error_about_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "a\x1b[2Jb")]) == 1
    assert "\x1b" not in capsys.readouterr().err


def test_json_has_no_control_characters() -> None:
    line = json_line({"text": EVIL})
    assert printable(line) == line and json.loads(line) == {"text": EVIL}
