"""A model's name instead of a path: huggingface_hub's own client against a server that answers as the Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders.checkpoint.config.hf_config import from_hf
from deepseek_triton.builders.checkpoint.files.hub import local_checkpoint
from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError, CheckpointError, UnsupportedError
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from tests.builders.checkpoint.test_weight_files import SHARDS, write_shards
from tests.support.checkpoints import TINY, make_checkpoint, make_tokenizer, random_tensors, write_tiny
from tests.support.fake_hub import COMMIT, FakeHub, running
from tests.support.gguf_files import write_gguf

TINY_ID = "deepseek-ai/Tiny-R1"
pytestmark = pytest.mark.filterwarnings("ignore")  # huggingface_hub's own


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The Hub with one model of three shards, beside which lie files that nobody needs."""
    constants = pytest.importorskip("huggingface_hub.constants")
    path = make_tokenizer(tmp_path / "model")
    weight_map = write_shards(path, random_tensors(from_hf(TINY)))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in ("pytorch_model.bin", "README.md", "original/consolidated.00.pth", "other.safetensors"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"not needed")
    with running(FakeHub({TINY_ID: path}, gated=("deepseek-ai/Gated",))) as fake:
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield fake


@pytest.mark.slow
def test_a_name_is_downloaded_with_progress_and_without_what_nobody_needs(hub: FakeHub) -> None:
    reports: list[tuple[str, int, int]] = []
    path = local_checkpoint(Path(TINY_ID), None, lambda *report: reports.append(report))
    assert set(hub.downloads) == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json", *SHARDS,
    }  # fmt: skip
    open_checkpoint(path)
    assert path.name == COMMIT
    what, done, total = reports[-1]
    assert what == "download" and done == total > sum((path / shard).stat().st_size for shard in SHARDS)
    hub.downloads.clear()
    assert local_checkpoint(Path(TINY_ID), "main") == path and not hub.downloads, "the cache has it"


@pytest.mark.slow
def test_offline_the_cache_is_used_or_the_error_says_what_to_do(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = local_checkpoint(Path(TINY_ID))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert local_checkpoint(Path(TINY_ID)) == path
    assert local_checkpoint(Path(TINY_ID), COMMIT) == path
    with pytest.raises(
        BuildError, match="deepseek-ai/Other is not in the cache, and Hugging Face can't be reached"
    ) as e:
        local_checkpoint(Path("deepseek-ai/Other"))
    assert "hf download deepseek-ai/Other" in str(e.value) and "\n" not in str(e.value)
    (path / SHARDS[1]).resolve().unlink()
    with pytest.raises(CheckpointError, match="the snapshot is incomplete; complete it with: hf download deepseek-ai"):
        open_checkpoint(local_checkpoint(Path(TINY_ID)))


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("deepseek-ai/Nowhere", None, "neither a path here nor a model on Hugging Face"),
        ("deepseek-ai/Gated", None, "is gated: accept its terms at https://huggingface.co/deepseek-ai/Gated"),
        (TINY_ID, "v9", "has no revision 'v9'"),
        (f"{TINY_ID}/q4.gguf", None, "has no q4.gguf; its GGUF files: none"),
    ],
)
def test_what_the_hub_refuses_is_told(hub: FakeHub, name: str, revision: str | None, message: str) -> None:
    with pytest.raises(BuildError, match=message) as caught:
        local_checkpoint(Path(name), revision)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_gguf_is_named_with_its_file(hub: FakeHub, tmp_path: Path) -> None:
    spec, directory = from_hf(TINY), tmp_path / "gguf"
    directory.mkdir()
    write_gguf(directory / "m-q8.gguf", spec, random_tensors(spec), split_max_tensors=9)
    write_gguf(directory / "m-q4.gguf", spec, random_tensors(spec))
    hub.models["org/m"] = directory
    with pytest.raises(CheckpointError, match=r"name one of them, as org/m/m-q4.gguf; it has m-q4.gguf,"):
        local_checkpoint(Path("org/m"))
    path = local_checkpoint(Path("org/m/m-q8-00002-of-00003.gguf"))
    open_checkpoint(path)
    assert sorted(hub.downloads) == [f"m-q8-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


def test_pickles_alone_and_no_weights(hub: FakeHub, tmp_path: Path) -> None:
    hub.models["org/p"] = write_tiny(tmp_path / "p")
    (tmp_path / "p" / "model.safetensors").rename(tmp_path / "p" / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="has pickled weights alone"):
        local_checkpoint(Path("org/p"))
    (tmp_path / "p" / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="has no weights on Hugging Face"):
        local_checkpoint(Path("org/p"))
    assert not hub.downloads


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BuildError, match=r"org/model does not exist; to download .* first run: pip install .*\[hub\]"):
        local_checkpoint(Path("org/model"))


def test_paths_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    sources: list[Any] = [tmp_path / "nowhere", Path("org/model"), Path("a/b/c"), Path("model.gguf"), Path("../a")]
    for source in sources:
        assert local_checkpoint(source) == source
    with pytest.raises(BuildError, match="revision is for a model on Hugging Face"):
        local_checkpoint(Path("org/model"), "main")


@pytest.mark.slow
def test_the_command_builds_a_name(hub: FakeHub, tmp_path: Path) -> None:
    hub.models["org/small"] = make_tokenizer(make_checkpoint(tmp_path / "small"))
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    words = ["build", "org/small", "--revision", COMMIT, "--name", "m", "--repository", str(tmp_path / "r")]
    code = "import sys; from deepseek_triton.builders.cli import main; sys.exit(main(sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-c", code, *words, "--max-seq-len", "32"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "%|" not in result.stderr, "a bar is for a terminal"
    manifest = Manifest.load(tmp_path / "r" / "m-engine" / "1")
    assert manifest.checkpoint == "org/small"
    assert "build org/small --name m --target onnx" in manifest.command and f"--revision {COMMIT}" in manifest.command
