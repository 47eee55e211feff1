"""Building and checking a scoring model, without a server."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from deepseek_triton.builders import cli
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.check import check_repository, is_scoring_model, served_models
from deepseek_triton.builders.repository.models.built import BuiltModel
from deepseek_triton.builders.repository.models.configure import configure
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.repository.pbtxt import parse_text
from deepseek_triton.builders.scoring.options import TIMER_LATE_US, Batching, ScoringOptions, read_template
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.engine.runners.base import RunnerError
from deepseek_triton.ensemble.engine.runners.load import load_scoring_runner
from deepseek_triton.ensemble.engine.runners.onnx.scoring import OnnxScoringRunner
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.pipelines import score_pipeline
from deepseek_triton.ensemble.scoring.profile import ScoringProfile
from deepseek_triton.ensemble.scoring.rows import GRAPH_FILE, ScoreRow, batch_tensors, make_row
from deepseek_triton.ensemble.scoring.settings import ScoringSettings
from deepseek_triton.ensemble.text.tokenizer import Tokenizer
from tests.support.checkpoints import make_tokenizer, write_tiny

SCORING = ScoringOptions(template="{text} is", labels=("a", "b"), batching=Batching(max_batch_size=4))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_tokenizer(write_tiny(tmp_path / "tiny", vocab_size=320, eos_token_id=319))


def options(checkpoint: Path, **changes: Any) -> BuildOptions:
    models = checkpoint.parent / "models"
    values: dict[str, Any] = {"task": "score", "max_seq_len": 32, "scoring": SCORING}
    return BuildOptions(checkpoint, "s", models, **{**values, **changes})


@pytest.fixture
def models(checkpoint: Path) -> Path:
    build(options(checkpoint))
    return checkpoint.parent / "models"


def test_a_scoring_model_is_four_models(models: Path) -> None:
    assert check_repository(models) == []
    assert {path.name for path in models.iterdir()} == {"s", "s-tokenizer", "s-engine", "s-scorer"}
    files = {name: {path.name for path in (models / name / "1").iterdir()} for name in ("s-engine", "s-scorer")}
    assert files == {
        "s-engine": {"manifest.json", "model.py", "model.onnx.data", "scoring.onnx"},
        "s-scorer": {"model.py", "scoring.json"},
    }
    profile = ScoringProfile.load(models / "s-scorer" / "1")
    assert profile == ScoringProfile.load(models / "s-tokenizer" / "1")
    assert (profile.template, profile.labels, profile.max_seq_len, profile.max_request_tokens) == (
        "{text} is", ("a", "b"), 32, 0,
    )  # fmt: skip


@pytest.mark.slow
def test_what_is_asked_for_labels_is_told_apart(checkpoint: Path, models: Path) -> None:
    settings = {"max_num_seqs": 1, "max_num_batched_tokens": 8}
    build(BuildOptions(checkpoint, "g", models, max_seq_len=32, settings=settings))
    assert served_models(models) == ["g", "s"]
    assert [is_scoring_model(models, name) for name in ("g", "s", "nobody")] == [False, True, False]


def test_the_runner_scores_in_passes_what_it_scores_at_once(models: Path) -> None:
    directory = models / "s-engine" / "1"
    random = np.random.default_rng(0)
    rows = [
        make_row(random.integers(0, 320, n).astype(np.int32), [np.array([5, 6], np.int32), np.array([7], np.int32)])[0]
        for n in (3, 20, 9, 3)
    ]
    whole = load_scoring_runner(directory, ScoringSettings(num_threads=1)).score(rows)
    split = load_scoring_runner(directory, ScoringSettings(num_threads=1, max_pass_tokens=1)).score(rows)
    states = load_scoring_runner(directory, ScoringSettings(num_threads=1)).score(rows, with_log_probs=False)
    for one, state in zip(whole, states, strict=True):
        np.testing.assert_allclose(one.hidden, state.hidden, atol=1e-5)
        assert state.log_probs.size == 0
    for one, other in zip(whole, split, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)
        np.testing.assert_allclose(one.hidden, other.hidden, atol=1e-4)
    assert len({tuple(scores.log_probs.tolist()) for scores in whole}) == len(rows)


def test_what_nobody_asked_for_is_not_computed(models: Path) -> None:
    """Of the last layer's MLP the tokens that don't predict; of the head all, where no target is asked for."""
    path = models / "s-engine" / "1" / GRAPH_FILE
    model = onnx.load(path, load_external_data=False)
    computed = {"tokens": "model.layers.0.mlp_residual", "predicting": "model.layers.1.mlp_residual", "head": "lm_head"}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in computed.values())
    onnx.save(model, path.with_name("watched.onnx"))
    session = onnxruntime.InferenceSession(path.with_name("watched.onnx"), providers=["CPUExecutionProvider"])
    labels = [np.array([5, 6, 7], np.int32), np.array([8], np.int32)]
    rows = [make_row(np.arange(n, dtype=np.int32), labels)[0] for n in (9, 4)]

    def rows_of(asked: list[ScoreRow]) -> list[int]:
        caches = [value for value in session.get_inputs() if value.name.startswith("prefix")]
        empty = {value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in caches}
        found = session.run(list(computed.values()), {**batch_tensors(asked), **empty})
        return [int(np.prod(value.shape[:-1])) for value in found]

    assert rows_of(rows) == [9 + 2 + 4 + 2, 2 * 3, 2 * 3]
    assert rows_of([row.to_first_logits() for row in rows]) == [9 + 4, 2, 0]


class CountingSession:
    """An ONNX Runtime session that notes how many tokens each pass computes."""

    def __init__(self, session: Any) -> None:
        self._session, self.num_tokens = session, list[int]()

    def run(self, outputs: list[str], feeds: dict[str, Any]) -> Any:
        self.num_tokens.append(len(feeds["input_ids"]))
        return self._session.run(outputs, feeds)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_templates_beginning_is_computed_once_and_changes_no_score(checkpoint: Path, precision: str) -> None:
    scoring = replace(SCORING, template="Is it so: {text}?", batching=Batching(max_batch_size=4))
    build(options(checkpoint, scoring=scoring, precision=precision, max_seq_len=64))
    directory = checkpoint.parent / "models" / "s-engine" / "1"
    manifest = Manifest.load(directory)
    prefix = manifest.engine["prefix_ids"]
    tokenizer = Tokenizer.from_directory(checkpoint.parent / "models" / "s-tokenizer" / "1")
    assert tokenizer.decode(np.array(prefix, np.int32)) == "Is it so: "
    runner = load_scoring_runner(directory, ScoringSettings(num_threads=1))
    assert isinstance(runner, OnnxScoringRunner)
    cold = OnnxScoringRunner(directory / GRAPH_FILE, ScoringSettings(num_threads=1), vocab_size=320, max_seq_len=64)
    labels = [np.array([5, 6, 7], np.int32), np.array([8], np.int32)]
    prompts = [[*prefix, *range(40, 40 + n)] for n in (1, 9, 20)]
    others = [prefix, prefix[:3], [*prefix[:-1], 1, 2, 3], [9]]  # all of it and no more; less; another; nothing of it
    rows = [make_row(np.array(prompt, np.int32), labels)[0] for prompt in (*prompts, *others)]
    rows = [rows[number] for number in (3, 0, 4, 1, 5, 2, 6)]  # mixed
    runner._session = counting = CountingSession(runner._session)
    for found, expected in zip(runner.score(rows), cold.score(rows), strict=True):
        np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5 if precision == "fp32" else 1e-2)
        np.testing.assert_allclose(found.hidden, expected.hidden, atol=1e-4 if precision == "fp32" else 2e-2)
    branch = len(labels[0]) - 1
    assert counting.num_tokens == [
        sum(len(prompt) - len(prefix) + branch for prompt in prompts),
        sum(len(prompt) + branch for prompt in others),
    ]


def test_a_graph_of_before_prefixes_still_runs(models: Path) -> None:
    path = models / "s-engine" / "1" / "manifest.json"
    values = json.loads(path.read_text())
    assert values["engine"]["prefix_ids"] == [], "the template begins with the text"
    path.write_text(json.dumps({**values, "engine": {}}))
    rows = [make_row(np.arange(5, dtype=np.int32), [np.array([5], np.int32), np.array([7], np.int32)])[0]]
    (found,) = load_scoring_runner(path.parent, ScoringSettings(num_threads=1)).score(rows)
    assert found.log_probs.shape == (2,)


def test_target_cuda_has_its_own_settings(checkpoint: Path) -> None:
    build(options(checkpoint, target="cuda", precision="bf16", scoring=replace(SCORING, embeddings=True)))
    models = checkpoint.parent / "models"
    engine = models / "s-engine"
    assert check_repository(models) == []
    assert {path.name for path in (engine / "1").iterdir()} == {"manifest.json", "model.py", "model.safetensors"}
    config = parse_text((engine / "config.pbtxt").read_text(), engine)
    assert {name: value.string_value for name, value in config.parameters.items()} == {"max_pass_tokens": "4096"}
    assert (config.backend, config.max_batch_size, config.dynamic_batching.preferred_batch_size) == ("python", 4, [4])
    assert "embedding" in {
        output.name for output in parse_text((models / "s" / "config.pbtxt").read_text(), models).output
    }
    model = BuiltModel.read(models, "s")
    assert model.changed_settings() == {"max_batch_size": 4} and "num_threads" not in model.settings()
    configure(model, {"max_pass_tokens": 1000})
    assert BuiltModel.read(models, "s").changed_settings()["max_pass_tokens"] == 1000
    with pytest.raises(BuildError, match="--num-threads is for scoring on a CPU, the target is cuda; leave it out"):
        options(checkpoint, target="cuda", precision="bf16", settings={"num_threads": 2})


def test_a_damaged_cuda_manifest_is_told(checkpoint: Path) -> None:
    build(options(checkpoint, target="cuda", precision="bf16"))
    path = checkpoint.parent / "models" / "s-engine" / "1" / "manifest.json"
    values = json.loads(path.read_text())
    del values["engine"]["head_dim"]
    path.write_text(json.dumps(values))
    (problem,) = check_repository(checkpoint.parent / "models")
    assert "missing or unknown fields ['head_dim']; build the model again" in str(problem)


def test_another_targets_artefacts_are_refused(models: Path) -> None:
    directory = models / "s-engine" / "1"
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps({**manifest, "target": "tensorrt"}))
    with pytest.raises(RunnerError, match="built for target 'tensorrt': Triton's own backend runs it"):
        load_scoring_runner(directory, ScoringSettings())


def test_the_pipeline_is_whole() -> None:
    known = {spec.name for spec in contract.SCORE.inputs}
    public = known | {spec.name for spec in contract.SCORE.outputs}
    for step in score_pipeline(embeds=False).steps:
        assert set(step.input_map) == {spec.name for spec in step.contract.inputs}
        assert set(step.output_map) == {spec.name for spec in step.contract.outputs}
        assert set(step.input_map.values()) <= known
        known |= set(step.output_map.values())
        assert all(name.startswith("_") for name in set(step.output_map.values()) - public)
    assert public <= known


def spoil_config(before: str, after: str) -> Any:
    def spoil(models: Path) -> None:
        path = models / "s-engine" / "config.pbtxt"
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after, 1))

    return spoil


def spoil_file(name: str, text: str) -> Any:
    return lambda models: (models / name).write_text(text)


PROBLEMS: dict[str, tuple[Any, str]] = {
    "no ragged batches": (spoil_config("  allow_ragged_batch: true\n", ""), "has no allow_ragged_batch"),
    "a preference that can't be": (spoil_config("preferred_batch_size: 4", "preferred_batch_size: 5"), "5 is above"),
    "an unknown parameter": (spoil_config('key: "num_threads"', 'key: "max_num_seqs"'), "parameter 'max_num_seqs'"),
    "no profile": (lambda models: (models / "s-scorer/1/scoring.json").unlink(), "scoring.json: No such file"),
    "a damaged profile": (spoil_file("s-tokenizer/1/scoring.json", "{"), "scoring.json: is not valid JSON"),
    "a damaged calibration": (spoil_file("s-scorer/1/calibration.json", "{}"), "is not a calibration"),
    "no manifest": (lambda models: (models / "s-engine/1/manifest.json").unlink(), "manifest.json"),
    "a missing graph": (lambda models: (models / "s-engine/1/scoring.onnx").unlink(), "scoring.onnx: is missing"),
    "a short graph": (spoil_file("s-engine/1/scoring.onnx", "x"), "has 1 bytes, the manifest says"),
    "a batch larger than the engine's": (
        lambda models: (models / "s/config.pbtxt").write_text(
            (models / "s/config.pbtxt").read_text().replace("max_batch_size: 4", "max_batch_size: 5")
        ),
        "max_batch_size is 5, must be at most the model's, 4",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_check_finds(name: str, models: Path) -> None:
    spoil, message = PROBLEMS[name]
    spoil(models)
    (problem,) = check_repository(models)
    assert message in str(problem)
    assert str(problem).startswith(str(models))


def test_a_calibration_of_other_scores_is_found(models: Path) -> None:
    values = {
        "labels": ["a", "b"], "temperature": 1.0, "biases": [0, 0], "method": "bias", "normalisation": "sum",
        "report": {}, "head": None, "format": 1,
    }  # fmt: skip
    (models / "s-scorer" / "1" / "calibration.json").write_text(json.dumps(values))
    (problem,) = check_repository(models)
    assert "was fitted on sum scores, the profile says mean: fit it again" in str(problem)


@pytest.mark.parametrize(
    ("scoring", "message"),
    [
        (ScoringOptions(template="none"), "template is 'none', must hold {text} once"),
        (ScoringOptions(labels=("a",)), "labels holds 1 label"),
        (ScoringOptions(template="x" * 40 + "{text}"), "the prompt has 41 tokens"),
    ],
)
def test_a_build_at_fault_leaves_nothing(scoring: ScoringOptions, message: str, checkpoint: Path) -> None:
    with pytest.raises(BuildError, match=message):
        build(options(checkpoint, scoring=scoring))
    assert not (checkpoint.parent / "models").exists()


def test_options_at_fault(checkpoint: Path) -> None:
    with pytest.raises(BuildError, match="use target onnx or cuda or tensorrt"):
        options(checkpoint, target="tensorrt-rtx", precision="fp16")
    with pytest.raises(BuildError, match="target is 'vllm', which task score doesn't have"):
        options(checkpoint, target="vllm", precision="stored")
    for settings, option in (({"max_num_seqs": 3}, "max-num-seqs"), ({"max_num_batched_tokens": 3}, "max-num-batched")):
        with pytest.raises(BuildError, match=f"--{option}.* is for task generate"):
            options(checkpoint, settings=settings)
    with pytest.raises(BuildError, match="scoring options are for task score, this is generate"):
        options(checkpoint, task="generate")
    with pytest.raises(BuildError, match="max_batch_size is 0, must be an integer of at least 1"):
        Batching(max_batch_size=0)
    with pytest.raises(BuildError, match="preferred_batch_sizes has 9"):
        Batching(max_batch_size=8, preferred_batch_sizes=(9,))
    with pytest.raises(BuildError, match=r"holds no \{text\}, and is no file that can be read"):
        read_template("nothing")


def test_the_command_builds_what_the_manifest_says_it_built(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = checkpoint.parent / "template.txt"
    template.write_text("Is {text} good?\n", encoding="utf-8-sig")
    arguments = [
        "build", str(checkpoint), "--name", "s", "--task", "score", "--repository", str(checkpoint.parent / "models"),
        "--max-seq-len", "48", "--template", str(template), "--labels", "yes, no", "--label-prefix", "",
        "--normalisation", "sum", "--max-batch-size", "8", "--preferred-batch-sizes", "2,4",
        "--max-queue-delay-us", "1230", "--queue-timeout-us", "9", "--max-queue-size", "8", "--max-pass-tokens", "64",
        "--engine-instances", "2",
    ]  # fmt: skip
    assert cli.main(arguments) == 0, capsys.readouterr().err
    directory = checkpoint.parent / "models" / "s-engine"
    profile = ScoringProfile.load(checkpoint.parent / "models" / "s-tokenizer" / "1")
    assert (profile.labels, profile.label_prefix, profile.normalisation) == (("yes", "no"), "", "sum")
    config = parse_text((directory / "config.pbtxt").read_text(), directory)
    batching = config.dynamic_batching
    assert (config.max_batch_size, list(batching.preferred_batch_size)) == (8, [2, 4, 8])
    assert batching.max_queue_delay_microseconds == 1230 - TIMER_LATE_US
    policy = batching.default_queue_policy
    assert (policy.default_timeout_microseconds, policy.max_queue_size, policy.allow_timeout_override) == (9, 8, True)
    assert [group.count for group in config.instance_group] == [2]
    command = Manifest.load(directory / "1").command
    import shlex

    parsed = cli.parse(shlex.split(command)[1:])
    first = cli.parse(arguments)
    first.template, first.labels, first.run = "Is {text} good?", "yes,no", parsed.run
    first.precision = parsed.precision
    assert vars(parsed) == vars(first)


def test_bad_numbers_are_told_in_one_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build", str(checkpoint), "--name", "s", "--task", "score", "--preferred-batch-sizes", "2,x"]
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err == (
        "error: preferred_batch_sizes is '2,x', must be numbers with commas between them\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_other_precisions_score_nearly_the_same(checkpoint: Path, tmp_path: Path, precision: str) -> None:
    row, _ = make_row(np.array([5, 6, 7], np.int32), [np.array([8], np.int32), np.array([9], np.int32)])
    scores = {}
    for name in ("fp32", precision):
        own = replace(options(checkpoint, precision=name), repository=tmp_path / name)
        build(own)
        assert check_repository(own.repository) == []
        runner = load_scoring_runner(own.repository / f"{own.name}-engine" / "1", ScoringSettings())
        scores[name] = runner.score([row])[0].hidden
    cosine = np.dot(*scores.values()) / np.prod([np.linalg.norm(own) for own in scores.values()])
    assert cosine > (0.9 if precision == "int4" else 0.999)
