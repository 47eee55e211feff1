"""`deepseek-gateway data`: what was collected becomes a file to learn from, or goes."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from deepseek_triton.builders.lifecycle.learning.examples import read_examples
from deepseek_triton.gateway.cli import main
from deepseek_triton.gateway.collection.files import CollectionFiles
from deepseek_triton.gateway.protection.keys.api_key import id_of
from tests.gateway.collection.test_collecting import CHAT, answers, collecting
from tests.support.gateway import MODEL
from tests.support.gateway_process import ROOT, gateway_process
from tests.support.waiting import until


def data(*arguments: object) -> int:
    return main(["data", *map(str, arguments)])


def collected(directory: Path) -> list[str]:
    """Five answers are asked for, and told of: good, bad, corrected, corrected, nothing."""
    said: list[dict[str, Any]] = [
        {"label": "good"},
        {"rating": 2},
        {"rating": 3, "correction": "Right: 42, not bob@example.org"},
        {"correction": "Right"},
    ]
    ids = []
    with collecting(directory) as (client, files):
        for number in range(5):
            question = {"role": "user", "content": f"Question {number}"}
            if number == 3:
                body: dict[str, Any] = {"model": MODEL, "prompt": f"Question {number}: "}
                answer = client.post("/v1/completions", json=body).json()
            else:
                answer = client.post("/v1/chat/completions", json={**CHAT, "messages": [question]}).json()
            ids.append(answer["id"])
        for request_id, one in zip(ids, said, strict=False):
            assert client.post("/v1/feedback", json={"request_id": request_id, "label": "bad"}).status_code == 202
            assert client.post("/v1/feedback", json={"request_id": request_id, **one}).status_code == 202
        answers(files, 5)
        until(lambda: len(list(files.read("feedback"))) == 8)
    return ids


@pytest.mark.slow
def test_what_was_liked_is_what_learn_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory, file = tmp_path / "c", tmp_path / "data.jsonl"
    collected(directory)
    [raw] = directory.glob("answers-*")
    assert len(read_examples(raw).examples) == 5  # the lines themselves are in learn's form

    assert data("export", "--collect", directory, "--liked", file) == 0
    assert "3 answers (3 good)" in capsys.readouterr().out
    lessons = read_examples(file)
    assert [one.messages[-1] if one.messages else one.text for one in lessons.examples] == [
        ("assistant", "Hello"), ("assistant", "Right: 42, not [email]"), "Question 3: Right",
    ]  # fmt: skip
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "owner" not in file.read_text(encoding="utf-8")

    assert data("export", "--collect", directory, file) == 0
    lessons = read_examples(file)
    assert (len(lessons.examples), lessons.num_labelled_bad) == (4, 1)
    assert data("export", "--collect", directory, file, "--model", "another") == 1
    assert "no answer" in capsys.readouterr().err and len(read_examples(file).examples) == 4
    assert data("status", "--collect", directory) == 0
    assert "answers: 5, from " in capsys.readouterr().out
    assert data("status", "--collect", tmp_path / "nowhere") == 1 and data("status") == 1


def test_only_whole_answers_if_asked(tmp_path: Path) -> None:
    files = CollectionFiles(tmp_path)
    for number, reason in enumerate(("stop", "length")):
        messages = [{"role": "user", "content": str(number)}, {"role": "assistant", "content": reason}]
        files.append("answers", {"id": str(number), "choice": 0, "owner": "o", "user": "", "model": "m", "version": "v",
                                 "time": "2026", "finish_reason": reason, "messages": messages})  # fmt: skip
    assert data("export", "--collect", tmp_path, "--whole", tmp_path / "f") == 0
    assert [one.messages[1][1] for one in read_examples(tmp_path / "f").examples] == ["stop"]


@pytest.mark.slow
def test_a_key_a_user_and_a_request_can_be_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, directory = str(tmp_path / "keys.json"), tmp_path / "c"
    keys = []
    for _ in range(3):
        assert main(["keys", "add", "alice", "--keys", place]) == 0
        keys.append(capsys.readouterr().out.strip())
    with collecting(directory, keys=place) as (client, files):
        for key in keys:
            for user in ("bob", "eve"):
                body = {**CHAT, "user": user, "model": MODEL}
                headers = {"x-api-key": key, "x-request-id": f"{user}-{id_of(key)}"}
                client.post("/v1/chat/completions", json=body, headers=headers)
                said = {"request_id": headers["x-request-id"], "label": "good"}
                assert client.post("/v1/feedback", json=said, headers=headers).status_code == 202
        answers(files, 6)
        until(lambda: len(list(files.read("feedback"))) == 6)
        for arguments, left in (
            (("--key", keys[0]), 4),
            (("--key", id_of(keys[1])), 2),
            (("--user", "bob"), 1),
            (("--older-than", 1), 1),
            (("--request", f"eve-{id_of(keys[2])}"), 0),
        ):
            assert data("delete", "--collect", directory, *arguments) == 0
            assert len(list(files.read("answers"))) == len(list(files.read("feedback"))) == left
        client.post("/v1/chat/completions", json=CHAT, headers={"x-api-key": keys[0]})
        answers(files, 1)
    with pytest.raises(SystemExit):
        data("delete", "--collect", directory)


@pytest.mark.server
def test_a_gateway_that_is_killed_leaves_whole_lines(tmp_path: Path) -> None:
    directory = tmp_path / "c"
    with gateway_process(tmp_path, text="x" * 100_000, collect=str(directory)) as running:
        with httpx.Client(base_url=running.url, timeout=30) as client:
            for number in range(20):
                headers = {"x-request-id": f"r{number}"}
                assert client.post("/v1/chat/completions", json={**CHAT, "model": "fake"}, headers=headers).is_success
        assert f"answers are collected in {directory}" in running.log.read_text(encoding="utf-8")
        running.process.kill()
        running.process.wait()
    files = CollectionFiles(directory)
    found = [line["id"] for line in files.read("answers")]
    assert found == [f"r{number}" for number in range(len(found))]
    files.append("answers", {"id": "next", "choice": 0, "owner": "o"})
    [path] = directory.glob("answers-*")
    assert [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()] == [*found, "next"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--collect-redactor", "nothing"], "a redactor is MODULE:FUNCTION, got 'nothing'"),
        (["--collect-redactor", "nowhere:redact"], "can't be loaded: ModuleNotFoundError"),
        (["--collect-redactor", "math:pi"], "is no function"),
        (["--collect-days", "0"], "--collect-days must be at least 1"),
    ],
)
def test_a_wrong_setting_is_told_at_the_start(tmp_path: Path, options: list[str], message: str) -> None:
    command = [sys.executable, "-m", "gateway.cli", "serve", "--port", "0", "--collect", str(tmp_path / "c"), *options]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )  # fmt: skip
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
