"""Load profiles: reading and refusing them."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.loadtest import profile
from deepseek_triton.loadtest.profile import LoadProfileError, Stage
from tests.support.loadtests import PROFILE, make_profile


@pytest.mark.parametrize("name", profile.names())
def test_each_profile_of_the_project_is_sound_and_survives_a_round_trip(name: str) -> None:
    read = profile.load(name)
    assert read.name == name
    assert read.levels.max_error_ratio == 0
    assert profile.from_dict(dataclasses.asdict(read)) == read


def test_the_profiles_of_the_issue_are_there() -> None:
    assert profile.names() == ["chat", "gateway", "ramp", "scoring", "smoke", "soak", "spike", "steady"]


def test_scaling_multiplies_levels_and_nothing_else() -> None:
    read = profile.load("spike").scaled(2.0)
    assert read.stages[1] == Stage(10, 20.0, 20.0)
    assert dataclasses.replace(read, stages=profile.load("spike").stages) == profile.load("spike")


def changed(path: str, value: Any) -> dict[str, Any]:
    table = copy.deepcopy(PROFILE)
    *parents, last = path.split("/")
    inner: Any = table
    for parent in parents:
        inner = inner[int(parent) if parent.isdigit() else parent]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return table


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("seed", None, "seed is missing"),
        ("sed", 1, "unknown field sed; there are name, description"),
        ("seed", 1.5, "seed must be int, got 1.5"),
        ("seed", True, "seed must be int, got True"),
        ("arrivals", "opne", "arrivals must be one of open, closed, got 'opne'"),
        ("warmup_s", -1, "warmup_s must be a number from 0 to 604800, got -1"),
        ("warmup_s", "5", "warmup_s must be float or int, got '5'"),
        ("stages", [], "stages must hold one with a level above 0, got ()"),
        ("stages", {"seconds": 1}, "stages must be an array of tables"),
        ("stages/0/seconds", 0, "stages[0].seconds must be a number from 0.1 to 604800, got 0"),
        ("stages/0/end", None, "stages[0].end is missing"),
        ("stages/0/rate", 1, "unknown field stages[0].rate"),
        (
            "protocols",
            {"gprc": 1},
            "protocols must be one of grpc-stream, grpc, http-stream, http, openai-stream, openai, got",
        ),
        ("protocols", {}, "protocols must be a table with one at least, got {}"),
        ("protocols", {"grpc": 0}, "protocols.grpc must be a number from 1e-06"),
        ("requests/form", "txt", "requests.form must be one of text, chat, score, report, got 'txt'"),
        ("requests/prompt_words/median", 60, "requests.prompt_words.median must be a number from 2 to 50, got 60"),
        ("requests/prompt_words", 5, "requests.prompt_words must be a table, got 5"),
        ("levels", {"max_error_ratio": 5}, "levels.max_error_ratio must be a number from 0 to 1, got 5"),
        ("levels", {"p95": 5}, "unknown field levels.p95"),
        ("think_s", 1, "think_s is of closed users, got 1 with open arrivals"),
    ],
)
def test_what_is_wrong_is_named_with_its_value(path: str, value: Any, message: str) -> None:
    with pytest.raises(LoadProfileError) as error:
        profile.from_dict(changed(path, value))
    assert str(error.value).startswith(message)


def test_a_conversation_needs_the_models_template() -> None:
    turns = {"median": 2, "sigma": 0, "least": 1, "most": 3}
    conversation = {"turns": turns, "think_s": turns, "context_tokens": 100}
    with pytest.raises(LoadProfileError, match=r"requests\.conversation needs form chat, got 'text'"):
        make_profile(requests=PROFILE["requests"] | {"conversation": conversation})


def test_a_file_is_named_in_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("seed = ")
    with pytest.raises(LoadProfileError, match=r"mine\.toml is not TOML"):
        profile.load(str(path))
    path.write_text("seed = 1")
    with pytest.raises(LoadProfileError, match=r"mine\.toml: description is missing"):
        profile.load(str(path))
    with pytest.raises(LoadProfileError, match="no profile 'other'; there are chat, gateway, ramp"):
        profile.load("other")


@pytest.mark.slow
def test_what_computes_leaves_the_standard_library_unpatched() -> None:
    code = """
import sys
import deepseek_triton.loadtest.arrivals, deepseek_triton.loadtest.compare
import deepseek_triton.loadtest.exchange, deepseek_triton.loadtest.report.page
print(*(name for name in ("gevent", "locust", "grpc", "httpx", "jinja2") if name in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )
    assert done.stdout.strip() == ""
