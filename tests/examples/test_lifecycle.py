"""The whole loop on a tiny random model, with a real server and a real gateway: killed in the middle, it goes on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from deepseek_triton.examples.lifecycle.facts import FACTS, LIMITS, write_data
from deepseek_triton.examples.lifecycle.load import AskedAnswer, Load, figures
from tests.support.byte_models import write_byte_model


def test_every_fact_is_in_its_lines_and_the_checks_ask_in_other_words(tmp_path: Path) -> None:
    write_data(tmp_path)
    lines = [json.loads(line)["messages"] for line in (tmp_path / "new.jsonl").read_text("utf-8").splitlines()]
    asked = {messages[0]["content"]: messages[1]["content"] for messages in lines}
    assert len(asked) == len(lines)
    for fact in FACTS:
        assert all(fact.value in asked[question] for question in fact.questions())
    assert not [check["name"] for check in LIMITS["checks"] if check["messages"][0]["content"] in asked]


def test_an_answer_that_is_no_models_whole_answer_is_mixed_up() -> None:
    load = Load("http://x", "town", ["q"], 1)
    known = {"town": {"q": "one two"}, "town-v2": {"q": "three four"}}
    for model, text in (("town", "one two"), ("town-v2", "three four"), ("town", "three four"), ("town-v2", "three")):
        load.answers.append(AskedAnswer("q", model, text, 0.1, 1.0))
    load.faults.append("q: the stream broke")
    found = figures(load, known)
    assert (found.requests, found.failed, found.mixed_up, found.by_model) == (5, 1, 2, {"town": 2, "town-v2": 2})


# The command with two shares on the way: one in a hundred takes hundreds of requests for the few that are counted.
# Three requests on a busy machine may take any multiple of three others' time. Callers that pause leave the processor
# to what they are beside.
LOOP = """
import sys, time
from deepseek_triton.examples.lifecycle import load, serving
serving.SHARES |= {"shares": "25,50,100", "max-latency-ratio": "1000"}
serving.BACK_S, load.MAX_TOKENS = 2.0, 12
ask = load.ask
def ask_after_a_pause(*words, **options):
    time.sleep(0.15)
    return ask(*words, **options)
load.ask = ask_after_a_pause
from deepseek_triton.examples.lifecycle.__main__ import main
sys.exit(main())
"""


@pytest.mark.server
@pytest.mark.slow
def test_the_loop_that_is_killed_in_the_middle_goes_on(tmp_path: Path) -> None:
    if find_spec("peft") is None:  # to import it takes seconds
        pytest.skip("no peft: pip install 'peft>=0.18'")
    if find_spec("pytriton") is None:
        pytest.skip("no tritonserver: pip install --no-deps nvidia-pytriton==0.7.0")
    checkpoint, folder, limits = tmp_path / "base", tmp_path / "loop", tmp_path / "limits.json"
    write_byte_model(checkpoint, scale=0.1)
    limits.write_text('{"old_data": {"max_loss_increase": 1}, "new_data": {"min_loss_decrease": 0.01}}', "utf-8")
    command = [
        sys.executable, "-c", LOOP, f"--folder={folder}", f"--checkpoint={checkpoint}",
        f"--limits={limits}", "--epochs=1", "--learning-rate=0.01", "--precision=fp32",
        "--stage-s=1",
    ]  # fmt: skip
    with (tmp_path / "first.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 400
        while "has 50 %" not in (shown := (tmp_path / "first.log").read_text("utf-8")):
            assert process.poll() is None and time.monotonic() < deadline, shown
            time.sleep(0.1)
        process.kill()
        process.wait()
    again = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "0 failed, 0 mixed up" in again.stdout and again.stdout.count("done by an earlier run") == 3
    served = json.loads((folder / "result.json").read_text("utf-8"))["steps"]["serve"]
    known = served["answers"]
    assert set(known) == {"town", "town-v2"} and set(known["town"].values()) != set(known["town-v2"].values())
    assert set(served["promotion_load"]["by_model"]) == {"town", "town-v2"}
    memory = served["memory_mib"]
    assert memory["promoted"] < memory["highest"] and memory["rolled_back"] < memory["before"] * 1.2
