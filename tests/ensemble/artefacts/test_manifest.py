from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.ensemble.artefacts import manifest as manifest_module
from deepseek_triton.ensemble.artefacts.manifest import FILE_NAME, ArtefactFile, Manifest, ManifestError

COMMAND = "deepseek-triton build /models/r1 --name r1"
INSTALLED = {"onnxruntime": "1.24.1"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_bytes(b"graph")
    (tmp_path / "model.onnx.data").write_bytes(b"weights" * 100)
    return tmp_path


@pytest.fixture
def manifest(directory: Path) -> Manifest:
    return Manifest(
        name="r1",
        target="onnx",
        precision="fp32",
        checkpoint="r1",
        checkpoint_sha256="00",
        spec={"architecture": "qwen2", "rope": {"theta": 1e6}},
        limits={"max_seq_len": 2048, "max_batch_size": 8},
        end_ids=(1, 2),
        shapes={"input_ids": ["batch", "seq_len"], "logits": ["batch", 320]},
        versions={"onnx": "1.20.0"},
        requires={"onnxruntime": "1.24"},
        files={name: ArtefactFile.of(directory / name) for name in ("model.onnx", "model.onnx.data")},
        command=COMMAND,
    )


def test_round_trip(manifest: Manifest, directory: Path) -> None:
    manifest.save(directory)
    loaded = Manifest.load(directory)
    assert loaded == manifest
    assert (loaded.max_seq_len, loaded.end_ids) == (2048, (1, 2))
    loaded.verify(directory, INSTALLED)


def test_a_file_is_known_by_its_length_and_hash(directory: Path) -> None:
    content = bytes(range(256)) * 10_000  # several of the blocks that it is read in
    (directory / "big").write_bytes(content)
    assert ArtefactFile.of(directory / "big") == ArtefactFile(2_560_000, sha256(content).hexdigest())


def test_of_a_large_file_a_sample_is_checked_and_on_demand_the_whole(
    manifest: Manifest, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "SMALL_FILE", 100)
    monkeypatch.setattr(manifest_module, "SAMPLE_BYTES", 8)
    monkeypatch.setattr(manifest_module, "SAMPLE_BLOCKS", 3)
    path = directory / "model.onnx.data"
    content = path.read_bytes()
    manifest = replace(manifest, files={path.name: ArtefactFile.of(path)})
    manifest.save(directory)
    manifest = Manifest.load(directory)
    manifest.verify(directory, INSTALLED, is_whole=True)
    for place in (0, 7, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:place] + b"?" + content[place + 1 :])
        with pytest.raises(ManifestError, match=r"model\.onnx\.data has changed since it was built"):
            manifest.verify(directory, INSTALLED)
    path.write_bytes(content[:100] + b"?" + content[101:])  # between the blocks
    manifest.verify(directory, INSTALLED)
    with pytest.raises(ManifestError, match=r"model\.onnx\.data has changed since it was built"):
        manifest.verify(directory, INSTALLED, is_whole=True)


def difference(manifest: Manifest, directory: Path, installed: dict[str, str] | None = None) -> str:
    with pytest.raises(ManifestError) as error:
        manifest.verify(directory, INSTALLED if installed is None else installed)
    message = str(error.value)
    assert message.startswith(f"{directory}: ") and message.endswith(f"; rebuild with: {COMMAND}")
    return message


def test_each_difference_is_told_with_the_command_that_mends_it(manifest: Manifest, directory: Path) -> None:
    data = directory / "model.onnx.data"
    weights = data.read_bytes()
    data.write_bytes(weights[:-1])
    assert "model.onnx.data has 699 bytes, the manifest says 700" in difference(manifest, directory)
    data.write_bytes(b"W" + weights[1:])
    assert "model.onnx.data has changed since it was built" in difference(manifest, directory)
    data.unlink()
    assert "model.onnx.data is missing" in difference(manifest, directory)
    data.mkdir()
    assert "model.onnx.data is missing" in difference(manifest, directory)


def test_a_large_file_s_hash_is_not_computed_at_each_load(
    manifest: Manifest, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "SMALL_FILE", 100)
    monkeypatch.setattr(manifest_module, "SAMPLE_BYTES", 1)
    path = directory / "model.onnx.data"
    sampled = replace(manifest.files[path.name], sample=manifest_module.sample_of(path))
    manifest = replace(manifest, files={**manifest.files, path.name: sampled})
    path.write_bytes(b"weights" + b"W" + path.read_bytes()[8:])  # between the blocks of the sample
    manifest.verify(directory, INSTALLED)
    (directory / "model.onnx").write_bytes(b"GRAPH")
    assert "model.onnx has changed" in difference(manifest, directory)


@pytest.mark.parametrize(
    ("installed", "lowest", "fits"),
    [
        ("1.24", "1.24", True),
        ("1.24", "1.24.0", True),
        ("1.24.0", "1.24", True),
        ("1.24.1", "1.24", True),
        ("1.32.0+cpu", "1.24", True),
        ("1.100", "1.24", True),
        ("2.0.dev20260101", "1.24", True),
        ("1.23.9", "1.24", False),
        ("1.3", "1.24", False),
        ("1.24rc1", "1.24", False),
        ("0.99", "1.0", False),
    ],
)
def test_versions_are_compared_by_their_numbers(
    manifest: Manifest, directory: Path, installed: str, lowest: str, fits: bool
) -> None:
    needs = replace(manifest, requires={"onnxruntime": lowest})
    if fits:
        needs.verify(directory, {"onnxruntime": installed})
        return
    message = difference(needs, directory, {"onnxruntime": installed})
    assert f"onnxruntime is {installed}, the artefacts need {lowest} or later" in message


def test_a_package_that_is_not_installed(manifest: Manifest, directory: Path) -> None:
    assert "onnxruntime >= 1.24 is not installed" in difference(manifest, directory, {})


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        values = json.loads(text)
        change(values)
        return json.dumps(values)

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-9], "is not valid JSON; build the model again"),
        (lambda text: "[]", "missing or unknown fields []; build the model again"),
        (changed(lambda v: v.pop("end_ids")), "missing or unknown fields ['end_ids']"),
        (changed(lambda v: v.update(colour="red")), "missing or unknown fields ['colour']"),
        (changed(lambda v: v.update(format=1)), f"has format 1, this version reads 2; rebuild with: {COMMAND}"),
        (changed(lambda v: v.update(end_ids=7)), "is damaged; build the model again"),
        (changed(lambda v: v.update(end_ids=["x"])), "is damaged"),
        (changed(lambda v: v.update(files={"a": {"bytes": 1}})), "is damaged"),
        (changed(lambda v: v.update(files=[1])), "is damaged"),
        (changed(lambda v: v.update(limits={})), "is damaged"),
        (changed(lambda v: v.update(limits={"max_seq_len": None})), "is damaged"),
    ],
)
def test_a_damaged_manifest(damage: Callable[[str], str], message: str, manifest: Manifest, directory: Path) -> None:
    manifest.save(directory)
    path = directory / FILE_NAME
    path.write_text(damage(path.read_text()))
    with pytest.raises(ManifestError) as error:
        Manifest.load(directory)
    assert str(error.value).startswith(str(path)) and message in str(error.value)


def test_a_missing_or_unreadable_manifest(directory: Path) -> None:
    with pytest.raises(ManifestError, match=r"manifest\.json: No such file or directory; build the model again"):
        Manifest.load(directory)
    (directory / FILE_NAME).write_bytes(b"\xff\xfe")
    with pytest.raises(ManifestError, match="is not valid JSON"):
        Manifest.load(directory)
