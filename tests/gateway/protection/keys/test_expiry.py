"""Keys that expire: they open the door until then, and the metrics say when the next one does."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge

from deepseek_triton.gateway.cli import main
from deepseek_triton.gateway.protection.keys.api_key import ApiKey, after_days, id_of
from deepseek_triton.gateway.protection.keys.expiry import next_expiry, watch_expiry
from deepseek_triton.gateway.protection.keys.store import open_store
from tests.gateway.protection.keys.test_keys import add, bearer
from tests.support.gateway import FakeBackend, gateway
from tests.support.redis import needs_redis, redis_server

DAY_S = 86400.0
GAUGE = "gateway_key_expiry_timestamp_seconds"


def ago(seconds: float) -> str:
    return (datetime.now(timezone.utc) - timedelta(seconds=seconds)).isoformat()


def use_until_it_expires(place: object, capsys: pytest.CaptureFixture[str]) -> None:
    """A key opens the door, expires, and opens it again once it is renewed."""
    key = add(place, "--expires-days", "2", capsys=capsys)
    with gateway(FakeBackend(), keys=str(place)) as url, httpx.Client(base_url=url, headers=bearer(key)) as client:
        answer = client.get("/metrics")
        while f"{GAUGE} +Inf" in answer.text:  # until the keys were looked at
            answer = client.get("/metrics")
        expiry = float(next(line.split()[1] for line in answer.text.splitlines() if line.startswith(GAUGE)))
        assert expiry == pytest.approx(time.time() + 2 * DAY_S, abs=120)
        expire(place, key)
        wait_for(client, 401)
        assert "expired" in client.get("/v1/models").json()["error"]["message"]
        assert main(["keys", "list", "--keys", str(place)]) == 0
        assert "  expired 20" in capsys.readouterr().out
        assert main(["keys", "renew", str(id_of(key)), "0.5", "--keys", str(place)]) == 0
        wait_for(client, 200)
        assert main(["keys", "list", "--keys", str(place)]) == 0
        assert "  valid until 20" in capsys.readouterr().out


def expire(place: object, text: str) -> None:
    async def replace() -> None:
        store = open_store(str(place))
        found = {key.id: key for key in await store.all()}[str(id_of(text))]
        await store.replace(dataclasses.replace(found, expires=ago(1)))
        await store.close()

    asyncio.run(replace())


def wait_for(client: httpx.Client, status: int) -> None:
    """Redis's keys are kept for a second."""
    deadline = time.monotonic() + 30
    while client.get("/v1/models").status_code != status:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_key_in_a_file_expires(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    use_until_it_expires(tmp_path / "keys.json", capsys)


@pytest.mark.slow
@needs_redis
def test_a_key_in_redis_expires(capsys: pytest.CaptureFixture[str]) -> None:
    with redis_server() as url:
        use_until_it_expires(url, capsys)


def test_the_next_expiry_is_that_of_a_key_which_still_opens() -> None:
    soon, later, never, over = (
        ApiKey.make("x", expires=end)[0] for end in (after_days(1), after_days(9), None, ago(9))
    )
    revoked = dataclasses.replace(soon, revoked=ago(1))
    assert next_expiry([later, never, over, soon]) == soon.expires_at
    assert next_expiry([later, never, over, revoked]) == later.expires_at
    assert next_expiry([never, over, revoked]) == next_expiry([]) == math.inf


def test_keys_that_cannot_be_read_leave_the_gauge(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys.json"
    gauge = Gauge("expiry", "When.", registry=CollectorRegistry())
    path.write_text("{", encoding="utf-8")

    async def watch() -> list[float]:
        task, values = asyncio.create_task(watch_expiry(str(path), gauge, 0.001)), []
        while "isn't known" not in caplog.text:
            await asyncio.sleep(0.001)
        values.append(gauge._value.get())
        path.unlink()
        await open_store(str(path)).add(ApiKey.make("x", expires=after_days(1))[0])
        while not (value := gauge._value.get()):
            await asyncio.sleep(0.001)
        task.cancel()
        return [*values, value]

    before, after = asyncio.run(asyncio.wait_for(watch(), 30))
    assert before == 0 and after == pytest.approx(time.time() + DAY_S, abs=60)


@pytest.mark.parametrize("expires", ["soon", "2026-01-01", "2026-01-01T00:00:00", 5, ""])
def test_a_time_that_is_none_is_refused(expires: object) -> None:
    form = ApiKey.make("x")[0].to_form() | {"expires": expires}
    with pytest.raises(ValueError, match="expires must be a time in ISO 8601 with its offset"):
        ApiKey.from_form(form)
