"""A scoring model on a real tritonserver, with real weights: answers, batches, limits, calibration and tuning."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from deepseek_triton.builders import cli
from deepseek_triton.builders.commands.fitting import fit_on
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.scoring.fit import Example, read_profile, write_calibration
from deepseek_triton.builders.scoring.options import Batching, ScoringOptions
from deepseek_triton.builders.tune.repository import read_configs
from deepseek_triton.clients.base import BaseClient
from deepseek_triton.clients.connect import PROTOCOLS, ProtocolName, connect
from deepseek_triton.clients.errors import RequestRejected
from deepseek_triton.clients.examples import score_examples
from deepseek_triton.clients.grpc import GrpcClient
from deepseek_triton.clients.score import Score, ScoreRequest
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from deepseek_triton.ensemble.text.tokenizer import Tokenizer
from tests.conftest import end_at_once, serve
from tests.support.checkpoints import make_tokenizer, smollm2_path, write_tiny
from tests.support.gateway import gateway

# One test compares with transformers: all are in the group of those that share SmolLM2 there.
pytestmark = [pytest.mark.server, pytest.mark.xdist_group("smollm2_reference")]

NAME = "moods"
LABELS = ("positive", "negative")
TEMPLATE = "Review: {text}\nSentiment:"
GOOD, BAD = "A wonderful film, I loved every minute.", "Terrible, a waste of time."
MAX_SEQ_LEN = 256
DELAY_US = 200_000
# A long delay: requests that arrive together run together, however slow the machine.
SCORING = ScoringOptions(
    template=TEMPLATE, labels=LABELS, embeddings=True, batching=Batching(max_batch_size=8, max_queue_delay_us=DELAY_US)
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if find_spec("pytriton") is None:
        pytest.skip("no tritonserver: pip install --no-deps nvidia-pytriton==0.7.0")
    models = tmp_path_factory.mktemp("scoring") / "models"
    build(BuildOptions(smollm2_path(), NAME, models, task="score", max_seq_len=MAX_SEQ_LEN, scoring=SCORING))
    yield models
    shutil.rmtree(models)  # half a gigabyte, of which pytest would keep three


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    yield from serve(repository, tmp_path_factory.mktemp("log"))


@pytest.fixture
def client(server: TritonServer) -> Iterator[GrpcClient]:
    with GrpcClient(server.grpc_url, NAME, 60) as client:
        yield client


def one(client: BaseClient, text: str, labels: tuple[str, ...] | None = None) -> Score:
    (score,) = client.score(ScoreRequest(texts=text, labels=labels))
    return score


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_texts_get_the_label_that_they_deserve(server: TritonServer, protocol: ProtocolName) -> None:
    url = server.grpc_url if protocol == "grpc" else server.http_url
    with connect(protocol, NAME, url, 60) as client:
        good, bad = client.score(ScoreRequest(texts=[GOOD, BAD]))
        assert (good.label, bad.label) == LABELS
        assert sum(good.probabilities.values()) == pytest.approx(1)
        assert list(good.probabilities) == list(LABELS) and not good.is_calibrated
        assert bad.num_input_tokens < good.num_input_tokens < 25
        # Each text alone has the same result as in one request with the other.
        alone = one(client, GOOD)
        for label in LABELS:
            assert alone.log_probs[label] == pytest.approx(good.log_probs[label], abs=1e-3)
        chat = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
        (score,) = client.score(ScoreRequest(chats=[chat], labels=["Madrid", "Paris", "Berlin"]))
        assert score.label == "Paris" and score.num_input_tokens > 30


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_it_is_told_from_other_models(
    server: TritonServer, repository: Path, protocol: ProtocolName, capsys: pytest.CaptureFixture[str]
) -> None:
    url = server.grpc_url if protocol == "grpc" else server.http_url
    with connect(protocol, NAME, url, 10) as client:
        assert client.build_identity() == Manifest.load(repository / f"{NAME}-engine" / "1").identity
    for words in (("generate", NAME, "x"), ("chat", NAME)):
        assert cli.main([*words, "--url", url]) == 1
        assert f"{NAME} is a scoring model, which generates no text" in capsys.readouterr().err
    assert cli.main(["score", f"{NAME}-scorer", "x", "--url", url]) == 1
    assert f"is a part of {NAME}" in capsys.readouterr().err


def test_log_probabilities_are_transformers(client: GrpcClient, repository: Path, smollm2_reference: Any) -> None:
    torch, model = pytest.importorskip("torch"), smollm2_reference
    tokenizer = Tokenizer.from_directory(repository / f"{NAME}-tokenizer" / "1")
    labels = ("rather good", "unbelievably bad", "good")
    score = one(client, GOOD, labels)
    prompt = tokenizer.encode(TEMPLATE.replace("{text}", GOOD)).tolist()
    for label in labels:
        own = tokenizer.encode_continuation(f" {label}").tolist()
        with torch.no_grad():
            logits = model(torch.tensor([prompt + own])).logits[0].log_softmax(-1).numpy()
        expected = sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(own))
        assert score.log_probs[label] == pytest.approx(expected, abs=2e-3)
    (embedding,) = client.embed(GOOD)
    with torch.no_grad():
        hidden = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0, -1].numpy()
    np.testing.assert_allclose(embedding.values, hidden, atol=2e-3 * np.abs(hidden).max())
    assert embedding.num_input_tokens == len(prompt)


def test_the_gateway_scores_and_embeds(server: TritonServer, client: GrpcClient) -> None:
    alone = one(client, GOOD)
    with gateway(backend_urls=(server.grpc_url,), models=(NAME,)) as url:
        body = {"model": NAME, "input": [GOOD, BAD]}
        first, second = httpx.post(f"{url}/v1/score", json=body, timeout=60).json()["data"]
        assert (first["label"], second["label"]) == LABELS
        assert first["log_probs"] == pytest.approx(alone.log_probs, abs=1e-3)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as asker:
            rows = asker.embeddings.create(model=NAME, input=[GOOD, GOOD, BAD]).data
    same, again, other = (np.array(row.embedding) for row in rows)
    assert np.linalg.norm(same) == pytest.approx(1)
    assert same @ again == pytest.approx(1, abs=1e-4) and same @ other < 0.999


def stats(server: TritonServer) -> dict[str, Any]:
    request = urllib.request.Request(f"{server.http_url}/v2/models/{NAME}-engine/stats", headers=server.admin_headers)
    with urllib.request.urlopen(request) as response:
        (found,) = json.load(response)["model_stats"]
    return dict(found)


def test_ragged_requests_are_batched_and_answered_as_if_alone(server: TritonServer, client: GrpcClient) -> None:
    texts = [("so " * (3 * i)) + "good" for i in range(8)]
    alone = [one(client, text) for text in texts]
    before = stats(server)
    with ThreadPoolExecutor(len(texts)) as pool:
        together = list(pool.map(lambda text: one(client, text), texts))
    after = stats(server)
    executions = after["execution_count"] - before["execution_count"]
    assert after["inference_count"] - before["inference_count"] == 8
    assert executions <= 4, "eight prompts of eight lengths ran one by one: the batch isn't ragged"
    for single, batched in zip(alone, together, strict=True):
        np.testing.assert_allclose(
            list(single.log_probs.values()), list(batched.log_probs.values()), atol=1e-3, err_msg="a neighbour shows"
        )
    assert len({score.num_input_tokens for score in together}) == 8


@pytest.fixture
def tiny_scoring(tmp_path: Path) -> Path:
    """A tiny random model with the same options: it scores nonsense, but waits as long."""
    if find_spec("pytriton") is None:
        pytest.skip("no tritonserver: pip install --no-deps nvidia-pytriton==0.7.0")
    models = tmp_path / "models"
    length = 2 * MAX_SEQ_LEN  # its tokens are bytes
    checkpoint = make_tokenizer(
        write_tiny(tmp_path / "tiny", vocab_size=320, eos_token_id=319, max_position_embeddings=length)
    )
    build(BuildOptions(checkpoint, NAME, models, task="score", max_seq_len=length, scoring=SCORING))
    return models


@pytest.fixture
def tiny_scorer(tiny_scoring: Path, tmp_path: Path) -> Iterator[TritonServer]:
    """A server of it."""
    yield from serve(tiny_scoring, tmp_path)


@pytest.mark.timed
def test_a_request_alone_waits_no_longer_than_was_promised(tiny_scorer: TritonServer) -> None:
    waited_us = []
    with GrpcClient(tiny_scorer.grpc_url, NAME, 60) as client:
        for _ in range(9):
            before = stats(tiny_scorer)["inference_stats"]["queue"]["ns"]
            one(client, GOOD)
            waited_us.append((stats(tiny_scorer)["inference_stats"]["queue"]["ns"] - before) / 1e3)
    # The least disturbed of nine: a busy machine wakes a thread up 1 ms late as a rule, and two are woken here. That
    # the configured delay is shorter, by what Triton's own timer is late, test_scoring_build.py holds.
    assert 0.9 * DELAY_US < min(waited_us) <= 1.02 * DELAY_US


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": "x", "labels": ["a"]}, "labels holds 1 label, must hold at least 2"),
        ({"texts": "x", "labels": ["a", "a"]}, r"labels\[1\] is 'a', which is a duplicate"),
        ({"texts": "x", "labels": ["a", ""]}, r"labels\[1\] is '', must be text"),
        ({"texts": "x", "labels": [f"l{i}" for i in range(1000)]}, "labels holds 1000 labels, must hold at most 256"),
        ({"texts": ""}, "text_input is empty"),
        ({"texts": "word " * 300}, r"the prompt has 30\d tokens and its labels 0; at most 256 are allowed"),
        ({"texts": ["x"] * 9}, "batch-size must be <= 8"),
    ],
)
def test_requests_at_fault_are_told_why(client: GrpcClient, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestRejected, match=message):
        client.score(ScoreRequest(**arguments))
    assert one(client, GOOD).label == "positive", "and the server goes on"


def test_a_label_that_begins_another_and_labels_of_many_tokens(client: GrpcClient) -> None:
    score = one(client, GOOD, ("good", "good and thoughtful", "goodness"))
    assert set(score.probabilities) == {"good", "good and thoughtful", "goodness"}
    assert score.log_probs["good"] > score.log_probs["good and thoughtful"], "more tokens are never likelier"
    many = one(client, GOOD, tuple(f"label {i}" for i in range(60)))
    assert len(many.probabilities) == 60 and sum(many.probabilities.values()) == pytest.approx(1, abs=1e-4)


def test_wrong_shapes_and_a_missing_input_are_told(server: TritonServer) -> None:
    def error(inputs: list[dict[str, Any]]) -> str:
        body = json.dumps({"inputs": inputs}).encode()
        request = urllib.request.Request(f"{server.http_url}/v2/models/{NAME}/infer", body)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        with caught.value as response:
            return str(json.load(response)["error"])

    text = {"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": ["x"]}
    assert "give either text_input or messages" in error([{**text, "name": "labels"}])
    assert "text_input" in error([{**text, "shape": [1, 2], "data": ["x", "y"]}])
    assert "batch" in error([text, {**text, "name": "labels", "shape": [2, 1], "data": ["a", "b"]}])


def test_curls_generate_endpoint_works_too(server: TritonServer) -> None:
    body = json.dumps({"text_input": GOOD, "labels": ["positive", "negative"]}).encode()
    with urllib.request.urlopen(f"{server.http_url}/v2/models/{NAME}/generate", body) as response:
        answer = json.load(response)
    assert answer["label"] == "positive" and len(answer["probabilities"]) == 2


def test_the_console_scores(server: TritonServer) -> None:
    command = [sys.executable, "-m", "deepseek_triton.builders.cli", "score", NAME, GOOD, "--url", server.grpc_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == list(LABELS)


@pytest.mark.parametrize("title", ["HTTP", "Python"])
def test_the_examples_that_serve_prints_run(server: TritonServer, title: str) -> None:
    command = score_examples(NAME, server.http_url, server.grpc_url)[title]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0 and "positive" in done.stdout, done.stderr


def test_a_calibration_is_fitted_on_the_server_and_served_by_the_next(client: GrpcClient, repository: Path) -> None:
    # The label doesn't depend on the text, so that the best calibration is to be unsure.
    examples = [Example(f"{text} {i}", LABELS[i % 2]) for i in range(12) for text in (GOOD, BAD)]
    profile = read_profile(repository, NAME)
    calibration = fit_on(client, profile, "bias", examples)
    report = calibration.report
    assert report["negative_log_likelihood_after"] < 1.0 < report["negative_log_likelihood_before"]
    raw = one(client, GOOD)
    path = write_calibration(repository, NAME, calibration)
    try:
        with (
            TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as second,
            GrpcClient(second.grpc_url, NAME, 60) as fresh,
        ):
            fitted = one(fresh, GOOD)
            other = one(fresh, GOOD, LABELS[::-1])
            end_at_once(second)
    finally:
        path.unlink()
    assert fitted.is_calibrated and not other.is_calibrated
    assert fitted.log_probs == pytest.approx(raw.log_probs, abs=1e-3)
    assert max(fitted.probabilities.values()) < max(raw.probabilities.values())
    assert other.probabilities == pytest.approx(raw.probabilities, abs=1e-3)


def test_tune_finds_a_batch_size_on_a_server_of_its_own(
    tiny_scoring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tiny model's: on a busy machine a large one answers nothing within a measurement's second."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_scoring, copy, symlinks=True, copy_function=link)
    path = copy / f"{NAME}-engine" / "config.pbtxt"
    text = path.read_text()
    path.unlink()
    path.write_text(re.sub(r"max_queue_delay_microseconds: \d+", "max_queue_delay_microseconds: 0", text))
    arguments = [
        "tune", NAME, "--repository", str(copy), "--p99-ms", "60000", "--clients", "4", "--seconds", "1",
        "--rounds", "5", "--budget-s", "30", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    assert cli.main(arguments) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "max_queue_delay_us" in out and "requests/s" in out
    lines = (tmp_path / "out" / "journal.jsonl").read_text().splitlines()
    results = [entry["result"] for entry in map(json.loads, lines[1:]) if "result" in entry]
    assert results and all(result["latencies_ms"] and not result["failure"] for result in results)
    assert read_configs(copy, NAME)[f"{NAME}-engine"].max_batch_size >= 1
    assert read_configs(tiny_scoring, NAME)[f"{NAME}-engine"].max_batch_size == 8, "the original is another repository"


def link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)
