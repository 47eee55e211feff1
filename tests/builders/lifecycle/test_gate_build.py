"""The gate judges the build that is served: by its own runner; promoted is that build, or none."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders import cli
from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.commands.gate import NOT_PASSED
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.lifecycle.digest import digest_of
from deepseek_triton.builders.lifecycle.gate.report import require_passed
from deepseek_triton.builders.lifecycle.promotion.options import PromoteOptions
from deepseek_triton.builders.lifecycle.promotion.promote import promote
from deepseek_triton.builders.lifecycle.promotion.route import write_route
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from tests.builders.lifecycle.test_gate import limits_file
from tests.builders.lifecycle.test_learn import write_lines
from tests.builders.lifecycle.test_promote import FakeControl, FakeGateway, quick, serving
from tests.builders.lifecycle.test_promote_killed import CLI
from tests.support.byte_models import write_byte_model

pytestmark = pytest.mark.slow  # all stand on builds, and measure them
__all__ = ["quick"]  # a fixture of all tests here: promotions look at once
WIDE: dict[str, Any] = {
    "old_data": {"max_loss_increase": 9}, "new_data": {"min_loss_decrease": -9}, "memory": {"max_ratio": 3},
    "speed": {"min_ratio": 0.01},
    "checks": [{"name": "talks", "prompt": "ab", "must_match": "(?s).", "max_tokens": 4},
               {"name": "chats", "messages": [{"role": "user", "content": "hi"}], "must_match": "(?s).*",
                "max_tokens": 4}],
}  # fmt: skip


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """models: a repository with r1, in int8. base, candidate: checkpoints. new.jsonl and old.jsonl: data."""
    directory = tmp_path_factory.mktemp("gate")
    for name, seed in (("base", 0), ("candidate", 1)):
        write_byte_model(directory / name, seed, scale=0.3)
    options = ["--precision=int8", "--max-seq-len=64", "--max-num-seqs=4", "--max-num-batched-tokens=8", "-q"]
    words = ["build", str(directory / "base"), "--name=r1", f"--repository={directory / 'models'}", *options]
    assert cli.main(words) == 0
    chats = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a b " * (i % 5 + 1)}]}
        for i in range(12)
    ]
    write_lines(directory / "new.jsonl", chats)
    write_lines(directory / "old.jsonl", [{"text": f"some words {index}"} for index in range(12)])
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def world(family: Path, tmp_path: Path) -> Path:
    """A directory with a repository of its own."""
    shutil.copytree(family / "models", tmp_path / "models")
    return tmp_path


def words(family: Path, world: Path, limits: Any, *more: str) -> list[str]:
    file = limits_file(world / "limits.json", limits)
    return [
        "gate", str(family / "candidate"), f"--data={family / 'new.jsonl'}", f"--replay={family / 'old.jsonl'}",
        "--held-out=0.5", "--window=48", f"--limits={file}", f"--report={world / 'report'}", *more,
    ]  # fmt: skip


def judge(family: Path, world: Path, limits: Any) -> int:
    return cli.main([*words(family, world, limits, "--name=r1", f"--repository={world / 'models'}"), "-q"])


def report(world: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((world / "report" / "report.json").read_text("utf-8"))
    return found


def models(world: Path) -> list[str]:
    return sorted(path.name for path in (world / "models").iterdir() if path.name.startswith("r1"))


def losses(values: dict[str, Any]) -> list[float]:
    return [
        float(one[side]) for one in values["verdicts"] if one["name"].endswith("_data") for side in ("measured", "base")
    ]


def test_the_build_is_what_is_judged(family: Path, world: Path) -> None:
    pytest.importorskip("torch")
    against = words(family, world, WIDE, f"--against={family / 'base'}", "--device=cpu", "-q")
    assert cli.main(against) == 0
    of_checkpoints = report(world)
    assert judge(family, world, WIDE) == 0
    found = report(world)
    assert "r1-v2" in found["judged"] and "int8" in found["judged"] and found["built"]["base"] == "r1"
    assert found["built"]["name"] == "r1-v2" and {"r1-v2", "r1-v2-engine"} <= set(models(world))
    assert losses(found) == pytest.approx(losses(of_checkpoints), rel=0.02)
    assert losses(found) != pytest.approx(losses(of_checkpoints), abs=1e-4)  # what the int8 weights cost
    whys = [one["why"] for one in found["verdicts"] if one["name"] == "memory"]
    assert len(whys) == 2 and "process" in whys[1]
    assert {one["name"] for one in found["verdicts"]} >= {"speed", "check talks", "check chats"}
    before = models(world)
    assert judge(family, world, WIDE) == 0 and models(world) == before  # again: the same build


def test_a_build_that_does_not_pass_is_removed(family: Path, world: Path) -> None:
    before = models(world)
    assert judge(family, world, {**WIDE, "new_data": {"min_loss_decrease": 5}}) == NOT_PASSED
    assert models(world) == before and not report(world)["passed"]
    assert [path.name for path in world.glob(".models*")] == []
    with pytest.raises(BuildError, match="new_data"):
        require_passed(world / "report", digest_of(open_checkpoint(family / "candidate")))


def test_promoted_is_the_build_that_was_judged(family: Path, world: Path) -> None:
    assert judge(family, world, WIDE) == 0
    routes, control, built = world / "routes.json", FakeControl(), list[str]()

    def go() -> Any:
        options = PromoteOptions(
            "r1", family / "candidate", world / "report", world / "models", routes, (url,), stage_s=0, max_stage_s=5
        )
        fake: Any = control
        return promote(options, lambda old, new: built.append(new), fake)

    with serving(FakeGateway(routes)) as url:
        write_route(routes, "r1", {"r1": 50, "r1-v2": 50}, "caller")
        with pytest.raises(BuildError, match="shares already"):
            go()
        routes.unlink()
        build(BuildOptions(family / "base", "r1-v2", world / "models", max_seq_len=32))
        with pytest.raises(BuildError, match="r1-v2 is another build than the gate judged"):
            go()
        assert not routes.exists() and control.loaded == {"r1"}
        shutil.rmtree(world / "models" / "r1-v2-engine" / "2")
        for part in ("r1-v2", "r1-v2-tokenizer", "r1-v2-detokenizer"):
            shutil.rmtree(world / "models" / part / "2", ignore_errors=True)
        promotion = go()
    assert promotion.new == "r1-v2" and built == [] and control.loaded == {"r1-v2"}


def test_one_of_the_two_ways_is_named(family: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words(family, world, WIDE)) == 1
    assert "--against" in capsys.readouterr().err
    assert cli.main(words(family, world, WIDE, "--name=r1", f"--against={family / 'base'}")) == 1
    assert cli.main(words(family, world, WIDE, "--name=r9", f"--repository={world / 'models'}")) == 1
    assert "r9" in capsys.readouterr().err


def test_the_same_command_goes_on_after_each_kill(family: Path, world: Path) -> None:
    command = [*CLI, *words(family, world, WIDE, "--name=r1", f"--repository={world / 'models'}")]
    for line in ("building r1-v2", "measuring r1-v2", "measuring r1\n"):
        lines: list[str] = []
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for shown in iter(process.stderr.readline, ""):
                lines.append(shown)
                if line in shown:
                    process.kill()
        assert process.returncode == -9 and not (world / "report").exists(), lines
        # A build that was killed is begun anew, a whole one is taken.
        assert any("building r1-v2" in shown for shown in lines) == (line != "measuring r1\n"), lines
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert "building r1-v2" not in again.stderr
    assert [name for name in models(world) if name.endswith("-engine")] == ["r1-engine", "r1-v2-engine"]
    assert not list(world.glob(".models-building*"))
