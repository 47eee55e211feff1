"""API keys: their file, their command, and what a request without one meets."""

from __future__ import annotations

import asyncio
import json
import stat
import threading
from pathlib import Path

import httpx
import pytest

from deepseek_triton.gateway.cli import main
from deepseek_triton.gateway.protection.keys.api_key import ApiKey, id_of
from deepseek_triton.gateway.protection.keys.store import KeyStoreError, open_store
from tests.gateway.test_app import CHAT
from tests.support.gateway import FakeBackend, gateway
from tests.support.redis import needs_redis, redis_server

PATHS = ("/v1/models", "/v1/chat/completions", "/v1/messages", "/openapi.json", "/nowhere")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def add(place: object, *options: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["keys", "add", "alice", "--keys", str(place), *options]) == 0
    return capsys.readouterr().out.strip()


def use_the_command(place: object, capsys: pytest.CaptureFixture[str]) -> None:
    """A key is made, opens the door without a restart, and is revoked without one."""
    with gateway(FakeBackend(), keys=str(place)) as url, httpx.Client(base_url=url) as client:
        assert client.get("/v1/models", headers=bearer("sk-0123456789abcdef-" + "a" * 43)).status_code == 401
        key = add(place, "--requests-per-minute", "7", capsys=capsys)
        answer = client.get("/v1/models", headers=bearer(key))
        assert (answer.status_code, answer.headers["x-ratelimit-limit-requests"]) == (200, "7")
        assert client.get("/v1/models", headers={"x-api-key": key}).status_code == 200
        assert main(["keys", "list", "--keys", str(place)]) == 0
        listed = capsys.readouterr().out
        assert "alice" in listed and "valid" in listed and key not in listed and key[-43:] not in listed
        assert main(["keys", "revoke", str(id_of(key)), "--keys", str(place)]) == 0
        statuses = [client.get("/v1/models", headers=bearer(key)).status_code]
        while statuses[-1] != 401 and len(statuses) < 30:  # Redis's keys are kept for a second
            threading.Event().wait(0.05)
            statuses.append(client.get("/v1/models", headers=bearer(key)).status_code)
        assert statuses[-1] == 401
        assert main(["keys", "list", "--keys", str(place)]) == 0
        assert "revoked" in capsys.readouterr().out


def test_keys_in_a_file_change_without_a_restart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    use_the_command(path, capsys)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.slow
@needs_redis
def test_keys_in_redis_change_without_a_restart(capsys: pytest.CaptureFixture[str]) -> None:
    with redis_server() as url:
        use_the_command(url, capsys)


def test_a_key_is_kept_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    first, second = add(path, capsys=capsys), add(path, capsys=capsys)
    assert first != second
    text = path.read_text(encoding="utf-8")
    assert first[-43:] not in text and second[-43:] not in text and len(json.loads(text)["keys"]) == 2


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_told_without_a_right_key(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "keys.json"
    key = add(place, capsys=capsys)
    wrong = [
        {},
        bearer("-"),
        bearer(key[:-1] + ("A" if key[-1] != "A" else "B")),
        bearer(key + "x"),
        bearer(f"sk-{'0' * 16}-{key[-43:]}"),
        {"Authorization": f"Basic {key}"},
        {"Authorization": f"Bearer {key}", "x-api-key": key[:-1] + "_"},
        {"x-api-key": "\u00e9"},
    ]
    with gateway(FakeBackend(), keys=str(place)) as url, httpx.Client(base_url=url) as client:
        for headers in wrong:
            encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            answer = client.post(path, headers=encoded, json=CHAT)
            assert answer.status_code == 401, headers
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["type"] == "authentication_error"
        assert client.get("/health/live").status_code == client.get("/health/ready").status_code == 200


def test_a_body_without_a_key_is_not_read(tmp_path: Path) -> None:
    from tests.support.raw_http import post_head, send_raw

    with gateway(FakeBackend(), keys=str(tmp_path / "keys.json")) as url:
        answer = send_raw(url, post_head(4_000_000))  # nothing of it follows
    assert answer.status == 401 and answer.seconds < 20


def test_a_broken_file_leaves_the_keys_that_were_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    key = add(path, capsys=capsys)
    store = open_store(str(path))

    async def find() -> ApiKey | None:
        return await store.find(str(id_of(key)))

    assert asyncio.run(find()) is not None
    path.write_text("{", encoding="utf-8")
    assert asyncio.run(find()) is not None
    with pytest.raises(KeyStoreError, match="can't be read"):
        asyncio.run(open_store(str(path)).find("0" * 16))
    assert main(["keys", "add", "bob", "--keys", str(path)]) == 1
    assert path.read_text(encoding="utf-8") == "{"  # an error doesn't wipe what may be mended


def test_writers_at_one_time_lose_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"

    def add_some() -> None:
        for _ in range(5):
            asyncio.run(open_store(str(path)).add(ApiKey.make("x")[0]))

    threads = [threading.Thread(target=add_some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asyncio.run(open_store(str(path)).all())) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keys.json", "keys.json.lock"]


def test_a_link_to_the_file_follows_what_it_points_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a secret that Kubernetes mounts: the link stays, what is behind it is exchanged."""
    first, second, link = tmp_path / "first.json", tmp_path / "second.json", tmp_path / "keys.json"
    key = add(first, capsys=capsys)
    link.symlink_to(first)
    store = open_store(str(link))
    assert asyncio.run(store.find(str(id_of(key)))) is not None
    other = add(second, capsys=capsys)
    (tmp_path / "new").symlink_to(second)
    (tmp_path / "new").replace(link)
    assert asyncio.run(store.find(str(id_of(key)))) is None
    assert asyncio.run(store.find(str(id_of(other)))) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "x"], "say where the keys are kept"),
        (["add", "", "--keys", "K"], "1 to 128 printable characters"),
        (["add", "x", "--keys", "K", "--max-running", "-1"], "max_running must be a whole number"),
        (["revoke", "abc", "--keys", "K"], "no key with the id 'abc'"),
        (["renew", "abc", "never", "--keys", "K"], "no key with the id 'abc'"),
        (["renew", "abc", "soon", "--keys", "K"], "days must be a number, at most 36500, or `never`, got 'soon'"),
        (["add", "x", "--keys", "K", "--expires-days", "0"], "at most 36500 days, got 0"),
        (["add", "x", "--keys", "K", "--expires-days", "nan"], "at most 36500 days, got nan"),
        (["add", "x", "--keys", "K", "--expires-days", "36501"], "at most 36500 days, got 36501"),
        (["list", "--keys", "redis://127.0.0.1:1/0"], "can't be read"),
    ],
)
def test_what_the_command_refuses(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used = [str(tmp_path / "keys.json") if argument == "K" else argument for argument in arguments]
    assert main(["keys", *used]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_strangers_need_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--host", "0.0.0.0", "--port", "0"]) == 1
    assert "--host 0.0.0.0 lets strangers in" in capsys.readouterr().err
