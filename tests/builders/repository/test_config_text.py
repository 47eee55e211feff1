"""config.pbtxt says what each block is, lists the target's own settings alone, and knows an edit."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek_triton.builders.repository import pbtxt
from deepseek_triton.builders.repository.models.config_text import is_edited, to_text
from deepseek_triton.builders.scoring.options import Batching
from deepseek_triton.builders.targets import target_named, target_names
from deepseek_triton.ensemble.protocol.pipelines import GENERATE_PIPELINE
from deepseek_triton.ensemble.protocol.settings import GROUPS, EngineSettings
from deepseek_triton.ensemble.scoring.settings import ScoringSettings

SCORING = ScoringSettings().to_parameters()
CONFIGS = {
    "engine": pbtxt.engine_config("m", EngineSettings().to_parameters()),
    "tokenizer": pbtxt.tokenizer_config("m"),
    "detokenizer": pbtxt.detokenizer_config("m"),
    "ensemble": pbtxt.ensemble_config("m", GENERATE_PIPELINE),
    "score tokenizer": pbtxt.score_tokenizer_config("m"),
    "scorer": pbtxt.scorer_config("m", 8),
    "score engine": pbtxt.score_engine_config("m", 8, Batching(), SCORING),
    "score plan": pbtxt.score_plan_config("m", 8, Batching()),
}
PLAIN = {"name", "backend", "platform", "default_model_filename"}  # what they say is all there is to say


@pytest.mark.parametrize("part", CONFIGS)
def test_every_block_has_a_comment_and_the_text_reads_back(part: str) -> None:
    text = to_text(CONFIGS[part])
    assert pbtxt.parse_text(text, Path("m/config.pbtxt")) == CONFIGS[part] and not is_edited(text)
    seen: set[str] = set()
    lines = text.splitlines()
    for number, line in enumerate(lines):
        field = line.split(" ")[0].rstrip(":")
        if line.startswith((" ", "#", "}")) or not line or field in seen | PLAIN:
            continue
        seen.add(field)
        assert lines[number - 1].startswith("#"), f"{field} has no comment"
    assert all(len(line) <= 120 for line in lines)
    kinds = {group.kind for group in CONFIGS[part].instance_group}
    assert ("# Processes that run the model. KIND_CPU is where" in text) == (2 in kinds)
    assert ("KIND_GPU: Triton's own tensorrt backend" in text) == (1 in kinds)


def test_settings_are_grouped_and_told() -> None:
    text = to_text(CONFIGS["engine"])
    places = [text.index(f"\n# {group}:\n") for group in GROUPS]
    assert places == sorted(places)
    for name, setting in EngineSettings.table().items():
        start = text.index(f"# {name}: {setting.help[:40]}")
        assert places[GROUPS.index(setting.group)] < start < text.index(f'key: "{name}"')


@pytest.mark.parametrize("name", target_names())
def test_only_a_targets_own_settings_are_listed(name: str) -> None:
    target = target_named(name)
    parameters = target.parameters(EngineSettings())
    assert set(parameters) == set(target.own_settings.table())
    assert ("tensor_parallel_size" in parameters) == (name in ("cuda", "vllm"))
    assert ("pipeline_parallel_size" in parameters) == (name == "vllm") == ("num_threads" not in parameters)
    assert EngineSettings.from_parameters(parameters) == EngineSettings()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"1024"', '"7"'),
        ("# Waiting", "# waiting"),
        ("count: 1", "count:  1"),
        ("Written by", "written by"),
        ("\n\n", "\n"),
    ],
)
def test_an_edit_is_noticed_wherever_it_is(before: str, after: str) -> None:
    text = to_text(CONFIGS["engine"])
    assert before in text and is_edited(text.replace(before, after, 1))
    assert is_edited(to_text(CONFIGS["engine"], is_edited=True))


def test_an_earlier_versions_text_cannot_tell() -> None:
    assert not is_edited('# Written by `deepseek-triton build`: change the builder, not this file.\nname: "m"\n')


def test_no_queue_of_tritons_has_a_limit_that_nobody_asked_for() -> None:
    """With one, a request that comes while the model computes may wait for half a second though it is idle again."""
    for part, config in CONFIGS.items():
        assert not config.dynamic_batching.HasField("default_queue_policy"), part
