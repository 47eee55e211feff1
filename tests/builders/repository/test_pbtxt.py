from __future__ import annotations

import json
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict, MessageToJson

from deepseek_triton.builders.repository import pbtxt
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.pipelines import GENERATE_PIPELINE, EnsemblePipeline, model_name
from deepseek_triton.ensemble.protocol.settings import EngineSettings, SettingsError
from scripts.settings_page import updated

PATH = Path("models/m/config.pbtxt")


def configs() -> dict[str, pbtxt.ModelConfig]:
    return {
        "tokenizer": pbtxt.tokenizer_config("m", {"note": 'dashes – and "quotes"'}),
        "engine": pbtxt.engine_config("m", EngineSettings(max_num_seqs=3).to_parameters()),
        "detokenizer": pbtxt.detokenizer_config("m"),
        "ensemble": pbtxt.ensemble_config("m", GENERATE_PIPELINE),
    }


@pytest.mark.parametrize("part", ["tokenizer", "engine", "detokenizer", "ensemble"])
def test_text_reads_back_as_the_same_configuration(part: str) -> None:
    config = configs()[part]
    text = pbtxt.to_text(config)
    assert pbtxt.parse_text(text, PATH) == config
    assert text == pbtxt.to_text(configs()[part])  # the same bytes each time: the demo's are committed


def test_models_have_the_names_and_batching_that_the_ensemble_relies_on() -> None:
    found = {part: MessageToDict(config, preserving_proto_field_name=True) for part, config in configs().items()}
    assert {part: values["name"] for part, values in found.items()} == {
        "tokenizer": "m-tokenizer",
        "engine": "m-engine",
        "detokenizer": "m-detokenizer",
        "ensemble": "m",
    }
    assert {part: values["max_batch_size"] for part, values in found.items()} == {
        "tokenizer": 64,
        "engine": 64,
        "detokenizer": 64,
        "ensemble": 64,
    }
    assert [part for part, values in found.items() if "dynamic_batching" in values] == ["detokenizer"]
    # The detokenizer answers a heartbeat with nothing, so it must be allowed to.
    assert [part for part in found if "model_transaction_policy" in found[part]] == ["engine", "detokenizer"]
    assert found["engine"]["parameters"]["max_num_seqs"] == {"string_value": "3"}
    assert found["engine"]["instance_group"] == [{"count": 1, "kind": "KIND_CPU"}]


def test_tensors_are_the_contracts() -> None:
    config = configs()["engine"]
    inputs = [(t.name, list(t.dims), t.optional) for t in config.input]
    assert inputs == [(spec.name, list(spec.dims), spec.optional) for spec in contract.ENGINE.inputs]
    values = MessageToDict(config, preserving_proto_field_name=True)
    assert [t["data_type"] for t in values["output"]] == [f"TYPE_{spec.dtype}" for spec in contract.ENGINE.outputs]


def test_the_pipeline_is_whole() -> None:
    """Each step has its inputs, but for `stop` and `describe`, which are for direct calls; private names are marked."""
    known = {spec.name for spec in GENERATE_PIPELINE.contract.inputs}
    public = known | {spec.name for spec in GENERATE_PIPELINE.contract.outputs}
    for step in GENERATE_PIPELINE.steps:
        missing = {spec.name for spec in step.contract.inputs} - set(step.input_map)
        unread = {spec.name for spec in step.contract.outputs} - set(step.output_map)
        is_engine = step.model_suffix == "engine"
        assert missing == ({"stop", "describe"} if is_engine else set())
        assert unread == ({"max_seq_len"} if is_engine else set())
        assert set(step.input_map.values()) <= known
        known |= set(step.output_map.values())
        assert all(name.startswith("_") for name in set(step.output_map.values()) - public)
    assert public <= known
    assert model_name("m", "engine") == "m-engine"


def test_a_field_that_triton_does_not_have_fails_at_build() -> None:
    spec = contract.TensorSpec("x", "FP8")  # type: ignore[arg-type]
    pipeline = EnsemblePipeline("p", replace(contract.GENERATE, inputs=(spec,)), GENERATE_PIPELINE.steps)
    with pytest.raises(pbtxt.PbtxtError, match=r"'m' is no ModelConfig.*TYPE_FP8"):
        pbtxt.ensemble_config("m", pipeline)


def test_unreadable_text_names_file_line_and_field() -> None:
    with pytest.raises(pbtxt.PbtxtError, match=r'^models/m/config.pbtxt:2:1: .*"max_batch"; correct it'):
        pbtxt.parse_text('name: "m"\nmax_batch: 3', PATH)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0, must be an integer of at least 1"),
        ({"max_num_seqs": 2.0}, "max_num_seqs is 2.0"),
        ({"max_num_seqs": True}, "max_num_seqs is True"),
        ({"max_num_batched_tokens": -1}, "max_num_batched_tokens is -1"),
        ({"num_threads": -1}, "num_threads is -1, must be an integer of at least 0"),
        ({"cancel_after_s": 0.0}, "cancel_after_s is 0.0, must be finite and above 0"),
        ({"cancel_after_s": float("nan")}, "cancel_after_s is nan"),
        ({"cancel_after_s": float("inf")}, "cancel_after_s is inf"),
        ({"cancel_after_s": "1"}, "cancel_after_s is '1', must be a number"),
        ({"max_prefill_stall": 0}, "max_prefill_stall is 0, must be finite and above 0"),
        ({"max_prefill_stall": None}, "max_prefill_stall is None, must be a number"),
        ({"prefix_reuse": "some"}, "prefix_reuse is 'some', must be one of prompt, all, off"),
        ({"max_queue_size": 0}, "max_queue_size is 0, must be an integer of at least 1"),
        ({"priority_levels": 0}, "priority_levels is 0, must be an integer of at least 1"),
        ({"queue_timeout_ms": -1}, "queue_timeout_ms is -1, must be an integer of at least 0"),
        ({"timeout_ms": -1}, "timeout_ms is -1, must be an integer of at least 0"),
        ({"batch_invariant": 1}, "batch_invariant is 1, must be true or false"),
    ],
)
def test_settings_refuse(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        EngineSettings(**values)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"num_slot": "8"}, "unknown engine parameter 'num_slot', must be one of"),
        ({"max_num_seqs": "8.5"}, "max_num_seqs is '8.5', must be an integer"),
        ({"cancel_after_s": "soon"}, "cancel_after_s is 'soon', must be a number"),
        ({"max_num_seqs": "-3"}, "max_num_seqs is -3"),
        ({"max_prefill_stall": ""}, "max_prefill_stall is '', must be a number"),
        ({"prefix_reuse": "Prompt"}, "prefix_reuse is 'Prompt', must be one of prompt, all, off"),
        ({"timeout_ms": "1e3"}, "timeout_ms is '1e3', must be an integer"),
        ({"batch_invariant": "yes"}, "batch_invariant is 'yes', must be true or false"),
    ],
)
def test_parameters_refuse(parameters: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        EngineSettings.from_parameters(parameters)


def test_every_setting_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = [row.split("|") for row in text.splitlines() if row.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    assert documented == {field.name for field in fields(EngineSettings)} == set(EngineSettings.table())
    assert updated(text) == text, "the page is out of date: run scripts/settings_page.py"


def test_settings_survive_the_way_through_triton() -> None:
    settings = EngineSettings(
        max_num_seqs=5, max_num_batched_tokens=7, max_prefill_stall=2.5, prefix_reuse="all",
        num_threads=2, max_queue_size=9,
        priority_levels=4, queue_timeout_ms=100, timeout_ms=2000, cancel_after_s=0.25, batch_invariant=True,
        tensor_parallel_size=2, nv_trt_llm_metrics=True, kv_cache="pages", kv_cache_tokens=640,
        pipeline_parallel_size=3, expert_parallel=True, expert_parallel_size=4, gpu_memory_share=0.5,
    )  # fmt: skip
    defaults = asdict(EngineSettings())
    assert all(value != defaults[name] for name, value in asdict(settings).items()), "every setting is tried"
    assert EngineSettings.from_parameters(settings.to_parameters()) == settings
    config = pbtxt.engine_config("m", {**settings.to_parameters(), "FORCE_CPU_ONLY_INPUT_TENSORS": "no"})
    text = MessageToJson(config, preserving_proto_field_name=True)  # what a model gets as args["model_config"]
    assert EngineSettings.from_model_config(text) == settings
    assert EngineSettings.from_model_config(json.dumps({})) == EngineSettings()


@pytest.mark.parametrize(("levels", "default"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)])
def test_a_request_without_a_priority_has_the_middle_one(levels: int, default: int) -> None:
    assert EngineSettings(priority_levels=levels).default_priority == default
