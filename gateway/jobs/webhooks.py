"""Webhooks: tell of a job's end, signed as the specification Standard Webhooks says, again and again until it is taken.

The body is {"id", "type": "job.STATUS", "created_at", "data": the job}. `webhook-id` is the same each time.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import logging
import random
import time
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit, urlunsplit

import httpx

from deepseek_triton.gateway.backend.addresses import Resolve, resolve
from deepseek_triton.gateway.jobs.addresses import public_address
from deepseek_triton.gateway.jobs.job import QueuedJob, WebhookRefusedError
from deepseek_triton.gateway.jobs.queue import JobQueue
from deepseek_triton.gateway.observe.metrics import GatewayMetrics

log = logging.getLogger(__name__)

TIMEOUT_S = 10.0
LEASE_S = 30.0  # longer than a try takes
AT_ONCE = 8
MAX_TRIES = 8
FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 600.0
SECRET_HEAD = "whsec_"


class Webhooks:
    """Sends what is due. hosts: those that may be told."""

    def __init__(
        self, queue: JobQueue, metrics: GatewayMetrics, hosts: Sequence[str], look_up: Resolve = resolve
    ) -> None:
        self._queue, self._metrics, self._hosts, self._look_up = queue, metrics, hosts, look_up
        # Neither a proxy of the environment nor a redirect leads elsewhere.
        self._client = httpx.AsyncClient(timeout=TIMEOUT_S, follow_redirects=False, trust_env=False)

    async def step(self) -> None:
        """Send what is due now. Raises `QueueError`."""
        due = await self._queue.take_hooks(AT_ONCE, LEASE_S)
        await asyncio.gather(*(self._tell(job, tries) for job, tries in due))

    async def close(self) -> None:
        """Release the connections."""
        await self._client.aclose()

    async def _tell(self, job: QueuedJob, tries: int) -> None:
        try:
            await asyncio.wait_for(self._send(job), LEASE_S / 2)
        except WebhookRefusedError as error:
            log.warning("the webhook of %s is given up: %s", job.id, error)
            await self._note(job, "failed")
        except (httpx.HTTPError, OSError, asyncio.TimeoutError) as error:
            if tries >= MAX_TRIES:
                log.warning("the webhook of %s is given up after %d tries: %s", job.id, tries, error)
                await self._note(job, "failed")
            else:
                self._metrics.webhooks.labels("retried").inc()
                delay_s = min(FIRST_RETRY_S * 2 ** (tries - 1), LONGEST_RETRY_S)
                await self._queue.note_hook(job.id, "", delay_s * (1 + random.random() / 2))
        else:
            await self._note(job, "delivered")

    async def _note(self, job: QueuedJob, outcome: str) -> None:
        self._metrics.webhooks.labels(outcome).inc()
        await self._queue.note_hook(job.id, outcome)

    async def _send(self, job: QueuedJob) -> None:
        """Raises `httpx.HTTPError` for every answer but 2xx."""
        assert job.webhook is not None and job.finished_at is not None
        url = urlsplit(job.webhook["url"])
        address = await public_address(job.webhook["url"], self._hosts, self._look_up)
        place = f"[{address}]" if ":" in address else address
        netloc = place if url.port is None else f"{place}:{url.port}"
        form = {
            "id": f"evt_{job.id}",
            "object": "event",
            "type": f"job.{job.status}",
            "created_at": int(job.finished_at),
            "data": job.form(),
        }
        body = json.dumps(form, ensure_ascii=False, separators=(",", ":")).encode()
        headers = {
            "Host": url.netloc,
            "Content-Type": "application/json",
            **signature(job.webhook["secret"], f"evt_{job.id}", int(time.time()), body),
        }
        request = self._client.build_request(
            "POST",
            urlunsplit((url.scheme, netloc, url.path or "/", url.query, "")),
            headers=headers,
            content=body,
            extensions={"sni_hostname": url.hostname},
        )
        response = await self._client.send(request, stream=True)  # what the host says isn't read
        await response.aclose()
        if not response.is_success:
            raise httpx.HTTPError(f"the host answered {response.status_code}")


def signature(secret: str, event_id: str, timestamp: int, body: bytes) -> Mapping[str, str]:
    """The headers of Standard Webhooks. A secret that begins with whsec_ is base64; others are taken as they are."""
    digest = hmac.digest(secret_bytes(secret), f"{event_id}.{timestamp}.".encode() + body, hashlib.sha256)
    signed = base64.b64encode(digest).decode()
    return {"webhook-id": event_id, "webhook-timestamp": str(timestamp), "webhook-signature": f"v1,{signed}"}


def secret_bytes(secret: str) -> bytes:
    """The key that a secret means. Raises `ValueError`."""
    if not secret.startswith(SECRET_HEAD):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix(SECRET_HEAD), validate=True)
    except binascii.Error as error:
        raise ValueError("a secret that begins with whsec_ must go on in base64") from error
