"""What one process of a model seals, the others open, and nobody else can make."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from deepseek_triton.ensemble.processes.seal import KEY_BYTES, Seal, SealError, model_seal
from deepseek_triton.ensemble.processes.watchdog import meeting_point


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def test_the_processes_of_a_model_share_a_key_and_others_don_t() -> None:
    sealed = model_seal("m", 1).close(b"text", b"ids")
    assert model_seal("m", 1).open(sealed, b"ids") == b"text"
    for other in (model_seal("m", 2), model_seal("n", 1), model_seal("m", 1, server_pid=1)):
        with pytest.raises(SealError):
            other.open(sealed, b"ids")


def test_whatever_is_changed_breaks_the_seal() -> None:
    seal = Seal(bytes(KEY_BYTES))
    sealed = seal.close(b"text", b"ids")
    assert seal.open(sealed, b"ids") == b"text"
    for index in range(len(sealed)):
        changed = bytearray(sealed)
        changed[index] ^= 1
        with pytest.raises(SealError):
            seal.open(bytes(changed), b"ids")
    for text, beside in ((sealed, b"idz"), (sealed, b""), (sealed[:-1], b"ids"), (b"", b""), (b"text", b"ids")):
        with pytest.raises(SealError):
            seal.open(text, beside)
    with pytest.raises(SealError):  # what is beside can't move into the text
        seal.open(seal.close(b"btext", b"a"), b"ab")


def test_the_key_is_its_owner_s_alone() -> None:
    model_seal("m", 1)
    path = meeting_point("m", 1, "key")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(path.read_bytes()) == KEY_BYTES
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    path.write_bytes(b"short")
    with pytest.raises(OSError, match="holds 5 bytes, must hold 32"):
        model_seal("m", 1)
