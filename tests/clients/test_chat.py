"""`chat`: its commands, pasted lines, a full context, and models that can't chat."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_triton.builders.cli import main
from deepseek_triton.clients.chat_commands import COMMANDS, is_command, is_exit, run_command
from deepseek_triton.clients.chat_history import ChatHistory
from deepseek_triton.clients.messages import Message
from tests.clients.test_fakes import MODEL, Fail, FakeGrpcServer, Received, Reply, say
from tests.support.terminal import terminal


@pytest.fixture
def server() -> Iterator[FakeGrpcServer]:
    with FakeGrpcServer(say("Par", "is")) as server:
        yield server


def sent(server: FakeGrpcServer) -> list[list[tuple[str, str]]]:
    return [
        [(turn["role"], turn["content"]) for turn in json.loads(received.inputs["messages"])["messages"]]
        for received in server.generated
    ]


@pytest.mark.slow
def test_commands_on_a_terminal(server: FakeGrpcServer, tmp_path: Path) -> None:
    with terminal("chat", MODEL, "--url", server.url) as chat:
        chat.wait_for(f"{MODEL} at {server.url}, a context of 256 tokens; /help lists the commands")
        chat.type("/help\n")
        for command in COMMANDS:
            chat.wait_for(command)
        chat.type("/system Be brief\n")
        chat.wait_for("the system's message is set")
        chat.type("one\n")
        chat.wait_for("Paris")
        chat.type(f"/save {tmp_path / 'chat.json'}\n")
        chat.wait_for("wrote ")
        chat.type("/claer\n")
        chat.wait_for("there is no command /claer; did you mean /clear?")
        chat.type("/clear\n")
        chat.wait_for("the chat begins anew")
        chat.type(" /two\n")
        chat.wait_for("Paris", 2)
        chat.type("exit\n")
        assert chat.process.wait(60) == 0
    system = ("system", "Be brief")
    assert sent(server) == [[system, ("user", "one")], [system, ("user", " /two")]]
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert [turn["content"] for turn in saved["messages"]] == ["Be brief", "one", "Paris"]


@pytest.mark.slow
def test_pasted_lines_are_one_message_and_so_is_a_block(server: FakeGrpcServer) -> None:
    pytest.importorskip("readline")
    with terminal("chat", MODEL, "--url", server.url) as chat:
        chat.wait_for("> ")
        chat.type("\x1b[200~one\ntwo\x1b[201~")
        chat.wait_for("two")
        chat.type("\n")
        chat.wait_for("Paris")
        chat.type('"""\nthree\n\nfour\n"""\n')
        chat.wait_for("Paris", 2)
        chat.type("\x04")  # Ctrl-D
        assert chat.process.wait(60) == 0
    questions = [turns[-1][1] for turns in sent(server)]
    assert questions == ["one\ntwo", "three\n\nfour"]


@pytest.mark.slow
def test_a_line_is_edited_and_comes_back_from_the_history(server: FakeGrpcServer) -> None:
    pytest.importorskip("readline")
    with terminal("chat", MODEL, "--url", server.url, "-q") as chat:
        chat.wait_for("> ")
        assert b"/help" not in chat.screen, "no banner with -q"
        chat.type("ello\x01h\n")  # Ctrl-A, to the line's begin
        chat.wait_for("Paris")
        chat.type("\x1b[A\n")  # up
        chat.wait_for("Paris", 2)
        assert b"tokens/s" not in chat.screen
    assert [turns[-1][1] for turns in sent(server)] == ["hello", "hello"]


def full(received: Received) -> Iterator[Reply]:
    """An engine with a context of 100 tokens, one for each character."""
    turns = json.loads(received.inputs["messages"])["messages"]
    length = sum(len(turn["content"]) for turn in turns)
    if length >= 100:
        yield Fail(f"the prompt has {length} tokens, the context holds 100; shorten the prompt")
    else:
        yield from say("y" * 20)(received)


def test_a_full_context_drops_the_oldest_turns_and_says_so(
    server: FakeGrpcServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = full
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(letter * 20 + "\n" for letter in "abcd")))
    assert main(["chat", MODEL, "--url", server.url, "--system", "sss"]) == 0
    out, err = capsys.readouterr()
    assert out == ("y" * 20 + "\n") * 4
    # 3 + 2 * 40 + 20 = 103 characters don't fit; without one exchange 63 do.
    notice = "the context of 100 tokens is full: it no longer holds the oldest question and its answer\n"
    assert err == notice * 2
    assert [content[0] for _, content in sent(server)[-1]] == ["s", "c", "y", "d"]


def test_one_message_that_fills_the_context_is_an_error(
    server: FakeGrpcServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = full
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 200 + "\n"))
    assert main(["chat", MODEL, "--url", server.url]) == 1
    assert capsys.readouterr().err == ("error: the prompt has 200 tokens, the context holds 100; shorten the prompt\n")


def test_a_scoring_model_is_refused_before_the_prompt(
    server: FakeGrpcServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.tensors[MODEL] = (["text_input", "labels"], ["label", "probabilities"])
    assert main(["chat", MODEL, "--url", server.url]) == 1
    assert capsys.readouterr().err == (
        f"error: {MODEL} is a scoring model, which generates no text; use: deepseek-triton score {MODEL} TEXT\n"
    )


def test_bytes_that_are_no_text(
    server: FakeGrpcServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("chat", "generate"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), "utf-8"))
        arguments = [command, MODEL, *(["-"] if command == "generate" else []), "--url", server.url]
        assert main(arguments) == 1
        assert capsys.readouterr().err.endswith("standard input can't be read: it is not UTF-8 text\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("a\udcffb\n"))  # what a C locale makes of such bytes
    assert main(["chat", MODEL, "--url", server.url]) == 1
    assert "it is not UTF-8 text" in capsys.readouterr().err
    assert server.generated == []


def test_a_chat_in_json(
    server: FakeGrpcServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\nexit\n"))
    assert main(["chat", MODEL, "--url", server.url, "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["text"] for answer in answers] == ["Paris", "Paris"], "without a terminal exit is a message"


# The parts


def question(text: str) -> Message:
    return Message("user", text)


def test_trimming_leaves_room_for_an_answer() -> None:
    history = ChatHistory()
    for _ in range(9):
        history.add(question("q" * 5), "a" * 5)
    assert history.trim("some other error", question("new")) == 0
    assert history.trim("the prompt has 93 tokens, the context holds 80", question("new")) == 4
    assert sum(len(message.content) for message in history.messages(question("new"))) <= 60
    assert history.context_len == 80
    history.clear()
    assert history.trim("the prompt has 93 tokens, the context holds 80", question("new")) == 0


def test_what_is_a_command() -> None:
    assert is_command("/help") and not is_command(" /help") and not is_command("/usr/bin\nls")
    assert is_exit(" Quit ") and is_exit("/exit") and not is_exit("exit the room")
    history = ChatHistory("old")
    assert run_command("/system", history) == "there is no system's message now" and history.system is None
    assert run_command("/save", history) == "name a file: /save FILE"
    assert run_command("/save /nowhere/x", history).startswith("/nowhere/x can't be written: ")


@pytest.mark.slow
def test_an_engine_that_doesn_t_tell_its_context_is_talked_to_all_the_same(server: FakeGrpcServer) -> None:
    server.max_seq_len = None
    with terminal("chat", MODEL, "--url", server.url) as chat:
        chat.wait_for(f"{MODEL} at {server.url}; /help lists the commands")
        chat.type("one\n")
        chat.wait_for("Paris")
