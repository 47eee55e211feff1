"""Boxes that several ranks' kernels share, on a driver that only keeps account: who opens and frees what, and when."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from deepseek_triton.ensemble.engine.runners.cuda import peer_buffers as peer_buffers_module
from deepseek_triton.ensemble.engine.runners.cuda.driver import KernelError
from deepseek_triton.ensemble.engine.runners.cuda.peer_buffers import (
    MAX_PEER_ROWS,
    PeerBuffers,
    RowPeerBuffers,
    SharedBuffers,
)

CPU = torch.device("cpu")


class Driver:
    """What the peer_buffers ask of CUDA's driver. fails: the functions that do, by name."""

    def __init__(self) -> None:
        self.fails: set[str] = set()
        self.owned: dict[int, int] = {}  # address → bytes
        self.opened: list[int] = []

    def call(self, function: str, *arguments: Any) -> None:
        if function in self.fails:
            raise KernelError(f"CUDA's driver: {function}: not here")
        getattr(self, function)(*arguments)

    def cuMemAlloc_v2(self, target: Any, size: ctypes.c_size_t) -> None:  # noqa: N802
        target._obj.value = 4096 * (1 + len(self.owned))
        self.owned[target._obj.value] = size.value

    def cuMemsetD8_v2(self, address: ctypes.c_uint64, value: ctypes.c_ubyte, size: ctypes.c_size_t) -> None:  # noqa: N802
        assert (value.value, size.value) == (0, self.owned[address.value])

    def cuIpcGetMemHandle(self, target: Any, address: ctypes.c_uint64) -> None:  # noqa: N802
        target._obj.reserved[:8] = list(address.value.to_bytes(8, "little"))

    def cuIpcOpenMemHandle_v2(self, target: Any, handle: Any, flags: ctypes.c_uint) -> None:  # noqa: N802
        assert flags.value == 1
        address = int.from_bytes(bytes(handle.reserved[:8]), "little")
        assert address in self.owned
        target._obj.value = address + 2**40  # where the other process sees it
        self.opened.append(target._obj.value)

    def cuIpcCloseMemHandle(self, address: ctypes.c_uint64) -> None:  # noqa: N802
        self.opened.remove(address.value)

    def cuMemFree_v2(self, address: ctypes.c_uint64) -> None:  # noqa: N802
        assert address.value + 2**40 not in self.opened, "freed while another has it open"
        del self.owned[address.value]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver()
    monkeypatch.setattr(peer_buffers_module, "call", made.call)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    yield made
    assert not made.owned and not made.opened


def test_every_rank_finds_its_own_box_and_the_others(driver: Driver) -> None:
    shared = [SharedBuffers(1000, CPU) for _ in range(3)]
    handles = torch.stack([one.handle for one in shared])
    assert handles.shape == (3, 64) and handles.dtype == torch.uint8
    for rank, one in enumerate(shared):
        own = [4096 * (1 + other) for other in range(3)]
        wanted = [address if other == rank else address + 2**40 for other, address in enumerate(own)]
        assert one.open(rank, handles).tolist() == wanted
    assert list(driver.owned.values()) == [1000] * 3 and len(driver.opened) == 6
    for step in ("close", "free"):
        for one in shared:
            getattr(one, step)()
            getattr(one, step)()


@pytest.mark.parametrize("function", ["cuMemAlloc_v2", "cuIpcGetMemHandle", "cuIpcOpenMemHandle_v2"])
def test_a_failure_is_raised_when_the_other_buffers_are_opened_and_nothing_stays_allocated(
    function: str, driver: Driver
) -> None:
    driver.fails.add(function)
    one = SharedBuffers(1000, CPU)
    assert one.handle.shape == (64,), "the others wait for it"
    with pytest.raises(KernelError, match=f"^CUDA's driver: {function}: not here$"):
        one.open(0, torch.zeros(2, 64, dtype=torch.uint8))
    one.close()
    one.free()


def test_rows_meet_behind_what_the_single_kernel_has_of_a_box() -> None:
    alone = PeerBuffers(1, 2, torch.tensor([1000, 2000]), torch.zeros(1, dtype=torch.int32))
    rows = RowPeerBuffers.of(alone, 64)
    assert rows.peer_buffers.addresses.tolist() == [1064, 2064] and alone.addresses.tolist() == [1000, 2000]
    assert rows.counts.tolist() == [0] * MAX_PEER_ROWS
    assert RowPeerBuffers.num_bytes(2, 3584) == 2 * 2 * MAX_PEER_ROWS * 4096 * 8
    assert RowPeerBuffers.num_bytes(3, 64) == 2 * 3 * MAX_PEER_ROWS * 64 * 8
