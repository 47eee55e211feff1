"""A repository as it was when a server started, whatever has changed since."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from deepseek_triton.builders.commands.restarts import SameAgain
from deepseek_triton.ensemble.server.served_state import ServedState


def add(repository: Path, name: str, version: int, config: str = "old") -> None:
    (repository / name / str(version)).mkdir(parents=True)
    (repository / name / str(version) / "file").write_text(f"{name} {version}")
    (repository / name / "config.pbtxt").write_text(config)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    models = tmp_path / "models"
    add(models, "m", 1)
    add(models, "m-engine", 1)
    (models / ".hidden").mkdir()
    return models


@pytest.fixture
def restart(models: Path, tmp_path: Path) -> SimpleNamespace:
    """A server whose restarts are prepared: `served()` is the path that the next one serves; `said` has the lines."""
    server, said = SimpleNamespace(repository=models), list[str]()
    same_again = SameAgain(models, tmp_path / "temporary", said.append)

    def served() -> Path:
        same_again.prepare(server)
        path: Path = server.repository
        return path

    return SimpleNamespace(served=served, said=said)


def test_an_unchanged_repository_is_served_itself(restart: SimpleNamespace, models: Path) -> None:
    assert restart.served() == models and restart.said == []


def test_what_was_built_meanwhile_is_not_served_and_is_told(restart: SimpleNamespace, models: Path) -> None:
    for name in ("m", "m-engine"):
        add(models, name, 2, config="new")
    add(models, "other", 1)
    for _ in range(2):  # a second crash finds the links of the first
        served = restart.served()
        assert served != models and sorted(path.name for path in served.iterdir()) == ["m", "m-engine"]
        for name in ("m", "m-engine"):
            assert sorted(path.name for path in (served / name).iterdir()) == ["1", "config.pbtxt"]
            assert (served / name / "config.pbtxt").read_text() == "old"
            assert (served / name / "1" / "file").read_text() == f"{name} 1"
        assert restart.said.pop() == (
            "serving what was served before; end and start `serve` to serve what is new: other is new; "
            "m had versions 1, now 1, 2; m-engine had versions 1, now 1, 2"
        )


def test_a_changed_configuration_is_not_taken_either(restart: SimpleNamespace, models: Path) -> None:
    (models / "m-engine" / "config.pbtxt").write_text("new")
    served = restart.served()
    assert (served / "m-engine" / "config.pbtxt").read_text() == "old"
    assert restart.said[0].endswith(": m-engine/config.pbtxt has changed")
    (models / "m-engine" / "config.pbtxt").write_text("old")
    assert restart.served() == models


def test_what_is_gone_cannot_be_served_again(restart: SimpleNamespace, models: Path) -> None:
    add(models, "m", 2)
    shutil.rmtree(models / "m" / "1")
    assert restart.served() == models
    assert restart.said == [
        "what was served before is gone, so the newest is served: m had versions 1, now 2",
    ]


def test_an_older_version_that_was_pruned_is_not_missed(tmp_path: Path) -> None:
    models = tmp_path / "models"
    add(models, "m", 1)
    add(models, "m", 2)
    state = ServedState.of(models)
    shutil.rmtree(models / "m" / "1")
    assert state.is_whole() and state.differences() == ["m had versions 1, 2, now 2"]
    assert [path.name for path in (state.restore(tmp_path / "copy") / "m").glob("[0-9]*")] == ["2"]
