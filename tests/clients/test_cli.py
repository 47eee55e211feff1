"""The commands against a fake server, and against a real terminal where that is the point."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_triton.builders.cli import main
from deepseek_triton.extras import install_command
from tests.clients.test_fakes import MODEL, Fail, FakeGrpcServer, Received, Reply, reply, rows, say, wait_until

COMMAND = """
import fcntl, sys, termios
from deepseek_triton.builders.cli import main
if sys.stdin.isatty():
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches this process
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def server() -> Iterator[FakeGrpcServer]:
    with FakeGrpcServer(say("Par", "is 🗼")) as server:
        yield server


def run(command: str, *arguments: str) -> int:
    return main([command, *arguments])


def sent_messages(server: FakeGrpcServer) -> list[list[tuple[str, str]]]:
    return [
        [(turn["role"], turn["content"]) for turn in json.loads(received.inputs["messages"])["messages"]]
        for received in server.generated
    ]


@pytest.mark.parametrize("options", [(), ("--no-stream",)])
def test_generate_prints_the_text_and_a_newline(
    server: FakeGrpcServer, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    assert run("generate", MODEL, " Hello ", "--url", server.url, *options) == 0
    assert capsys.readouterr() == ("Paris 🗼\n", "")
    assert server.generated[0].inputs == {"text_input": " Hello ", "stream": not options}


def test_generate_sends_its_options(server: FakeGrpcServer) -> None:
    options = (
        "--max-tokens=7", "--temperature=0.5", "--top-k=40", "--top-p=0.25", "--seed=9", "--min-p=0.125",
        "--repetition-penalty=1.5", "--presence-penalty=-1", "--frequency-penalty=2", "--stop=one", "--stop=two",
        "--thinking-budget=5", "--choice=yes", "--choice=no", "--log-probs=3",
    )  # fmt: skip
    assert run("generate", MODEL, "x", "--url", server.url, *options) == 0
    assert server.generated[0].inputs == {
        "text_input": "x",
        "stream": True,
        "max_tokens": 7,
        "temperature": 0.5,
        "top_k": 40,
        "top_p": 0.25,
        "seed": 9,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 2.0,
        "stop_words": ["one", "two"],
        "thinking_token_budget": 5,
        "guided_decoding_guide_type": "choice",
        "guided_decoding_guide": '["yes", "no"]',
        "num_top_log_probs": 3,
    }


def test_everything_as_json(server: FakeGrpcServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", MODEL, "x", "--url", server.url, "--json") == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert (answer["text"], answer["finish_reason"], answer["num_output_tokens"], err) == ("Paris 🗼", "stop", 2, "")
    assert answer["total_s"] > 0
    server.script = lambda received: iter(
        [rows(reply("a", "stop", sequence_index=0), reply("b", "length", sequence_index=1))]
    )
    assert run("generate", MODEL, "x", "--url", server.url, "--json", "--n=2") == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == ["a", "b"]


def test_the_environment_names_server_and_model(
    server: FakeGrpcServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEEPSEEK_TRITON_URL", f"grpc://{server.url}")
    assert run("generate", MODEL, "x") == 0
    monkeypatch.setenv("DEEPSEEK_TRITON_MODEL", MODEL)
    assert run("generate", "y") == 0
    assert run("generate", "another", "z") == 0
    assert [received.inputs["text_input"] for received in server.generated] == ["x", "y"]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    assert run("chat") == 0
    assert capsys.readouterr().out == "Paris 🗼\n" * 4


def test_a_schema_comes_from_its_file(
    server: FakeGrpcServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "schema.json"
    arguments = ("generate", MODEL, "x", "--url", server.url, "--json-schema", str(path))
    assert run(*arguments) == 1
    assert capsys.readouterr().err == (
        f"error: json-schema must name a file that can be read, got '{path}': No such file or directory\n"
    )
    path.write_text('{"type": "object"}')
    assert run(*arguments) == 0
    inputs = server.generated[0].inputs
    assert (inputs["guided_decoding_guide_type"], inputs["guided_decoding_guide"]) == (
        "json_schema",
        '{"type": "object"}',
    )


def test_two_guides_are_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("generate", MODEL, "x", "--regex", "a", "--choice", "b")
    assert "not allowed with" in capsys.readouterr().err


def test_several_answers_come_one_after_another(server: FakeGrpcServer, capsys: pytest.CaptureFixture[str]) -> None:
    def script(received: Received) -> Iterator[Reply]:
        assert received.inputs["num_return_sequences"] == 2 and not received.inputs["stream"]
        yield rows(reply("Paris", "stop", sequence_index=0), reply("Rome", "error", sequence_index=1))

    server.script = script
    assert run("generate", MODEL, "x", "--url", server.url, "--n=2", "--verbose") == 1
    out, err = capsys.readouterr()
    assert out == "Paris\nRome\n"
    lines = err.splitlines()
    assert lines[:2] == ["answer 1 of 2:", "answer 2 of 2:"]
    assert lines[2].startswith("3 tokens in, 2 out") and lines[2].endswith("finish_reason stop, error")
    assert lines[3].startswith("error: 1 of 2 answers broke off with an error; ")


@pytest.mark.parametrize("options", [(), ("--no-stream",)])
def test_reasoning_stays_out_of_standard_output(
    server: FakeGrpcServer, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    def script(received: Received) -> Iterator[Reply]:
        if received.inputs["stream"]:
            yield reply("", reasoning_output="Let me ")
            yield reply("", reasoning_output="see.")
            yield reply("Paris", "stop", reasoning_output="")
        else:
            yield reply("Paris", "stop", reasoning_output="Let me see.")

    server.script = script
    assert run("generate", MODEL, "x", "--url", server.url, *options) == 0
    assert capsys.readouterr() == ("Paris\n", "Let me see.\n")


def test_log_probs_go_to_standard_error(server: FakeGrpcServer, capsys: pytest.CaptureFixture[str]) -> None:
    top = '[{"id": 1, "token": "ĠParis", "log_prob": -0.25}, {"id": 2, "token": "ĠRome", "log_prob": -3}]'
    server.script = lambda received: iter(
        [reply(" Paris", "stop", 2, output_log_probs=[-0.25, -1], top_log_probs=[top, "[]"])]
    )
    assert run("generate", MODEL, "x", "--url", server.url, "--log-probs=2") == 0
    assert capsys.readouterr() == (
        " Paris\n",
        "token 1: -0.2500 of 'ĠParis' -0.2500, 'ĠRome' -3.0000\ntoken 2: -1.0000\n",
    )


def test_chat_begins_with_the_systems_message(server: FakeGrpcServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    assert run("chat", MODEL, "--url", server.url, "--system", "Be brief", "--no-thinking") == 0
    assert sent_messages(server) == [[("system", "Be brief"), ("user", "one")]]
    assert server.generated[0].inputs["enable_thinking"] is False


def test_generate_reads_a_prompt_as_it_is(server: FakeGrpcServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert run("generate", MODEL, "-", "--url", server.url) == 0
    assert server.generated[0].inputs["text_input"] == "two\nlines\n"


def test_verbose_prints_figures_to_stderr(server: FakeGrpcServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", MODEL, "x", "--url", server.url, "--verbose") == 0
    out, err = capsys.readouterr()
    assert out == "Paris 🗼\n"
    assert err.startswith("3 tokens in, 2 out in ")
    assert "tokens/s" in err and "time to first token" in err and err.endswith("finish_reason stop\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--max-tokens", "0"), "error: max_tokens must be at least 1, got 0\n"),
        (("--timeout", "0"), "error: timeout_s must be finite and above 0, got 0.0\n"),
        (
            ("--url", "ftp://x"),
            "error: url must be host:port, or begin with grpc://, http://, https://; got 'ftp://x'\n",
        ),
        (("--protocol", "grpc", "--url", "https://x"), "error: url must not begin with https:// for gRPC"),
        (("--protocol", "http", "--url", "127.0.0.1:1"), "error: no server at http://127.0.0.1:1"),
        (("--url", "http://127.0.0.1:1"), "error: no server at http://127.0.0.1:1"),
        (("--url", "127.0.0.1:1"), "error: no server at 127.0.0.1:1"),
    ],
)
def test_an_error_is_one_line(arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", MODEL, "x", *arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(expected)
    assert err.count("\n") == 1


def test_an_error_of_the_server_says_what_to_do(server: FakeGrpcServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.script = lambda received: iter([reply("Par"), Fail("out of\n  slots")])
    assert run("generate", MODEL, "x", "--url", server.url) == 1
    out, err = capsys.readouterr()
    assert out == "Par"
    assert err == "error: out of slots\n", "no hint where none helps"
    server.script = lambda received: iter([Fail(f"in ensemble '{MODEL}', Stub process is not healthy.")])
    assert run("generate", MODEL, "x", "--url", server.url) == 1
    assert capsys.readouterr().err == "error: Stub process is not healthy.; the server's log says more\n"
    server.script = lambda received: iter([Fail("max_tokens is 0; give at least 1")])
    assert run("generate", MODEL, "x", "--url", server.url) == 1
    assert capsys.readouterr().err == "error: max_tokens is 0; give at least 1\n", "the server's advice is enough"


def test_a_timeout_says_what_to_do(server: FakeGrpcServer, capsys: pytest.CaptureFixture[str]) -> None:
    def hang(received: Received) -> Iterator[Reply]:
        server.hang.wait(10)
        yield reply("late", "stop")

    server.script = hang
    assert run("generate", MODEL, "x", "--url", server.url, "--timeout", "0.2") == 1
    assert "--timeout" in capsys.readouterr().err
    assert len(server.stopped) == 1


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "deepseek_triton.clients.http", raising=False)
    monkeypatch.setitem(sys.modules, "httpx", None)
    assert run("generate", MODEL, "x", "--protocol", "http") == 1
    assert capsys.readouterr().err == f"error: httpx is not installed; run: {install_command('client')}\n"


def test_chat_keeps_the_history(
    server: FakeGrpcServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n  \ntwo"))
    assert run("chat", MODEL, "--url", server.url) == 0
    assert capsys.readouterr() == ("Paris 🗼\nParis 🗼\n", "")
    first = [("user", "one")]
    assert sent_messages(server) == [first, [*first, ("assistant", "Paris 🗼"), ("user", "two")]]


def test_chat_ends_at_an_error_without_a_terminal(
    server: FakeGrpcServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = lambda received: iter([Fail("out of slots")])
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert run("chat", MODEL, "--url", server.url) == 1
    assert len(server.generated) == 1
    assert capsys.readouterr().err.startswith("error: out of slots")


def test_chat_with_a_model_that_is_not_there(server: FakeGrpcServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("chat", "another", "--url", server.url) == 1
    assert capsys.readouterr().err == f"error: the server at {server.url} has no model 'another'; there is {MODEL}\n"
    server.ready_models.clear()
    assert run("chat", MODEL, "--url", server.url) == 1
    assert capsys.readouterr().err.startswith(f"error: model '{MODEL}' isn't ready at {server.url}: start")


def endless(received: Received) -> Iterator[Reply]:
    for _ in range(1000):
        yield reply("word ")
        time.sleep(0.01)


def think(received: Received) -> Iterator[Reply]:
    yield reply("", reasoning_output="hm, ")
    yield reply("", reasoning_output="hm")
    yield reply("Paris", "stop", reasoning_output="")


def popen(*arguments: str, **options: object) -> subprocess.Popen[bytes]:
    repository = Path(__file__).parents[2]
    return subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], cwd=repository, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.slow
def test_sigint_stops_generate_with_130(server: FakeGrpcServer) -> None:
    server.script = endless
    with popen("generate", MODEL, "x", "--url", server.url, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(4) == b"word"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (130, b"")
    assert server.stopped == [server.generated[0].request_id]


@pytest.mark.slow
def test_a_reader_that_leaves_stops_generate(server: FakeGrpcServer) -> None:
    server.script = endless
    with popen("generate", MODEL, "x", "--url", server.url, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(4) == b"word"
        process.stdout.close()
        assert process.wait(60) == 1
        assert process.stderr.read() == b""
    assert server.stopped == [server.generated[0].request_id]


@pytest.mark.slow
def test_chat_on_a_terminal(server: FakeGrpcServer) -> None:
    """Ctrl-C in an answer gives the prompt back, an error too; Ctrl-C at the prompt quits."""

    def script(received: Received) -> Iterator[Reply]:
        turn = json.loads(received.inputs["messages"])["messages"][-1]["content"]
        yield from {"long": endless, "bad": lambda _: iter([Fail("no")]), "short": think}[turn](received)

    server.script = script
    screen = b""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)

    def shows(text: bytes, count: int = 1) -> bool:
        nonlocal screen
        with contextlib.suppress(BlockingIOError):
            screen += os.read(ours, 65536)
        return screen.count(text) >= count

    with popen(
        "chat", MODEL, "--url", server.url, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        try:
            wait_until(lambda: shows(b"> "))
            os.write(ours, b"long\n")
            wait_until(lambda: shows(b"word word"))
            os.write(ours, b"\x03")
            wait_until(lambda: shows(b"> ", 2))
            assert server.stopped == [server.generated[0].request_id]
            os.write(ours, b"bad\n")
            wait_until(lambda: shows(b"> ", 3))
            assert b"error: no\r\n" in screen
            os.write(ours, b"short\n")
            wait_until(lambda: shows(b"> ", 4))
            assert b"\x1b[2mhm, hm\x1b[0m\r\nParis\r\n" in screen and b"tokens/s" in screen
            os.write(ours, b"\x03")
            assert process.wait(60) == 130
        finally:
            process.kill()
            os.close(ours)
            os.close(theirs)
    long, bad, short = sent_messages(server)
    assert [role for role, _ in bad] == ["user", "assistant", "user"]  # what was read of the answer is kept
    assert bad[1][1].startswith("word word") and bad[:2] == short[:2]
    assert short[2:] == [("user", "short")]  # the turn that failed never happened
    assert long == [("user", "long")]
