"""`/v1/batches` by OpenAI's client: a real gateway, a real Redis, a backend whose answers the test writes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
import redis
from openai.types import Batch

from deepseek_triton.clients import Chunk, Embedding, ServerUnavailable
from deepseek_triton.gateway.backend.base import UpstreamCall
from deepseek_triton.gateway.protection.keys.api_key import ApiKey
from deepseek_triton.gateway.protection.keys.store import open_store
from tests.gateway.test_app import CHAT
from tests.support.gateway import HELLO, FakeBackend, gateway
from tests.support.redis import needs_redis
from tests.support.waiting import until as wait_until

pytestmark = needs_redis
PATH: Any = "/v1/chat/completions"
SLOW = [Chunk("a", "", 5, index + 1) for index in range(400)]


def line(custom_id: object = "a", **more: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": PATH, "body": CHAT, **more}


def upload(client: openai.OpenAI, lines: Sequence[object]) -> str:
    """A file's id; what is no text is written as JSON."""
    text = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines)
    return client.files.create(file=("lines.jsonl", text.encode()), purpose="batch").id


def create(client: openai.OpenAI, lines: Sequence[object], **more: Any) -> Batch:
    given = {"endpoint": PATH, "completion_window": "24h", **more}
    return client.batches.create(input_file_id=upload(client, lines), **given)


def until(client: openai.OpenAI, batch: Batch, is_right: Callable[[Batch], bool]) -> Batch:
    deadline = time.monotonic() + 60
    while not is_right(batch):
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)
        batch = client.batches.retrieve(batch.id)
    return batch


def ended(client: openai.OpenAI, batch: Batch) -> Batch:
    return until(client, batch, lambda one: one.status in ("completed", "failed", "expired", "cancelled"))


def counts(batch: Batch) -> tuple[int, int, int]:
    found = batch.request_counts
    assert found is not None
    return found.total, found.completed, found.failed


def results(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    """custom_id → its line; none stands twice."""
    rows = [json.loads(text) for text in client.files.content(file_id).text.splitlines()] if file_id else []
    found = {row["custom_id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


class EmbeddingBackend(FakeBackend):
    """It embeds, too."""

    async def embed(self, model: str, texts: Sequence[str], call: UpstreamCall) -> tuple[Embedding, ...]:
        return tuple(Embedding((3.0, 4.0), 2) for _ in texts)


@pytest.fixture(scope="module")
def served(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, FakeBackend]]:
    backend = EmbeddingBackend()
    directory = str(tmp_path_factory.mktemp("batches") / "files")
    settings: dict[str, Any] = {"max_batch_lines": 300, "batch_window": 40, "max_body_bytes": 200_000}
    with gateway(backend, redis_url=redis_url, files_dir=directory, **settings) as url:
        yield url, backend


@pytest.fixture
def backend(served: tuple[str, FakeBackend]) -> FakeBackend:
    backend = served[1]
    backend.chunks, backend.pause_s, backend.error = HELLO, 0.0, None
    backend.requests.clear()
    return backend


@pytest.fixture
def client(served: tuple[str, FakeBackend], backend: FakeBackend) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.slow
def test_each_line_has_one_result(client: openai.OpenAI) -> None:
    lines = [line(f"line {index}") for index in range(150)]
    lines[70]["body"] = {**CHAT, "model": "unknown"}
    lines[71]["body"] = {**CHAT, "temperature": "hot"}
    batch = create(client, lines, metadata={"for": "é"})
    assert (batch.status, batch.object, batch.endpoint) == ("validating", "batch", PATH)
    assert batch.expires_at == batch.created_at + 86400 and batch.completion_window == "24h"
    batch = ended(client, batch)
    assert (batch.status, counts(batch), batch.metadata) == ("completed", (150, 148, 2), {"for": "é"})
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at  # type: ignore[operator]
    output, errors = results(client, batch.output_file_id), results(client, batch.error_file_id)
    assert output.keys() | errors.keys() == {one["custom_id"] for one in lines} and len(output) == 148
    row = output["line 0"]
    assert row["id"].startswith("batch_req_") and row["error"] is None and row["response"]["status_code"] == 200
    assert row["response"]["body"]["choices"][0]["message"]["content"] == "Hello"
    assert {name: row["response"]["status_code"] for name, row in errors.items()} == {"line 70": 404, "line 71": 400}
    assert errors["line 71"]["response"]["body"]["error"]["param"] == "temperature"
    for file_id in (batch.output_file_id, batch.error_file_id):
        assert client.files.retrieve(file_id or "").purpose == "batch_output"


@pytest.mark.slow
def test_batches_are_listed_the_newest_first(client: openai.OpenAI) -> None:
    ids = [ended(client, create(client, [line()])).id for _ in range(3)]
    page = client.batches.list(limit=2)
    assert [one.id for one in page.data] == [ids[2], ids[1]] and page.has_more
    assert client.batches.list(limit=2, after=ids[1]).data[0].id == ids[0]
    assert [one.id for one, _ in zip(client.batches.list(limit=2), range(3), strict=False)] == ids[::-1]
    with pytest.raises(openai.BadRequestError):
        client.batches.list(after="batch_x")


WRONG: list[tuple[list[Any], list[tuple[str, int | None]]]] = [
    (["{"], [("invalid_json_line", 1)]),
    ([line(), "[]", line("b")], [("invalid_json_line", 2)]),
    ([line(), "", '{"a": 1, "a": 2}'], [("invalid_json_line", 3)]),
    ([line(), "\ud83d".encode("utf-8", "replace").decode() + "x"], [("invalid_json_line", 2)]),
    ([line(), line(), line("b"), line("b")], [("duplicate_custom_id", 2), ("duplicate_custom_id", 4)]),
    ([{**line(), "custom_id": 1}, {**line(), "custom_id": ""}, {**line(), "custom_id": "x" * 513}],
     [("invalid_custom_id", 1), ("invalid_custom_id", 2), ("invalid_custom_id", 3)]),
    ([{name: value for name, value in line().items() if name != missing} for missing in line()],
     [("missing_required_parameter", number) for number in range(1, 5)]),
    ([line(method="GET"), line(method=None)], [("invalid_method", 1), ("invalid_method", 2)]),
    ([line(url="/v1/embeddings"), line(url=1)], [("invalid_url", 1), ("invalid_url", 2)]),
    ([line(body=[]), line(body=None)], [("invalid_body", 1), ("invalid_body", 2)]),
    ([line(body={**CHAT, "stream": True})], [("unsupported_parameter", 1)]),
    ([line(nonsense=1)], [("unknown_parameter", 1)]),
    ([line(f"{index}") for index in range(301)], [("too_many_requests", 301)]),
    ([], [("empty_file", None)]),
    (["", "  ", ""], [("empty_file", None)]),
    ([line(), *[""] * 1500, line("b")], [("too_many_requests", 1200)]),
    ([line("x", body={"a": "y" * 300_000} | CHAT), line("x")], [("line_too_long", 1)]),
    (["{"] * 150, [("invalid_json_line", number) for number in range(1, 101)]),
]  # fmt: skip


@pytest.mark.slow
def test_a_file_with_wrong_lines_fails_and_tells_which(client: openai.OpenAI) -> None:
    batches = [create(client, lines) for lines, _ in WRONG]
    for begun, (_, expected) in zip(batches, WRONG, strict=True):
        batch = ended(client, begun)
        assert batch.status == "failed" and batch.failed_at is not None and batch.errors is not None, expected
        assert [(one.code, one.line) for one in batch.errors.data or []] == expected
        assert all(one.message for one in batch.errors.data or [])
        assert batch.output_file_id is None and batch.error_file_id is None


@pytest.mark.slow
def test_line_ends_blank_lines_and_a_byte_order_mark_are_no_fault(client: openai.OpenAI) -> None:
    text = "\ufeff" + "\r\n".join([json.dumps(line("a")), "", json.dumps(line("b"), indent=None), "", ""])
    batch = ended(client, create(client, [text]))
    assert counts(batch) == (2, 2, 0) and set(results(client, batch.output_file_id)) == {"a", "b"}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/models"}, "endpoint"),
        ({"endpoint": "/v1/jobs"}, "endpoint"),
        ({"completion_window": "x"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"completion_window": "8d"}, "completion_window"),
        ({"completion_window": "24"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(index): "x" for index in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after.seconds"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
    ],
)
def test_a_wrong_batch_is_refused_at_once(client: openai.OpenAI, change: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        create(client, [line()], **change)
    assert raised.value.param == param


@pytest.mark.slow
def test_files_that_arent_there_or_arent_for_batches(client: openai.OpenAI) -> None:
    for file_id in ("file-x", "file-" + "0" * 32):
        with pytest.raises(openai.NotFoundError) as raised:
            client.batches.create(input_file_id=file_id, endpoint=PATH, completion_window="24h")
        assert raised.value.param == "input_file_id"
    output = ended(client, create(client, [line()])).output_file_id
    with pytest.raises(openai.BadRequestError):
        client.batches.create(input_file_id=output or "", endpoint=PATH, completion_window="24h")
    for call in (client.batches.retrieve, client.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            call("batch_" + "0" * 32)


@pytest.mark.slow
def test_a_cancelled_batch_keeps_what_was_answered_and_tells_the_rest(
    client: openai.OpenAI, backend: FakeBackend
) -> None:
    batch = create(client, [line(str(index)) for index in range(100)])
    until(client, batch, lambda one: counts(one)[1] > 0)
    backend.chunks, backend.pause_s = SLOW, 0.05
    cancelled = client.batches.cancel(batch.id)
    assert cancelled.status in ("cancelling", "cancelled") and cancelled.cancelling_at is not None
    batch = ended(client, batch)
    total, num_completed, num_failed = counts(batch)
    assert batch.status == "cancelled" and batch.cancelled_at is not None and total == 100 == num_completed + num_failed
    output, errors = results(client, batch.output_file_id), results(client, batch.error_file_id)
    assert len(output) == num_completed > 0 and len(errors) == num_failed and not output.keys() & errors.keys()
    assert {row["error"]["code"] for row in errors.values()} == {"batch_cancelled"}
    assert client.batches.cancel(batch.id).status == "cancelled"
    wait_until(lambda: backend.running == 0)  # slots are free again


@pytest.mark.slow
def test_a_batch_that_has_ended_cant_be_cancelled(client: openai.OpenAI) -> None:
    batch = ended(client, create(client, [line()]))
    with pytest.raises(openai.ConflictError) as raised:
        client.batches.cancel(batch.id)
    assert raised.value.code == "batch_ended"


@pytest.mark.slow
def test_an_expired_batch_keeps_what_was_answered_and_tells_the_rest(
    client: openai.OpenAI, backend: FakeBackend
) -> None:
    backend.chunks, backend.pause_s = SLOW, 0.05
    batch = ended(client, create(client, [line(str(index)) for index in range(100)], completion_window="2s"))
    assert batch.status == "expired" and batch.expired_at is not None and counts(batch) == (100, 0, 100)
    assert batch.output_file_id is None and batch.expired_at >= batch.expires_at  # type: ignore[operator]
    errors = results(client, batch.error_file_id)
    assert len(errors) == 100 and {row["error"]["code"] for row in errors.values()} == {"batch_expired"}
    assert {row["response"] for row in errors.values()} == {None}


@pytest.mark.slow
def test_a_line_is_no_job_for_clients(client: openai.OpenAI, backend: FakeBackend) -> None:
    backend.chunks, backend.pause_s = SLOW, 0.05
    batch = create(client, [line()])
    until(client, batch, lambda one: one.status == "in_progress" and backend.running > 0)
    path = f"/jobs/batch_req_{batch.id.removeprefix('batch_')}_1"
    with pytest.raises(openai.NotFoundError):
        client.get(path, cast_to=object)
    with pytest.raises(openai.NotFoundError):
        client.post(f"{path}/cancel", cast_to=object)
    client.batches.cancel(batch.id)
    ended(client, batch)


@pytest.mark.slow
def test_the_file_may_be_deleted_while_its_batch_runs(client: openai.OpenAI, backend: FakeBackend) -> None:
    backend.pause_s = 0.05
    batch = create(client, [line(str(index)) for index in range(100)])
    assert client.files.delete(batch.input_file_id).deleted
    assert counts(ended(client, batch)) == (100, 100, 0)


@pytest.mark.slow
def test_a_server_that_fails_is_asked_again(client: openai.OpenAI, backend: FakeBackend) -> None:
    backend.error = ServerUnavailable("it died")
    batch = create(client, [line()])
    wait_until(lambda: backend.requests)
    backend.error = None
    assert counts(ended(client, batch)) == (1, 1, 0)


@pytest.mark.slow
def test_lines_are_the_least_urgent(client: openai.OpenAI, backend: FakeBackend) -> None:
    lines = [line("a"), line("b", body={**CHAT, "priority": 1}), line("c", body={**CHAT, "priority": 4})]
    ended(client, create(client, lines))
    assert sorted(request.priority or 0 for request in backend.requests) == [3, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("endpoint", "body", "answer"),
    [
        ("/v1/completions", {"model": "fake", "prompt": "x"}, "Hello"),
        ("/v1/responses", {"model": "fake", "input": "x"}, "Hello"),
        ("/v1/embeddings", {"model": "fake", "input": ["x"]}, "[0.6, 0.8]"),
    ],
)
def test_other_endpoints(client: openai.OpenAI, endpoint: str, body: dict[str, Any], answer: str) -> None:
    batch = ended(client, create(client, [line(url=endpoint, body=body)], endpoint=endpoint))
    response = results(client, batch.output_file_id)["a"]["response"]["body"]
    assert answer in json.dumps(response) and response.get("store") in (None, False)


@pytest.mark.slow
def test_metrics(served: tuple[str, FakeBackend], client: openai.OpenAI) -> None:
    ended(client, create(client, [line()]))
    text = client.get("../metrics", cast_to=str)
    for name in ("gateway_batches_active", "gateway_batch_oldest_seconds", "gateway_files_bytes"):
        assert name in text
    assert 'gateway_batch_lines_total{outcome="completed"}' in text
    assert 'gateway_jobs_waiting{priority="batch"}' in text


@pytest.mark.slow
def test_a_batch_belongs_to_its_key_and_a_key_has_few(redis_url: str, tmp_path: Path) -> None:
    keys = str(tmp_path / "keys.json")
    texts = []
    for name in ("alice", "bob"):
        key, text = ApiKey.make(name, tokens_per_minute=1000)
        asyncio.run(open_store(keys).add(key))
        texts.append(text)
    settings: dict[str, Any] = {"keys": keys, "files_dir": str(tmp_path / "files"), "max_batches": 1}
    with gateway(FakeBackend(), redis_url=redis_url, **settings) as url:
        alice, bob = (openai.OpenAI(base_url=f"{url}/v1", api_key=text, max_retries=0) for text in texts)
        with alice, bob:
            batch = create(alice, [line(str(index)) for index in range(200)])
            with pytest.raises(openai.RateLimitError) as raised:
                create(alice, [line()])
            assert raised.value.code == "too_many_batches"
            file_id = upload(alice, [line()])
            with pytest.raises(openai.NotFoundError):
                bob.batches.create(input_file_id=file_id, endpoint=PATH, completion_window="24h")
            for call in (bob.batches.retrieve, bob.batches.cancel):
                with pytest.raises(openai.NotFoundError) as missing:
                    call(batch.id)
                assert missing.value.code == "batch_not_found"
            assert bob.batches.list().data == []
            batch = ended(alice, batch)
            assert counts(batch) == (200, 200, 0) and len(results(alice, batch.output_file_id)) == 200
            with pytest.raises(openai.NotFoundError):
                bob.files.content(batch.output_file_id or "")


@pytest.mark.slow
def test_a_gateway_with_another_directory_leaves_a_batch_alone(
    redis_url: str, store: redis.Redis, tmp_path: Path
) -> None:
    first: dict[str, Any] = {"redis_url": redis_url, "files_dir": str(tmp_path / "a")}
    second: dict[str, Any] = {**first, "files_dir": str(tmp_path / "b")}
    with gateway(FakeBackend(), **first) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
        file_id = upload(client, [line()])
    with gateway(FakeBackend(), **second) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
        upload(client, [line()])
        deadline = time.monotonic() + 60
        while True:  # until it has seen that there are several
            with pytest.raises(openai.NotFoundError) as raised:
                client.batches.create(input_file_id=file_id, endpoint=PATH, completion_window="24h")
            if "--files-dir" in str(raised.value):
                break
            assert time.monotonic() < deadline, raised.value
            time.sleep(0.1)
