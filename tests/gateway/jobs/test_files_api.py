"""`/v1/files` of a real gateway with a real Redis, by OpenAI's client and by forms that no client sends."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import redis

from deepseek_triton.gateway.jobs.files.store import FileLimits, FileStore
from deepseek_triton.gateway.protection.keys.api_key import ApiKey
from deepseek_triton.gateway.protection.keys.store import open_store
from tests.support.gateway import FakeBackend, gateway
from tests.support.redis import needs_redis

HEAD = {"Content-Type": "multipart/form-data; boundary=b"}
FORM_END = b"--b--\r\n"


def field(name: str, value: str) -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()


def part(content: bytes = b"x", filename: str = "lines.jsonl", name: str = "file") -> bytes:
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="{filename}"\r\n\r\n'
    return head.encode() + content + b"\r\n"


PURPOSE = field("purpose", "batch")


def files_below(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("file-*") if path.is_file())


@pytest.fixture(scope="module")
def served(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A gateway, and where it keeps files."""
    directory = tmp_path_factory.mktemp("served") / "files"
    bounds: dict[str, Any] = {"max_body_bytes": 4096, "max_file_bytes": 100_000, "max_key_files_bytes": 150_000}
    with gateway(FakeBackend(), redis_url=redis_url, files_dir=str(directory), **bounds) as url:
        yield url, directory


@pytest.fixture
def directory(served: tuple[str, Path]) -> Path:
    """It is empty at first."""
    for path in files_below(served[1]):
        path.unlink()
    return served[1]


@pytest.fixture
def url(served: tuple[str, Path], directory: Path) -> str:
    return served[0]


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def upload(client: openai.OpenAI, content: bytes = b"{}\n", name: str = "lines.jsonl") -> openai.types.FileObject:
    return client.files.create(file=(name, content), purpose="batch")


@pytest.mark.slow
@needs_redis
def test_a_file_is_kept_listed_read_and_deleted(client: openai.OpenAI, directory: Path) -> None:
    content = b"\r\n--\r\n\x00\xff" * 9000  # larger than a JSON body may be
    file = upload(client, content)
    assert (file.bytes, file.filename, file.purpose, file.status) == (len(content), "lines.jsonl", "batch", "processed")
    assert file.expires_at == file.created_at + 30 * 86400
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == content
    assert [one.id for one in client.files.list()] == [file.id]
    assert client.files.delete(file.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as raised:
            call(file.id)
        assert raised.value.code == "file_not_found"
    assert files_below(directory) == []


@pytest.mark.slow
@needs_redis
def test_pages_of_a_list(client: openai.OpenAI) -> None:
    ids = [upload(client, name=f"{number}").id for number in range(5)]
    assert [file.id for file in client.files.list(limit=2)] == ids[::-1]  # the client goes on by itself
    assert [file.id for file in client.files.list(limit=3, order="asc")] == ids
    page = client.files.list(limit=2, after=ids[3])
    assert [file.id for file in page.data] == [ids[2], ids[1]] and page.has_more
    assert client.files.list(purpose="batch_output").data == []
    for wrong in ({"limit": 0}, {"limit": 10_001}, {"order": "x"}, {"after": "file-x"}):
        with pytest.raises(openai.BadRequestError):
            client.files.list(**wrong)


@needs_redis
@pytest.mark.parametrize(
    "name", ["../../../etc/passwd", "/etc/passwd", "a\\..\\b", ".", "..", "é 文.jsonl", "a" * 255, "x.json", "file-1"]
)
def test_a_name_is_told_and_never_a_path(client: openai.OpenAI, directory: Path, name: str) -> None:
    file = upload(client, b"{}", name)
    assert client.files.retrieve(file.id).filename == name
    assert {path.name for path in files_below(directory)} == {file.id, f"{file.id}.json"}
    assert {path.name for path in directory.parent.iterdir()} == {"files"}


@needs_redis
@pytest.mark.parametrize(
    "file_id", ["file-x", "..", "%2e%2e%2fid", "id", "file-" + "0" * 32, "file-" + "A" * 32, "x" * 500]
)
def test_what_is_no_files_id_is_not_there(url: str, client: openai.OpenAI, file_id: str) -> None:
    upload(client)
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        assert httpx.request(method, f"{url}/v1/files/{file_id}{path}").status_code in (404, 405)


@needs_redis
@pytest.mark.parametrize(
    ("body", "param"),
    [
        (PURPOSE + FORM_END, "file"),
        (part() + FORM_END, "purpose"),
        (part() + field("purpose", "fine-tune") + FORM_END, "purpose"),
        (part() + PURPOSE + PURPOSE + FORM_END, "purpose"),
        (part() + part() + PURPOSE + FORM_END, "file"),
        (part(filename="") + PURPOSE + FORM_END, "file"),
        (part(filename="a" * 256) + PURPOSE + FORM_END, "file"),
        (field("file", "text") + PURPOSE + FORM_END, "file"),
        (part() + PURPOSE + field("nonsense", "1") + FORM_END, "nonsense"),
        (part() + field("purpose", "x" * 2000) + FORM_END, "purpose"),
        (part() + PURPOSE + field("expires_after[seconds]", "7200") + FORM_END, "expires_after"),
        (part() + PURPOSE + field("expires_after[anchor]", "created_at") + FORM_END, "expires_after"),
        (part() + PURPOSE + field("expires_after[anchor]", "created_at") + field("expires_after[seconds]", "5")
         + FORM_END, "expires_after"),
        (part() + PURPOSE, None),
        (b"nonsense", None),
        (b"", None),
        (b"--b\r\nContent-Disposition: form-data; name=\"\xff\"\r\n\r\nx\r\n" + FORM_END, None),
    ],
)  # fmt: skip
def test_a_wrong_form_is_refused_and_leaves_nothing(url: str, directory: Path, body: bytes, param: str | None) -> None:
    answer = httpx.post(f"{url}/v1/files", content=body, headers=HEAD)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
    assert files_below(directory) == []


@needs_redis
def test_what_is_no_form_has_the_bounds_of_other_bodies(url: str) -> None:
    assert httpx.post(f"{url}/v1/files", json={"a": "x" * 5000}).status_code == 413
    header = b'--b\r\nContent-Disposition: form-data; name="' + b"x" * 20_000 + b'"\r\n\r\nx\r\n'
    assert httpx.post(f"{url}/v1/files", content=header + FORM_END, headers=HEAD).status_code == 400


@needs_redis
@pytest.mark.parametrize("kind", ["multipart/form-data", "application/octet-stream"])
def test_what_is_no_form_is_refused(url: str, kind: str) -> None:
    answer = httpx.post(f"{url}/v1/files", content=b"x", headers={"Content-Type": kind})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "Content-Type"


@needs_redis
def test_a_file_that_comes_before_its_purpose_and_ends_earlier(client: openai.OpenAI, url: str) -> None:
    more = field("expires_after[anchor]", "created_at") + field("expires_after[seconds]", "3600")
    answer = httpx.post(f"{url}/v1/files", content=part() + PURPOSE + more + FORM_END, headers=HEAD).json()
    assert answer["expires_at"] == answer["created_at"] + 3600
    expiry: Any = {"anchor": "created_at", "seconds": 7200}
    file = client.files.create(file=("x", b"x"), purpose="batch", expires_after=expiry)
    assert file.expires_at == file.created_at + 7200


@pytest.mark.slow
@needs_redis
def test_files_have_bounds_each_and_together(client: openai.OpenAI, url: str, directory: Path) -> None:
    def chunks(num_bytes: int) -> Iterator[bytes]:
        yield PURPOSE + part(b"")[:-2]
        for _ in range(num_bytes // 1000):
            yield b"x" * 1000
        yield b"\r\n" + FORM_END

    for num_bytes in (101_000, 300_000):  # the second is beyond the form's bound, too
        answer = httpx.post(f"{url}/v1/files", content=chunks(num_bytes), headers=HEAD)
        assert answer.status_code == 413, answer.text
    assert files_below(directory) == []
    upload(client, b"x" * 100_000)
    with pytest.raises(openai.RateLimitError) as raised:
        upload(client, b"x" * 60_000)
    assert raised.value.code == "files_full" and len(files_below(directory)) == 2
    upload(client, b"x" * 40_000)


@needs_redis
def test_a_client_that_leaves_in_the_middle_leaves_nothing(url: str, directory: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield PURPOSE + part(b"x" * 1000)[:-2]
        raise ConnectionError

    with pytest.raises(ConnectionError):
        httpx.post(f"{url}/v1/files", content=broken(), headers=HEAD)
    for _ in range(200):
        if not files_below(directory):
            return
        asyncio.run(asyncio.sleep(0.01))
    pytest.fail("the upload's part is still there")


@pytest.mark.slow
@needs_redis
def test_files_belong_to_their_key(redis_url: str, store: redis.Redis, tmp_path: Path) -> None:
    keys = str(tmp_path / "keys.json")
    texts = []
    for name in ("alice", "bob"):
        key, text = ApiKey.make(name)
        asyncio.run(open_store(keys).add(key))
        texts.append(text)
    with gateway(FakeBackend(), redis_url=redis_url, keys=keys, files_dir=str(tmp_path / "files")) as url:
        alice, bob = (openai.OpenAI(base_url=f"{url}/v1", api_key=text, max_retries=0) for text in texts)
        with alice, bob:
            file = upload(alice)
            for call in (bob.files.retrieve, bob.files.content, bob.files.delete):
                with pytest.raises(openai.NotFoundError):
                    call(file.id)
            assert bob.files.list().data == [] and [one.id for one in alice.files.list()] == [file.id]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/files"), ("GET", "/v1/files"), ("GET", "/v1/files/x"), ("GET", "/v1/files/x/content"),
        ("DELETE", "/v1/files/x"), ("POST", "/v1/batches"), ("GET", "/v1/batches"), ("GET", "/v1/batches/x"),
        ("POST", "/v1/batches/x/cancel"),
    ],
)  # fmt: skip
def test_without_redis_files_and_batches_are_off(method: str, path: str) -> None:
    body = {"input_file_id": "x", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    with gateway(FakeBackend()) as url:
        answer = httpx.request(method, url + path, json=body if path == "/v1/batches" and method == "POST" else None)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "queue_off"
    assert "the queue is off" in answer.json()["error"]["message"]


@needs_redis
def test_a_directory_that_cant_be_used_is_told(redis_url: str, store: redis.Redis, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with gateway(FakeBackend(), redis_url=redis_url, files_dir=str(tmp_path / "file")) as url:
        answer = httpx.post(f"{url}/v1/files", content=part() + PURPOSE + FORM_END, headers=HEAD)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "files_unavailable"


def test_what_is_over_is_swept(tmp_path: Path) -> None:
    directory = tmp_path / "files"
    store = FileStore(directory, FileLimits())
    expired, kept = _write(store, expires_s=0.5), _write(store, expires_s=3600)
    killed = store.create("alice")
    killed.write(b"x" * 100_000)
    old, running, new = (store.work(f"batch_{digit * 32}") for digit in "012")
    for folder in (old, running, new):
        folder.mkdir()
    for path in (*directory.rglob("*.part"), old, running):
        os.utime(path, (0, 0))
    assert store.find("alice", expired) is None
    store.sweep({running.name})
    assert {path.name for path in files_below(directory)} == {kept, f"{kept}.json"}
    assert {path.name for path in (directory / "batches").iterdir()} == {running.name, new.name}
    killed.abandon()


def _write(store: FileStore, expires_s: float) -> str:
    writer = store.create("alice")
    writer.write(b"12345")
    return writer.commit("x", "batch", expires_s).id
