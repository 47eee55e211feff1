"""Memory in which the kernels of one model's ranks leave numbers for each other: a box on each GPU, open to all.

The memory and its addresses alone; what is left in it, and when, is the kernels' business.
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass, replace

import torch

from deepseek_triton.ensemble.engine.runners.cuda.driver import KernelError, call

LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
MAX_PEER_ROWS = 64  # that are summed over ranks by words in peer_buffers; of more, collectives move half the bytes


class _Handle(ctypes.Structure):
    """CUipcMemHandle: names memory of one process for another."""

    _fields_ = [("reserved", ctypes.c_ubyte * 64)]


@dataclass(frozen=True)
class PeerBuffers:
    """All ranks' peer_buffers, as kernels of rank `rank` of `size` find them.

    addresses: [size] int64, on the device. given_up: [1] int32, page-locked on the host: not 0 once nobody should wait
    for the others any more.
    """

    rank: int
    size: int
    addresses: torch.Tensor
    given_up: torch.Tensor

    @classmethod
    def alone(cls, device: torch.device) -> PeerBuffers:
        """Of a model on one GPU, whose kernels leave nothing to anybody: none looks at them."""
        return cls(0, 1, *(torch.zeros(1, dtype=dtype, device=device) for dtype in (torch.int64, torch.int32)))


@dataclass(frozen=True)
class RowPeerBuffers:
    """Where all ranks' parts of up to `MAX_PEER_ROWS` rows meet: peer_buffers, and [MAX_PEER_ROWS] int32, the sums of each so
    far."""

    peer_buffers: PeerBuffers
    counts: torch.Tensor

    @classmethod
    def of(cls, peer_buffers: PeerBuffers, offset: int) -> RowPeerBuffers:
        """Behind the first `offset` bytes of `peer_buffers`, which hold zeros yet."""
        counts = torch.zeros(MAX_PEER_ROWS, dtype=torch.int32, device=peer_buffers.addresses.device)
        return cls(replace(peer_buffers, addresses=peer_buffers.addresses + offset), counts)

    @staticmethod
    def num_bytes(size: int, width: int) -> int:
        """Of each rank's box, for rows of `width` elements: two words for each rank's, up to a power of two."""
        return 2 * size * MAX_PEER_ROWS * (1 << (width - 1).bit_length()) * 8


class SharedBuffers:
    """This rank's box, and the others' once they are opened, each in a process and on a GPU of its own.

    Every rank makes one, gives the others its `handle` and opens theirs, whatever fails: what did is raised by `open`.

    Args:
        num_bytes: of each box; zeros at first.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._device, self._own, self._opened = device, ctypes.c_uint64(), list[ctypes.c_uint64]()
        self._failure: KernelError | None = None
        handle = _Handle()
        torch.cuda.synchronize(device)  # torch's context is this thread's from here on
        try:
            call("cuMemAlloc_v2", ctypes.byref(self._own), ctypes.c_size_t(num_bytes))
            call("cuMemsetD8_v2", self._own, ctypes.c_ubyte(0), ctypes.c_size_t(num_bytes))
            call("cuIpcGetMemHandle", ctypes.byref(handle), self._own)
        except KernelError as error:
            self._failure = error
        torch.cuda.synchronize(device)  # the zeros are there before anybody else is
        self.handle = torch.tensor(list(handle.reserved), dtype=torch.uint8, device=device)  # [64]

    def open(self, rank: int, handles: torch.Tensor) -> torch.Tensor:
        """Every rank's handle [size, 64] uint8 → where its box lies for this one's kernels: [size] int64.

        Raises:
            KernelError: there was no memory, or one GPU can't reach another's.
        """
        if self._failure is not None:
            raise self._failure
        rows = enumerate(handles.tolist())
        addresses = [self._own.value if other == rank else self._open(bytes(row)) for other, row in rows]
        return torch.tensor(addresses, dtype=torch.int64, device=self._device)

    def close(self) -> None:
        """Let go of the others' peer_buffers; no kernel may use them any more. A second call does nothing."""
        with torch.cuda.device(self._device):
            for address in self._opened:
                with contextlib.suppress(KernelError):
                    call("cuIpcCloseMemHandle", address)
        self._opened.clear()

    def free(self) -> None:
        """Give this rank's box back, once the others have let go of it; the end of the process does too."""
        with torch.cuda.device(self._device):
            if self._own.value:
                with contextlib.suppress(KernelError):
                    call("cuMemFree_v2", self._own)
        self._own.value = 0

    def _open(self, name: bytes) -> int:
        address = ctypes.c_uint64()
        handle = _Handle.from_buffer_copy(name)
        call("cuIpcOpenMemHandle_v2", ctypes.byref(address), handle, ctypes.c_uint(LAZY_PEER_ACCESS))
        self._opened.append(address)
        return address.value
