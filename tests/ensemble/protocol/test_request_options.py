"""The table of request options: everything that derives from it agrees with it."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from deepseek_triton.builders.commands.table import make_command_parser
from deepseek_triton.clients.api import GenerateRequest
from deepseek_triton.ensemble.engine.admission import RequestOptions
from deepseek_triton.ensemble.models.options import read_options
from deepseek_triton.ensemble.models.tensors import array
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.ranges import Range, at_least
from deepseek_triton.ensemble.protocol.request_options import GROUPS, REQUEST_OPTIONS, RequestOption
from deepseek_triton.ensemble.sampling import SamplingParams
from scripts import request_options_page

ROOT = Path(__file__).parents[3]
RANGED = [option for option in REQUEST_OPTIONS if option.range is not None]
# What an option can't do without.
COMPANIONS = {"num_return_sequences": {"temperature": 1.0}}
# No client of ours sends them: `stream` is the method's, pad_id has no effect, the numbers of tokens always come.
NOT_IN_GENERATE_REQUEST = {"stream", "pad_id", "return_num_input_tokens", "return_num_output_tokens"}
# The tokenizer's, not the engine's.
PROMPT_FIELDS = {option.field for option in REQUEST_OPTIONS if option.group == "prompt"}
# Two options make one field, and one has no effect.
NOT_IN_THE_ENGINE = {"return_log_probs", "num_top_log_probs", "pad_id"}


def names(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def test_each_option_is_told_once_and_groups_stand_together() -> None:
    assert len({option.field for option in REQUEST_OPTIONS}) == len(REQUEST_OPTIONS)
    groups = [option.group for option in REQUEST_OPTIONS]
    assert groups == sorted(groups, key=list(GROUPS).index)
    for option in REQUEST_OPTIONS:
        assert option.meaning.endswith(".") and option.meaning[0].isupper()
        assert option.default is not None or option.default_note


def test_every_option_has_its_fields() -> None:
    options = {option.field for option in REQUEST_OPTIONS}
    request = names(GenerateRequest) - {"tools", "chat_template_kwargs"}  # parts of the tensor `messages`
    assert request == options - NOT_IN_GENERATE_REQUEST
    engine = names(SamplingParams) - {"num_log_probs"} | names(RequestOptions) - {"params", "prompt_info"}
    assert engine == options - PROMPT_FIELDS - NOT_IN_THE_ENGINE


def ends(option: RequestOption) -> tuple[Range, list[float]]:
    assert option.range is not None
    low = option.range.low + (1e-6 if option.range.excludes_low else 0)
    return option.range, [low, option.range.high]


def client_takes(option: RequestOption, value: float) -> bool:
    try:
        GenerateRequest(prompt="x", **{option.field: value})  # type: ignore[arg-type]
    except ValueError:
        return False
    return True


def server_takes(option: RequestOption, value: float) -> bool:
    values = {**COMPANIONS.get(option.field, {}), option.tensor_name: value}
    inputs = {name: array(contract.OPTIONS[name], [given]) for name, given in values.items()}
    try:
        read_options(inputs)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("option", RANGED, ids=lambda option: option.field)
def test_client_and_server_have_the_same_range(option: RequestOption) -> None:
    allowed, inside = ends(option)
    limits = np.iinfo(np.int32 if option.dtype == "INT32" else np.uint64) if allowed.is_whole else np.finfo(np.float32)
    outside = [value for value in (allowed.low - 1, allowed.high + 1) if limits.min <= value <= limits.max]
    for value in inside:
        assert client_takes(option, value) and server_takes(option, value)
    for value in outside:
        if not allowed.holds(value):  # 1 is nothing beside the largest float
            assert not client_takes(option, value)
            assert not server_takes(option, value) or option.field == "priority"  # test_admission.py's


@pytest.mark.parametrize(
    ("allowed", "value", "rule"),
    [
        (at_least(1), 0, "at least 1"),
        (at_least(1), 2**31, "at most 2147483647"),
        (Range(0, 20, "0 to 20"), 21, "0 to 20"),
        (Range(0.0, 1.0, "above 0 and at most 1", excludes_low=True), 2, "above 0 and at most 1"),
    ],
)
def test_the_broken_rule(allowed: Range, value: float, rule: str) -> None:
    assert not allowed.holds(value)
    assert allowed.broken_rule(value) == rule


def test_every_flag_is_an_option_of_a_command() -> None:
    actions: dict[str, argparse.Action] = {}
    for command in ("generate", "chat"):
        for action in make_command_parser(command)._actions:
            actions |= dict.fromkeys(action.option_strings, action)
    for option in REQUEST_OPTIONS:
        if option.flag:
            assert actions[option.flag].dest == option.field
            assert actions[option.flag].default is None  # the server's default holds


def test_the_page_is_up_to_date() -> None:
    page = request_options_page.PAGE.read_text(encoding="utf-8")
    assert page == request_options_page.updated(page), "run python scripts/request_options_page.py"


# A new option touches these files, and a fourth where it has its effect.
TOUCHED = {
    "ensemble/protocol/request_options.py": (
        '    RequestOption(\n        "answer", "end_id"',
        '    RequestOption(\n        "answer", "top_a", "FP32", range=between(0.0, 1.0), default=0.5, flag="--top-a",\n'
        '        meaning="A toy.",\n    ),\n',
    ),
    "clients/request.py": ("    end_id: int | None = None\n", "    top_a: float | None = None\n"),
    "ensemble/sampling/params.py": ("    end_id: int | None = None\n", '    top_a: float = default_of("top_a")\n'),
}
SHOWN = """
import argparse
import numpy as np
from deepseek_triton.clients.options import add_request_arguments, make_request
from deepseek_triton.ensemble.models.options import read_options
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.pipelines import GENERATE_PIPELINE
from scripts.request_options_page import tables

spec = contract.OPTIONS["top_a"]
assert spec in contract.GENERATE.inputs and spec in contract.ENGINE.inputs
assert GENERATE_PIPELINE.steps[1].input_map["top_a"] == "top_a"
parser = argparse.ArgumentParser()
add_request_arguments(parser)
request = make_request(parser.parse_args(["--top-a", "0.25"]), prompt="x")
assert request.to_tensors(stream=True)[spec] == 0.25
assert read_options({"top_a": np.array([0.25], np.float32)}).params.top_a == 0.25
assert read_options({}).params.top_a == 0.5
for refuse in (
    lambda: make_request(parser.parse_args(["--top-a", "2"]), prompt="x"),
    lambda: read_options({"top_a": np.array([2], np.float32)}),
):
    try:
        refuse()
    except ValueError as error:
        assert "top_a" in str(error) and "must be 0 to 1" in str(error), error
    else:
        raise AssertionError("taken")
assert "| `top_a` | FP32 | 0 to 1 | 0.5 | A toy. `--top-a` on the command line. |" in tables()
"""


@pytest.mark.slow
def test_a_new_option_is_a_row_and_two_fields(tmp_path: Path) -> None:
    """The row reaches contract, pipeline, client, command line, adapter, ranges, default and page."""
    package = tmp_path / "deepseek_triton"
    package.mkdir()
    shutil.copy(ROOT / "deepseek_triton" / "__init__.py", package)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("clients", "ensemble"):
        shutil.copytree(ROOT / name, package / name, ignore=ignored)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=ignored)
    for name, (before, line) in TOUCHED.items():
        path = package / name
        text = path.read_text(encoding="utf-8")
        assert text.count(before) == 1
        path.write_text(text.replace(before, line + before), encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", SHOWN], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
