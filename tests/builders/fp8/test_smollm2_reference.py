"""The pack for a machine without a package registry arrives whole, or its damage is reported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import smollm2_reference as reference
from benchmarks import weights


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with pieces of 5,000 bytes, and none of the files that are in them."""
    checkpoint, output = tmp_path / "some.gguf", tmp_path / "packed"
    checkpoint.write_bytes(bytes(range(256)) * 50)
    output.mkdir()
    for name in (reference.REFERENCE, reference.RANGES):
        (output / name).write_text(name)
    monkeypatch.setattr(weights, "smollm2", lambda: checkpoint)
    assert reference.pack(output, 5000) == 0
    shutil.copytree(output, tmp_path / "there", ignore=shutil.ignore_patterns(reference.REFERENCE, reference.RANGES))
    return tmp_path / "there"


def test_pieces_are_put_together(packed: Path) -> None:
    pieces = [path for path in packed.glob(f"{reference.PIECE}*") if path.suffix != ".sha256"]
    assert len(pieces) > 3 and all(path.stat().st_size <= 5000 for path in pieces)
    assert reference.main(["--join", "--output", str(packed)]) == 0
    assert (packed / reference.CHECKPOINT).read_bytes() == bytes(range(256)) * 50
    for name in (reference.REFERENCE, reference.RANGES):
        assert (packed / name).read_text() == name


def test_a_missing_or_damaged_piece_is_named(packed: Path) -> None:
    piece = packed / f"{reference.PIECE}01"
    content = piece.read_bytes()
    piece.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert f"{piece} is damaged" in str(reference.main(["--join", "--output", str(packed)]))
    piece.unlink()
    assert f"{piece} is missing" in str(reference.main(["--join", "--output", str(packed)]))
    assert not (packed / reference.CHECKPOINT).exists()
