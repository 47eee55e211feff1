"""A batch by OpenAI's client, answered by a real tritonserver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.gateway.conftest import THINKER
from tests.gateway.jobs.test_batches_api import counts, create, ended, line, results
from tests.support.gateway import gateway
from tests.support.redis import needs_redis

pytestmark = [pytest.mark.server, needs_redis]


def test_a_real_server_answers_each_line(thinker: TritonServer, redis_url: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"redis_url": redis_url, "files_dir": str(tmp_path / "files")}
    body = {"model": THINKER, "max_completion_tokens": 4, "temperature": 0}
    bodies = [{**body, "messages": [{"role": "user", "content": f"{number % 3}"}]} for number in range(24)]
    bodies[5] = {**bodies[5], "top_p": 7}
    with (
        gateway(backend_urls=(thinker.grpc_url,), models=(THINKER,), **settings) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        batch = ended(client, create(client, [line(str(number), body=one) for number, one in enumerate(bodies)]))
        assert batch.status == "completed" and counts(batch) == (24, 23, 1)
        output, errors = results(client, batch.output_file_id), results(client, batch.error_file_id)
        assert errors["5"]["response"]["status_code"] == 400
        expected = [client.chat.completions.create(**one) for one in bodies[:3]]  # type: ignore[call-overload]
    for number, row in output.items():
        answer = row["response"]["body"]
        assert answer["choices"][0]["message"] == expected[int(number) % 3].choices[0].message.to_dict()
        assert answer["usage"]["completion_tokens"] == 4
