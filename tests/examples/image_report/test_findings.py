from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from deepseek_triton.examples.image_report.classifier import GRAPH_FILE, Classifier
from deepseek_triton.examples.image_report.contract import TILE_SIZE
from deepseek_triton.examples.image_report.findings import CALIBRATION_FILE, FINDINGS, Finding, TemperatureScaling
from deepseek_triton.examples.image_report.images.decode import pixels_of
from deepseek_triton.examples.image_report.report import NOTICE, ReportError, impressions, messages, read_report, schema
from deepseek_triton.examples.image_report.repository import DATA, configs
from deepseek_triton.examples.image_report.tiles import make_tile
from tests.examples.image_report.pictures import encoded

ONE = TemperatureScaling((1.0,) * len(FINDINGS))
TEST_SEED = 3_000_000  # no tile of training, calibration or the benchmark


def test_the_same_seed_gives_the_same_tile() -> None:
    first, again, other = make_tile(1), make_tile(1), make_tile(2)
    assert first.truths == again.truths and first.image.tobytes() == again.image.tobytes()
    assert first.image.tobytes() != other.image.tobytes()
    assert first.image.size == (TILE_SIZE, TILE_SIZE)


@pytest.mark.slow
def test_the_shipped_model_finds_what_is_there() -> None:
    """Chance is 0.5 to 0.6; what was measured on many tiles is in benchmarks/results/image-report.json."""
    tiles = [make_tile(TEST_SEED + seed) for seed in range(24)]
    logits = Classifier(DATA / GRAPH_FILE).logits(np.stack([pixels_of(encoded(tile.image)) for tile in tiles]))
    truths = np.array([tile.truths for tile in tiles])
    assert ((logits > 0) == truths).mean() > 0.85
    assert ((logits > 0) == truths).mean(axis=0).min() > 0.6


def test_a_batch_gives_what_its_images_give_alone() -> None:
    classifier = Classifier(DATA / GRAPH_FILE)
    pixels = np.stack([pixels_of(encoded(make_tile(seed).image)) for seed in range(3)])
    alone = np.concatenate([classifier.logits(one[None]) for one in pixels])
    assert classifier.logits(pixels) == pytest.approx(alone, abs=1e-4)


def test_the_shipped_files_are_small() -> None:
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 2 * 2**20


def test_logits_become_findings() -> None:
    logit = math.log(0.9 / 0.1)
    found = ONE.findings([logit, -logit, 0.0, 100.0, -100.0])
    assert [(one.status, one.probability) for one in found] == [
        ("present", 0.9), ("absent", 0.1), ("uncertain", 0.5), ("present", 1.0), ("absent", 0.0),
    ]  # fmt: skip
    assert tuple(one.name for one in found) == FINDINGS


def test_a_temperature_makes_less_certain() -> None:
    hot = TemperatureScaling((2.0,) * len(FINDINGS))
    assert hot.findings([2.0] * 5)[0].probability == 0.73
    assert hot.findings([2.0] * 5)[0].status == "uncertain"
    assert ONE.findings([2.0] * 5)[0].status == "present"


@pytest.mark.parametrize(("logit", "status"), [(math.log(4), "present"), (-math.log(4), "absent")])
def test_the_thresholds_belong_to_the_certain_side(logit: float, status: str) -> None:
    assert ONE.findings([logit] * 5)[0].status == status


@pytest.mark.parametrize("logits", [[0.0] * 4, [math.nan] * 5, [math.inf, 0, 0, 0, 0]])
def test_logits_that_are_none(logits: list[float]) -> None:
    with pytest.raises(ValueError, match="logits must be 5 finite numbers"):
        ONE.findings(logits)


def test_a_calibration_is_kept(tmp_path: Path) -> None:
    calibration = TemperatureScaling((0.5, 1.0, 1.5, 2.0, 2.5), 0.9)
    calibration.save(tmp_path / CALIBRATION_FILE)
    assert TemperatureScaling.load(tmp_path / CALIBRATION_FILE) == calibration


@pytest.mark.parametrize(
    "text", ["", "{}", '{"temperatures": [1], "certain_from": 0.8}', '{"temperatures": 3, "certain_from": 0.8}']
)
def test_a_damaged_calibration_names_its_file(tmp_path: Path, text: str) -> None:
    (tmp_path / CALIBRATION_FILE).write_text(text)
    with pytest.raises(ValueError, match=CALIBRATION_FILE):
        TemperatureScaling.load(tmp_path / CALIBRATION_FILE)


@pytest.mark.parametrize("values", [((1.0,) * 5, 0.5), ((1.0,) * 5, 1.1), ((0.0,) * 5, 0.8), ((math.nan,) * 5, 0.8)])
def test_a_calibration_that_is_none(values: tuple[tuple[float, ...], float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        TemperatureScaling(*values)


FOUND = ONE.findings([2.0, -2.0, 0.1, 0.0, 5.0])


def report(**changes: object) -> str:
    stated = {one.name: f"{one.status} {one.probability:.2f}" for one in FOUND}
    fields = {"notice": NOTICE, "findings": stated, "impression": impressions(FOUND)[0]}
    return json.dumps({**fields, **changes})


def test_the_schema_takes_its_own_findings_alone() -> None:
    validator = jsonschema.Draft202012Validator(json.loads(schema(FOUND)))
    validator.validate(json.loads(report()))
    assert read_report(report()).findings == FOUND
    other = {one.name: f"absent {one.probability:.2f}" for one in FOUND}
    for wrong in (
        report(findings=other),
        report(findings={}),
        report(notice="A medical device."),
        report(impression="The tile shows necrosis."),
        report(more=1),
    ):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(json.loads(wrong))


def test_a_free_impression_is_one_sentence() -> None:
    validator = jsonschema.Draft202012Validator(json.loads(schema(FOUND, "free")))
    validator.validate(json.loads(report(impression="Many nuclei and varied shapes were seen here.")))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(json.loads(report(impression='"')))


@pytest.mark.parametrize(
    ("statuses", "first"),
    [
        ("pppuu", "The tile shows hypercellularity, mitotic figures and necrosis; inflammation and pleomorphism cannot "
         "be ruled out."),
        ("apaaa", "The tile shows mitotic figures."),
        ("aauaa", "Necrosis cannot be ruled out."),
        ("aaaaa", "The tile shows none of the findings."),
    ],
)  # fmt: skip
def test_each_impression_says_what_the_findings_say(statuses: str, first: str) -> None:
    """All of 243 combinations of statuses: every sentence names what is present or uncertain, and nothing else."""
    names = {"p": "present", "a": "absent", "u": "uncertain"}
    words = [name.replace("_", " ") for name in FINDINGS]

    def said(kinds: str) -> tuple[str, ...]:
        return impressions([Finding(n, names[k], 0.5) for n, k in zip(FINDINGS, kinds, strict=True)])  # type: ignore[arg-type]

    assert said(statuses)[0] == first
    for kinds in itertools.product("pau", repeat=len(FINDINGS)):
        for sentence in (sentences := said("".join(kinds))):
            assert re.fullmatch(r"[A-Z][a-z,:; ]+\.", sentence)
            lower = sentence.lower()
            assert [word in lower for word in words] == [kind != "a" for kind in kinds]
            if "p" in kinds and "u" in kinds:
                before = lower.partition(";")[0]
                assert [word in before for word in words] == [kind == "p" for kind in kinds]
        assert len(set(sentences)) == len(sentences) >= 2


def test_the_prompt_tells_findings_and_uncertainty() -> None:
    *_, user = json.loads(messages(FOUND))
    assert user["role"] == "user"
    assert user["content"].splitlines()[:3] == [
        "hypercellularity is present (88%)",
        "mitotic figures is absent (12%)",
        "necrosis is uncertain (52%)",
    ]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"notice": "", "findings": {"a": 1}, "impression": ""}', "{"])
def test_what_is_no_report(text: str) -> None:
    with pytest.raises(ReportError):
        read_report(text)


def test_a_plan_has_the_tensors_of_the_python_model() -> None:
    """Nothing else in the repository knows which of the two runs."""
    python, plan = (
        {config.name: config for config in configs("r", "t", has_plan=has_plan)} for has_plan in (False, True)
    )
    assert plan["r-resnet"].platform == "tensorrt_plan"
    assert plan["r-resnet"].max_batch_size == python["r-resnet"].max_batch_size > 1
    assert plan["r-resnet"].HasField("dynamic_batching")
    assert list(plan["r-resnet"].input) == list(python["r-resnet"].input)
    assert list(plan["r-resnet"].output) == list(python["r-resnet"].output)
    assert {name: config for name, config in plan.items() if name != "r-resnet"} == {
        name: config for name, config in python.items() if name != "r-resnet"
    }
