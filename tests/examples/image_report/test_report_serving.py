from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from deepseek_triton.clients import AsyncCatalogue, GenerateRequest, GrpcClient, RequestRejected, ServedModel
from deepseek_triton.clients.report import report_engine
from deepseek_triton.ensemble.protocol.contract import IMAGE, STREAM
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from deepseek_triton.examples.image_report.classifier import GRAPH_FILE, Classifier
from deepseek_triton.examples.image_report.client import ReportClient
from deepseek_triton.examples.image_report.findings import CALIBRATION_FILE, TemperatureScaling
from deepseek_triton.examples.image_report.images.decode import pixels_of
from deepseek_triton.examples.image_report.report import NOTICE, impressions, read_report
from deepseek_triton.examples.image_report.repository import DATA
from tests.conftest import NAME
from tests.examples.image_report.conftest import REPORT_NAME
from tests.examples.image_report.pictures import png, tile_png
from tests.support.gateway import gateway
from tests.support.serving import metrics, wait_until

pytestmark = pytest.mark.server
NUM_BESIDE = 7  # all eight slots generate: a report takes a second, alone a quarter


def client(server: TritonServer) -> ReportClient:
    return ReportClient(server.grpc_url, NAME)


@contextlib.contextmanager
def others_beside(server: TritonServer) -> Iterator[None]:
    """Others ask for reports, and get them: one whose client leaves is not done before the engine finds that out."""
    with client(server) as asked, ThreadPoolExecutor(NUM_BESIDE) as pool:
        reports = [pool.submit(asked.report, tile_png(seed)) for seed in range(NUM_BESIDE)]
        yield
        assert all(report.result().notice == NOTICE for report in reports)


@pytest.mark.timed  # a busy machine sends fewer and longer pieces
def test_a_report_streams_and_states_exactly_the_findings(report_server: TritonServer) -> None:
    """The text model's weights are random: only the schema can make it say so."""
    classifier, calibration = Classifier(DATA / GRAPH_FILE), TemperatureScaling.load(DATA / CALIBRATION_FILE)
    with client(report_server) as asked:
        for seed in (1, 2, 3):
            image = tile_png(seed)
            pieces = list(asked.stream(image))
            report = read_report("".join(pieces))
            assert report.findings == calibration.findings(classifier.logits(pixels_of(image)[None])[0].tolist())
            assert report.notice == NOTICE
            assert report.impression in impressions(report.findings)
            assert len(pieces) > 10, "it came piece by piece"


def test_requests_that_come_together_get_their_own_reports(report_server: TritonServer) -> None:
    images = [tile_png(seed) for seed in range(4, 9)]
    with client(report_server) as asked:
        alone = [asked.report(image).findings for image in images]
        together: dict[int, object] = {}

        def ask(number: int) -> None:
            together[number] = asked.report(images[number]).findings

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(images))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [together[number] for number in range(len(images))] == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "the image is empty"),
        (b"https://example.org/a.png", "neither a JPEG nor a PNG"),
        (png(16_000, 16_000), "at most 24,000,000"),
        (tile_png()[:2000], "cut off or damaged"),
    ],
)
def test_a_bad_image_is_the_clients_error(report_server: TritonServer, image: bytes, message: str) -> None:
    with client(report_server) as asked, pytest.raises(RequestRejected, match=message):
        asked.report(image)


def test_a_client_that_leaves_frees_the_engine(report_server: TritonServer) -> None:
    with client(report_server) as asked:

        def leave() -> None:
            stream = asked.stream(tile_png())
            next(stream)
            stream.close()

        frees_the_engine(report_server, leave)
        assert asked.report(tile_png()).findings


def frees_the_engine(server: TritonServer, leave: Callable[[], None]) -> None:
    """Check that a report whose client leaves is cancelled.

    On a busy machine a report may be done before the server knows that its client has gone: it is asked three times.
    """
    wait_until(server, 60, slots_used=0)
    cancelled = metrics(server)["requests_cancelled_total"]
    for is_last in (False, False, True):
        with others_beside(server):
            leave()
        try:
            wait_until(server, 60 if is_last else 5, slots_used=0, requests_cancelled_total=cancelled + 1)
        except AssertionError:
            if is_last:
                raise
        else:
            return


def test_the_text_model_is_served_beside_it(report_server: TritonServer) -> None:
    with GrpcClient(report_server.grpc_url, NAME) as text:
        assert text.generate(GenerateRequest(prompt="Hello", max_tokens=3)).num_output_tokens == 3


def test_one_answer_without_streaming(report_server: TritonServer) -> None:
    with GrpcClient(report_server.grpc_url, REPORT_NAME) as raw:
        raw.engine = report_engine(REPORT_NAME)
        (chunk,) = raw.stream_tensors({IMAGE: tile_png(), STREAM: False})
        assert json.loads(chunk.text)["notice"] == NOTICE


def test_the_catalogue_tells_what_it_does(report_server: TritonServer) -> None:
    async def ask() -> tuple[ServedModel, ...]:
        async with AsyncCatalogue(report_server.grpc_url) as catalogue:
            return await catalogue.models((REPORT_NAME, NAME))

    assert asyncio.run(ask()) == (
        ServedModel(REPORT_NAME, "report"),
        ServedModel(NAME, "generate"),
    )


def test_the_repository_is_sound_and_written_again_in_place(report_repository: Path) -> None:
    assert {path.name.removeprefix(f"{REPORT_NAME}-") for path in report_repository.glob(f"{REPORT_NAME}*")} == {
        REPORT_NAME, "preprocessor", "resnet", "findings",
    }  # fmt: skip
    assert "tensorrt_plan" not in (report_repository / f"{REPORT_NAME}-resnet" / "config.pbtxt").read_text()


def test_the_gateway_streams_a_report_and_frees_the_engine(report_server: TritonServer) -> None:
    body = {"model": REPORT_NAME, "image": base64.b64encode(tile_png()).decode()}
    with gateway(backend_urls=(report_server.grpc_url,), models=(REPORT_NAME, NAME)) as url:
        text = httpx.post(f"{url}/v1/reports", json=body, timeout=60).text
        *events, last = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
        assert read_report("".join(event["delta"] for event in events)).notice == NOTICE
        assert last["finish_reason"] == "stop"
        assert httpx.get(f"{url}/report").status_code == 200

        def leave() -> None:
            with httpx.stream("POST", f"{url}/v1/reports", json=body, timeout=60) as answer:
                next(answer.iter_raw())

        frees_the_engine(report_server, leave)
        bad = httpx.post(f"{url}/v1/reports", json={**body, "image": "AAAA"}, timeout=60)
        assert (bad.status_code, bad.json()["error"]["message"]) == (400, "the image is neither a JPEG nor a PNG")


@pytest.mark.slow
def test_the_load_profile_runs_at_a_small_size(report_server: TritonServer, tmp_path: Path) -> None:
    profile = (DATA.parent / "load.toml").read_text(encoding="utf-8")
    for whole, small in (
        ("seconds = 120", "seconds = 4"),
        ("warmup_s = 10", "warmup_s = 1"),
        ("../../build/image_report/tiles", "tiles"),
    ):
        assert whole in profile
        profile = profile.replace(whole, small)
    (tmp_path / "load.toml").write_text(profile, encoding="utf-8")
    (tmp_path / "tiles").mkdir()
    for seed in range(3):
        (tmp_path / "tiles" / f"{seed}.png").write_bytes(tile_png(seed))
    addresses = {"http": report_server.http_url, "grpc": report_server.grpc_url, "metrics": report_server.metrics_url}
    ports = [f"--{name}-port={urlsplit(url if '//' in url else f'//{url}').port}" for name, url in addresses.items()]
    done = subprocess.run(
        [sys.executable, "-m", "deepseek_triton.loadtest.run", tmp_path / "load.toml", "--model", REPORT_NAME,
         "--host", "127.0.0.1", *ports, "--output", tmp_path / "out"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (tmp_path / "out" / "result.json").is_file(), done.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert not result["errors"] and result["summary"]["num_complete"] >= 1
    assert result["summary"]["num_complete"] == result["summary"]["num_requests"]
