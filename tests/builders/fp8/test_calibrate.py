"""Activation ranges: their values, saving and loading, and errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.calibrate import Calibration, CalibrationError, calibrate
from deepseek_triton.builders.fp8.texts import calibration_text
from deepseek_triton.builders.fp8.texts.calibration_text import calibration_windows, read_text
from deepseek_triton.builders.fp8.texts.generated_text import PROMPT_LEN, generate_windows
from deepseek_triton.ensemble.decoder.spec import layer_prefix
from tests.support.checkpoints import load_reference, make_checkpoint

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(tmp_path_factory.mktemp("calibrate") / "checkpoint", "qwen3")
    write_byte_tokenizer(path)
    return path


def write_byte_tokenizer(directory: Path) -> None:
    """A token for each byte: 256 of the model's 320."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.save(str(directory / "tokenizer.json"))


def windows() -> list[Array]:
    random = np.random.default_rng(0)
    return [random.integers(0, 319, length) for length in (60, 100, 33)]


@pytest.fixture(scope="module")
def calibration(checkpoint: Path) -> Calibration:
    return calibrate(open_checkpoint(checkpoint), windows(), ["random"])


@pytest.mark.slow
def test_ranges_are_those_of_the_reference_model(checkpoint: Path, calibration: Calibration) -> None:
    torch = pytest.importorskip("torch")
    model = load_reference(checkpoint)
    seen: dict[str, list[Array]] = {}
    for name, module in model.named_modules():
        if name.startswith("model.layers.") and name.endswith("_proj"):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0][0].detach().numpy())
            )
    with torch.no_grad():
        for window in windows():
            model(torch.tensor(window)[None])
    assert len(calibration.taps) == 4 * 3
    for layer in range(3):
        for tap in open_checkpoint(checkpoint).spec.taps(layer):
            statistics = calibration.taps[layer_prefix(layer) + tap.value]
            for module in tap.modules:
                values = np.concatenate(seen[layer_prefix(layer) + module])
                assert statistics.amax == pytest.approx(np.abs(values).max(), rel=1e-3)
                np.testing.assert_allclose(statistics.channel_amax, np.abs(values).max(axis=0), rtol=1e-2, atol=1e-4)
                np.testing.assert_allclose(statistics.mean_square, np.mean(values**2, axis=0), rtol=1e-2, atol=1e-5)
                np.testing.assert_allclose(statistics.mean, np.mean(values, axis=0), rtol=1e-2, atol=1e-3)


def test_ranges_are_kept_in_a_file_that_can_be_read(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    calibration.save(path)
    assert Calibration.load(path) == calibration
    assert json.loads(path.read_text())["taps"]["model.layers.0.mlp.product"]["amax"] > 0
    assert [list(window) for window in calibration.windows] == [w.tolist() for w in windows()]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 0}', '{"format": 1, "taps": 3}'])
def test_a_file_that_holds_no_ranges_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    path.write_text(text)
    with pytest.raises(CalibrationError, match="calibrate again"):
        Calibration.load(path)
    with pytest.raises(CalibrationError, match="No such file"):
        Calibration.load(tmp_path / "none.json")


def test_ranges_that_are_not_numbers_are_refused(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    calibration.save(path)
    text = path.read_text()
    path.write_text(text.replace(f'"amax":{calibration.taps["model.layers.1.mlp.product"].amax}', '"amax":NaN', 1))
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.product has NaN"):
        Calibration.load(path)


def test_progress_is_told_layer_by_layer(checkpoint: Path) -> None:
    told: list[tuple[str, int, int]] = []
    calibrate(open_checkpoint(checkpoint), windows(), report=lambda *news: told.append(news))
    assert told == [("calibrate", layer, 3) for layer in range(4)]


def test_a_checkpoint_with_nan_is_refused(checkpoint: Path) -> None:
    source = open_checkpoint(checkpoint)
    read = source.read

    def damaged(name: str) -> Array:
        array = read(name).copy()
        if name == "model.layers.1.input_layernorm.weight":
            array[0] = np.inf
        return array

    source.read = damaged  # type: ignore[method-assign]
    with pytest.raises(BuildError, match=r"model\.layers\.1\.input_layernorm"):
        calibrate(source, windows())


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "has 0 tokens, at least 128"),
        ([[]], "has 0 tokens"),
        ([list(range(100))], "has 100 tokens"),
        ([[1] * 200, [2, 320]], "token 320 is outside the vocabulary of 320"),
        ([[1] * 200, [-1]], "token -1 is outside"),
    ],
)
def test_text_that_cannot_calibrate_is_refused(ids: list[list[int]], message: str, checkpoint: Path) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibrate(open_checkpoint(checkpoint), ids)


# ---- where the text comes from


def test_a_users_file_is_cut_into_windows(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("The quick brown fox. " * 60)
    found, sources = calibration_windows(open_checkpoint(checkpoint), text)
    assert sources == ("notes.txt",) and [len(window) for window in found] == [512, 512, 236]


@pytest.mark.slow
def test_the_built_in_set_covers_its_five_kinds_and_the_models_own_text(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_text, "GENERATED_TOKENS", 8)
    found, sources = calibration_windows(open_checkpoint(checkpoint))
    kinds = ["chinese.txt", "code.txt", "english.txt", "mathematics.txt", "chat"]
    assert list(sources) == [*(f"built-in {kind}" for kind in kinds), "generated"]
    without, sources = calibration_windows(open_checkpoint(checkpoint), is_generating=False)
    assert "generated" not in sources and len(without) < len(found)
    monkeypatch.setattr("deepseek_triton.builders.fp8.texts.generated_text.fits_in_memory", lambda spec: False)
    assert calibration_windows(open_checkpoint(checkpoint))[1] == sources


@pytest.mark.slow
def test_generated_text_continues_its_prompts_and_is_the_same_every_time(checkpoint: Path) -> None:
    prompts = [np.arange(PROMPT_LEN + 5), np.arange(PROMPT_LEN)[::-1] + 40, np.arange(3)]
    once, again = (generate_windows(open_checkpoint(checkpoint), prompts, num_tokens=24) for _ in range(2))
    assert len(once) == 2, "the prompt that is too short is left out"
    for prompt, first, second in zip(prompts, once, again, strict=False):
        assert np.array_equal(first[:PROMPT_LEN], prompt[:PROMPT_LEN])
        assert np.array_equal(first, second)
        ends = np.flatnonzero(first == 319)  # the end token ends a text
        assert len(first) == PROMPT_LEN + 24 if not len(ends) else ends.tolist() == [len(first) - 1]
    assert generate_windows(open_checkpoint(checkpoint), [np.arange(3)], num_tokens=4) == []


@pytest.fixture
def bad_files(tmp_path: Path) -> Iterator[dict[str, Path]]:
    files = {name: tmp_path / name for name in ("empty", "blank", "latin", "none")}
    files["empty"].write_bytes(b"")
    files["blank"].write_bytes(b" \n\t\n")
    files["latin"].write_bytes(b"caf\xe9")
    yield files


@pytest.mark.parametrize(
    ("name", "message"),
    [("empty", "is empty"), ("blank", "is empty"), ("latin", r"not UTF-8 \(byte 3\)"), ("none", "No such file")],
)
def test_a_text_that_cannot_be_read_is_named(name: str, message: str, bad_files: dict[str, Path]) -> None:
    with pytest.raises(CalibrationError, match=f"{name}.*{message}"):
        read_text(bad_files[name])
