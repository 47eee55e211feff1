"""`inspect`, `list` and `prune-versions`: what lies in a repository, what serves, and what frees the disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders import cli
from deepseek_triton.builders.commands import serving_now
from deepseek_triton.builders.repository.check import check_repository
from deepseek_triton.builders.repository.models.built import BuiltModel
from deepseek_triton.builders.repository.models.configure import configure
from deepseek_triton.builders.repository.models.inventory import describe_bytes
from tests.support.tuning import tiny_checkpoint, tiny_repository

URL = "localhost:1"  # nothing listens there


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_repository(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def models(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`g` with versions 1 to 4, `s` with version 1."""
    monkeypatch.setenv("DEEPSEEK_TRITON_URL", URL)
    models = tmp_path / "models"
    shutil.copytree(built, models)
    for part in BuiltModel.read(models, "g").texts:
        for version in ("2", "3", "4"):
            shutil.copytree(models / part / "1", models / part / version)
    return models


def serve(monkeypatch: pytest.MonkeyPatch, **versions: tuple[int, ...]) -> None:
    """A server that has these versions of these models."""
    monkeypatch.setattr(serving_now, "versions_served", lambda arguments, model: versions.get(model, ()))


@pytest.mark.slow
def test_another_repositorys_model_of_the_name(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = BuiltModel.read(models, "g").manifest.identity
    serve(monkeypatch, g=(2,))
    monkeypatch.setattr(serving_now, "_told_identity", lambda arguments, model: own)
    assert "serves g version 2" in command(capsys, "inspect", "g", "--repository", models)
    command(capsys, "configure", "g", "--repository", models, "--timeout-ms", "7")
    assert "serves g version 2" in command(capsys, "list", models), "settings don't make it another build"
    monkeypatch.setattr(serving_now, "_told_identity", lambda arguments, model: "0" * 32)
    for words in (("list", models), ("inspect", "g", "--repository", models)):
        out = command(capsys, *words)
        assert out.endswith(f"the server at {URL} serves none of these models; its g isn't this repository's\n")
        assert "serves now" not in out
    removed = json.loads(command(capsys, "prune-versions", "g", "--repository", models, "--json", "--keep", "1"))
    assert [one["version"] for one in removed["removed"]] == [1, 3], "it may be ours all the same: it stays"
    out = command(capsys, "configure", "g", "--repository", models, "--timeout-ms", "8")
    assert "a server that is running already must be ended" in out
    build = ["build", tiny_checkpoint(tmp_path), "--name", "g", "--repository", models, "--max-seq-len", "32"]
    assert "answers with version" not in command(capsys, *build)


def test_a_version_that_is_not_here_is_another_repositorys(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_now, "_told_identity", lambda arguments, model: "")  # a server of before
    serve(monkeypatch, g=(2,))
    assert "serves g version 2" in command(capsys, "list", models)
    serve(monkeypatch, g=(9,))
    assert "its g isn't this repository's" in command(capsys, "list", models)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_timeout_that_cannot_be(models: Path, capsys: pytest.CaptureFixture[str], value: str) -> None:
    for words in (["list", str(models)], ["inspect", "g", "--repository", str(models)]):
        assert cli.main([*words, "--timeout", value]) == 1
        assert capsys.readouterr().err == f"error: timeout is {value}, must be finite and above 0\n"


def command(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def size(models: Path, name: str, version: int) -> int:
    directories = (models / part / str(version) for part in BuiltModel.read(models, name).texts)
    return sum(path.stat().st_size for directory in directories for path in directory.rglob("*"))


def test_list_has_every_model(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    head, g, s, server = command(capsys, "list", models).splitlines()
    assert g.split()[:5] == ["g", "generate", "onnx", "fp32", "1,2,3,4"] and g.split()[-1] == "-"
    assert s.split()[:5] == ["s", "score", "onnx", "fp32", "1"] and head.split()[-1] == "serves"
    assert server == f"no server answers at {URL}; name another with --url or DEEPSEEK_TRITON_URL"
    serve(monkeypatch, g=(3,))
    _, g, s, server = command(capsys, "list", models).splitlines()
    assert g.split()[-1] == "3" and s.split()[-1] == "-" and server == f"the server at {URL} serves g version 3"
    found = json.loads(command(capsys, "list", models, "--json"))["models"]
    assert [(one["model"]["name"], one["served"]) for one in found] == [("g", [3]), ("s", [])]
    assert [one["num_bytes"] for one in found[0]["model"]["versions"]] == [size(models, "g", v) for v in range(1, 5)]
    assert found[0]["bytes"] == 4 * size(models, "g", 1)


def test_a_model_that_cannot_be_read_is_listed(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (models / "s-engine" / "1" / "manifest.json").write_text("{")
    assert "s      ?" in command(capsys, "list", models)
    assert "can't be read: " in command(capsys, "inspect", "s", "--repository", models)
    (models / "s-engine" / "config.pbtxt").unlink()
    assert "s      ?" in command(capsys, "list", models)
    assert "s-engine/config.pbtxt: No such file" in command(capsys, "inspect", "s", "--repository", models)
    (models / "s" / "config.pbtxt").unlink()
    assert cli.main(["inspect", "s", "--repository", str(models)]) == 1
    assert "s/config.pbtxt: No such file or directory; write it anew with: " in capsys.readouterr().err


def test_inspect_shows_settings_and_which_were_changed(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(BuiltModel.read(models, "g"), {"max_queue_size": 5})
    serve(monkeypatch, g=(3,))
    out = command(capsys, "inspect", "g", "--repository", models)
    lines = [line.split() for line in out.splitlines()]
    assert ["*", "max_queue_size", "5", "(default:", "1024)"] in lines and ["timeout_ms", "0"] in lines
    assert ["3", *describe_bytes(size(models, "g", 3)).split(), "serves", "now"] in lines
    assert ["4", *describe_bytes(size(models, "g", 4)).split(), "newest"] in lines
    assert "task generate, target onnx, fp32, max_seq_len 32" in out and "rebuild with: deepseek-triton build " in out
    found = json.loads(command(capsys, "inspect", "g", "--repository", models, "--json"))
    # The tiny model was built with 3 sequences and 8 prompt tokens in a step.
    assert found["changed"] == ["max_num_seqs", "max_num_batched_tokens", "max_queue_size"] and found["served"] == [3]
    assert {"name": "max_queue_size", "value": 5, "default": 1024} in found["model"]["settings"]
    assert cli.main(["inspect", "gg", "--repository", str(models)]) == 1
    assert "has no model 'gg'; did you mean g?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keep", "served", "left"),
    [(1, (), [4]), (2, (), [3, 4]), (1, (2,), [2, 4]), (2, (4,), [3, 4]), (9, (), [1, 2, 3, 4])],
)
def test_prune_keeps_the_newest_and_what_serves(
    keep: int, served: tuple[int, ...], left: list[int], models: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    serve(monkeypatch, g=served)
    removed = [version for version in (1, 2, 3, 4) if version not in left]
    one, total = size(models, "g", 1), size(models, "g", 1) * len(removed)
    before = sorted(models.rglob("*"))
    out = command(capsys, "prune-versions", "--repository", models, "--keep", keep, "--dry-run")
    assert sorted(models.rglob("*")) == before
    assert [line for line in out.splitlines() if line.startswith("would remove")] == [
        f"would remove g, version {version}: {one:,} bytes" for version in removed
    ]
    out = command(capsys, "prune-versions", "--repository", models, "--keep", keep)
    last = f"freed {total:,} bytes ({describe_bytes(total)})" if removed else "nothing to remove"
    assert out.splitlines()[-1] == last
    assert list(BuiltModel.read(models, "g").versions) == left and list(BuiltModel.read(models, "s").versions) == [1]
    for part in BuiltModel.read(models, "g").texts:
        assert sorted(int(path.name) for path in (models / part).iterdir() if path.is_dir()) == left
    assert check_repository(models) == []


def test_prune_takes_the_models_that_are_named(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(command(capsys, "prune-versions", "s", "--repository", models, "--json"))
    assert found == {"removed": [], "bytes": 0, "is_dry_run": False, "served": {"s": None}}
    found = json.loads(command(capsys, "prune-versions", "g", "--repository", models, "--json"))
    assert [one["version"] for one in found["removed"]] == [1, 2]
    assert cli.main(["prune-versions", "--repository", str(models), "--keep", "0"]) == 1
    assert "keep is 0, must be at least 1" in capsys.readouterr().err


def test_a_prune_that_fails_says_so(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", fail)
    assert cli.main(["prune-versions", "--repository", str(models)]) == 1
    assert f"{models / 'g' / '1'}: Permission denied; correct this and prune again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (15_231_000_000, "15.2 GB")]
)
def test_sizes_are_told_in_words(num_bytes: int, text: str) -> None:
    assert describe_bytes(num_bytes) == text


@pytest.mark.slow
def test_build_and_configure_say_which_version_answers_until_a_restart(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    build = ["build", checkpoint, "--name", "g", "--repository", models, "--max-seq-len", "32"]
    *_, serve_line, restart = command(capsys, *build).splitlines()
    assert serve_line == f"serve it with: deepseek-triton serve {models}"
    assert restart == "a server that is running already must be restarted to serve version 5", "no server answers"
    serve(monkeypatch, g=(4,))
    *_, restart, answers = command(capsys, *build).splitlines()
    assert restart == "a server that is running already must be restarted to serve version 6"
    assert answers == f"the server at {URL} answers with version 4 of g until then"
    out = command(capsys, "configure", "g", "--repository", models, "--timeout-ms", "7")
    assert out.splitlines() == [
        "timeout_ms: 0 → 7",
        f"the server at {URL} has the old settings until it is ended and started again: deepseek-triton serve {models}",
    ]
    found = json.loads(command(capsys, "configure", "g", "--repository", models, "--timeout-ms", "8", "--json"))
    assert found["changes"] == [{"name": "timeout_ms", "before": 7, "after": 8}] and found["served"] == [4]
