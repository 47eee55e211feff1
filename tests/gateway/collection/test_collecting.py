"""What a gateway collects of its answers, and what it doesn't."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from deepseek_triton.clients import Chunk, RequestRejected, ToolCall
from deepseek_triton.gateway.cli import main
from deepseek_triton.gateway.collection import collector
from deepseek_triton.gateway.collection.files import CollectionFiles
from deepseek_triton.gateway.protection.keys.api_key import id_of
from tests.support.gateway import HELLO, MODEL, FakeBackend, gateway
from tests.support.waiting import until

HI: list[dict[str, Any]] = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": HI}
MISBEHAVE = "tests.gateway.collection.redactors:misbehave"
HEADER = "x-deepseek-collection"


@contextlib.contextmanager
def collecting(
    directory: Path, backend: FakeBackend | None = None, **settings: object
) -> Iterator[tuple[httpx.Client, CollectionFiles]]:
    """A client of a gateway that collects into `directory`."""
    with (
        gateway(backend or FakeBackend(), None, collect=str(directory), **settings) as url,
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        yield client, CollectionFiles(directory)


def answers(files: CollectionFiles, count: int) -> list[dict[str, Any]]:
    """So many answers, once they are there."""
    until(lambda: len(list(files.read("answers"))) >= count)
    found = list(files.read("answers"))
    assert len(found) == count
    return found


def counted(client: httpx.Client, kind: str = "answers") -> dict[str, int]:
    text = client.get("/metrics").text
    pattern = rf'gateway_collected_total{{kind="{kind}",outcome="(\w+)"}} (\d+)'
    return {outcome: int(value) for outcome, value in re.findall(pattern, text)}


def test_nothing_is_collected_unless_the_operator_says_so(tmp_path: Path) -> None:
    with gateway(FakeBackend()) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
        assert answer.status_code == 200 and HEADER not in answer.headers
        assert httpx.get(f"{url}/health/ready").json()["collection"] == "off"
        refused = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "store": True})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "store")
        told = httpx.post(f"{url}/v1/feedback", json={"request_id": "x", "label": "good"})
        assert (told.status_code, told.json()["error"]["code"]) == (404, "collection_off")


@pytest.mark.slow
def test_every_kind_of_answer_is_kept_in_the_form_that_learn_reads(tmp_path: Path) -> None:
    with collecting(tmp_path) as (client, files):
        assert client.get("/health/ready").json()["collection"] == "on"
        body = {**CHAT, "user": "bob@example.org"}
        whole = client.post("/v1/chat/completions", json=body, headers={"x-request-id": "first"})
        assert whole.headers[HEADER] == "on"
        [line] = answers(files, 1)
        assert line["messages"] == [*HI, {"role": "assistant", "content": "Hello"}]
        assert (line["id"], line["choice"], line["model"], line["version"]) == ("first", 0, MODEL, MODEL)
        assert line["finish_reason"] == "stop" and line["owner"] == "anonymous" and "bob" not in json.dumps(line)
        streamed = client.post("/v1/chat/completions", json={**CHAT, "stream": True, "store": True})
        assert streamed.headers[HEADER] == "on" and "[DONE]" in streamed.text
        client.post("/v1/completions", json={"model": MODEL, "prompt": ["One ", "Two "]})
        client.post("/v1/completions", json={"model": MODEL, "prompt": "Three ", "stream": True})
        client.post("/v1/responses", json={"model": MODEL, "input": "Four"})
        found = answers(files, 6)
        assert found[1]["messages"] == line["messages"]
        assert [(one["text"], one["prompt_chars"], one["choice"]) for one in found[2:5]] == [
            ("One Hello", 4, 0), ("Two Hello", 4, 1), ("Three Hello", 6, 0),
        ]  # fmt: skip
        assert found[5]["messages"] == [{"role": "user", "content": "Four"}, {"role": "assistant", "content": "Hello"}]
        assert counted(client) == {"written": 6}
        assert f"gateway_collection_bytes {float(files.num_bytes())}" in client.get("/metrics").text


CALL = (ToolCall(0, "c1", "weather", "{}"),)


UNKEPT: list[tuple[list[Chunk], dict[str, Any]]] = [
    ([Chunk("Hello", "stop", 5, 1)], {**CHAT, "store": False}),
    ([Chunk("", "stop", 5, 1, tool_calls=CALL)], CHAT),
    ([Chunk(" \n", "stop", 5, 1)], CHAT),
    ([Chunk("x", "stop", 5, 1)], {**CHAT, "messages": [*HI, {"role": "assistant", "content": "Hel"}]}),
    ([Chunk("x", "stop", 5, 1)], {**CHAT, "messages": [{"role": "user", "content": " "}]}),
    ([Chunk("x", "stop", 5, 1)], {**CHAT, "tools": [{"type": "function", "function": {"name": "time"}}]}),
]


@pytest.mark.slow
def test_what_is_refused_or_cannot_be_learnt_is_not_kept(tmp_path: Path) -> None:
    backend = FakeBackend()
    with collecting(tmp_path, backend) as (client, files):
        for chunks, body in UNKEPT:
            backend.chunks = chunks
            for stream in (False, True):
                answer = client.post("/v1/chat/completions", json={**body, "stream": stream})
                assert answer.headers[HEADER] == ("off" if body.get("store") is False else "on")
            client.post("/v1/completions", json={"model": MODEL, "prompt": "x", "store": False})
            client.post("/v1/responses", json={"model": MODEL, "input": "x", "store": False})
        backend.chunks = HELLO
        client.post("/v1/chat/completions", json=CHAT)  # what comes before it has been written by then
        [kept] = answers(files, 1)
        assert kept["messages"][-1]["content"] == "Hello"
        until(lambda: counted(client) == {"written": 1})


def test_an_answer_that_did_not_end_is_not_kept(tmp_path: Path) -> None:
    backend = FakeBackend([Chunk("Hel", "", 5, 1)], error=RequestRejected("broken", "internal"))
    with collecting(tmp_path, backend) as (client, files):
        client.post("/v1/chat/completions", json={**CHAT, "stream": True})
        client.post("/v1/chat/completions", json=CHAT)
        backend.error, backend.chunks, backend.pause_s = None, [Chunk("a", "", 5, 1)] * 99, 0.05
        with client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as stream:
            next(stream.iter_lines())
        until(lambda: backend.cancelled == 1)
        assert list(files.read("answers")) == []


@pytest.mark.slow
def test_a_key_may_be_exempt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = str(tmp_path / "keys.json")

    def add(*options: str) -> str:
        assert main(["keys", "add", "alice", "--keys", place, *options]) == 0
        return capsys.readouterr().out.strip()

    private, public = add("--no-collect"), add()
    with collecting(tmp_path / "c", keys=place) as (client, files):

        def ask(key: str, **more: object) -> httpx.Response:
            return client.post("/v1/chat/completions", json={**CHAT, **more}, headers={"x-api-key": key})

        assert ask(private).headers[HEADER] == "off" and ask(public).headers[HEADER] == "on"
        assert ask(private, store=True).status_code == 400
        assert main(["keys", "collect", str(id_of(public)), "off", "--keys", place]) == 0
        assert main(["keys", "collect", str(id_of(private)), "on", "--keys", place]) == 0
        assert ask(private).headers[HEADER] == "on" and ask(public).headers[HEADER] == "off"
        assert len({one["owner"] for one in answers(files, 2)}) == 2
        assert main(["keys", "list", "--keys", place]) == 0
        assert capsys.readouterr().out.count("never collected") == 1
        assert private[3:19] not in json.dumps(list(files.read("answers")))


@pytest.mark.slow
def test_only_the_one_who_asked_may_say_how_good_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = str(tmp_path / "keys.json")
    keys = []
    for _ in range(2):
        assert main(["keys", "add", "alice", "--keys", place]) == 0
        keys.append(capsys.readouterr().out.strip())
    with collecting(tmp_path / "c", keys=place) as (client, files):
        headers = [{"x-api-key": key} for key in keys]
        chat = client.post("/v1/chat/completions", json=CHAT, headers=headers[0])
        said = {"request_id": chat.headers["x-request-id"], "label": "good", "comment": "call +49 171 2345678"}
        other = client.post("/v1/feedback", json=said, headers=headers[1])
        assert (other.status_code, other.json()["error"]["code"]) == (404, "answer_not_found")
        assert client.post("/v1/feedback", json=said).status_code == 401
        mine = client.post("/v1/feedback", json=said, headers=headers[0])
        assert (mine.status_code, mine.json()["label"]) == (202, "good")
        until(lambda: len(list(files.read("feedback"))) == 1)
        [line] = files.read("feedback")
        assert line["comment"] == "call [phone]" and line["owner"] == answers(files, 1)[0]["owner"]
    with collecting(tmp_path / "c", keys=place) as (client, files):  # another process finds it in the files
        by_id = {"request_id": chat.json()["id"], "rating": 1}
        assert client.post("/v1/feedback", json=by_id, headers=headers[0]).json()["label"] == "bad"
        assert client.post("/v1/feedback", json=by_id, headers=headers[1]).status_code == 404


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"label": "good"}, "request_id"),
    ({"request_id": "x"}, "label"),
    ({"request_id": "x", "label": "fine"}, "label"),
    ({"request_id": "x", "rating": 6}, "rating"),
    ({"request_id": "x", "rating": 5, "label": "good"}, "rating"),
    ({"request_id": "x", "label": "good", "comment": "x" * 2001}, "comment"),
    ({"request_id": "x", "correction": "x" * 100_001}, "correction"),
    ({"request_id": "x", "choice": -1, "label": "good"}, "choice"),
]


def test_wrong_feedback_is_refused_by_name(tmp_path: Path) -> None:
    with collecting(tmp_path) as (client, _):
        for body, named in WRONG:
            answer = client.post("/v1/feedback", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, named)


@pytest.mark.slow
def test_a_redactor_that_misbehaves_loses_its_record_alone(tmp_path: Path) -> None:
    settings = {"collect_redactor": MISBEHAVE, "collect_redactor_s": 0.5}
    with collecting(tmp_path, None, **settings) as (client, files):
        for word in ("sleep", "spin", "die", "raise", "number", "secret", "fine"):
            body = {**CHAT, "messages": [{"role": "user", "content": word}]}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
        [line] = answers(files, 1)
        assert [one["content"] for one in line["messages"]] == ["FINE", "HELLO"]
        outcomes = {"redaction_timeout": 2, "redaction_failed": 3, "refused": 1, "written": 1}
        until(lambda: counted(client) == outcomes)


@pytest.mark.slow
def test_no_request_waits_for_what_is_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the redactor sleeps, requests are answered, and what doesn't fit into the queue is dropped and counted."""
    monkeypatch.setattr(collector, "MAX_WAITING", 5)
    with collecting(tmp_path, collect_redactor=MISBEHAVE, collect_redactor_s=60.0) as (client, _):
        body = {**CHAT, "messages": [{"role": "user", "content": "sleep"}]}
        began = time.monotonic()
        for _ in range(12):
            assert client.post("/v1/chat/completions", json=body).status_code == 200
        assert time.monotonic() - began < 50
        assert counted(client)["dropped_full"] in (6, 7)  # one is with the redactor
        monkeypatch.setattr(collector, "CLOSE_S", 0.1)


@pytest.mark.slow
def test_a_full_disk_is_counted_and_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting(tmp_path) as (client, files):
        with monkeypatch.context() as patch:
            patch.setattr(CollectionFiles, "append", _full)
            assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
            until(lambda: counted(client) == {"write_failed": 1})
        client.post("/v1/chat/completions", json=CHAT)
        answers(files, 1)


def _full(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.slow
def test_openais_client_asks_and_tells(tmp_path: Path) -> None:
    with collecting(tmp_path) as (client, files):
        with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none") as asking:
            chat = asking.chat.completions.create(model=MODEL, messages=HI, store=True, n=1)  # type: ignore[arg-type]
        said = client.post("/v1/feedback", json={"request_id": chat.id, "correction": "Hi"})
        assert said.status_code == 202
        answers(files, 1)


@pytest.mark.slow
def test_many_requests_at_once_are_all_kept(tmp_path: Path) -> None:
    with collecting(tmp_path) as (client, files):

        def ask() -> None:
            for _ in range(10):
                client.post("/v1/chat/completions", json=CHAT)

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({one["id"] for one in answers(files, 50)}) == 50
