"""CUDA IPC buffers for the tensor-parallel all-reduce: one per GPU, mapped by every rank.

This module owns the memory and its addresses; the kernels define what is stored in it.
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass, replace

import torch

from deepseek_triton.ensemble.engine.runners.cuda.driver import KernelError, call

LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
MAX_PEER_ROWS = 64  # summed through peer buffers at most; for more rows NCCL moves half the bytes


class _Handle(ctypes.Structure):
    """CUipcMemHandle: identifies one process's memory to another."""

    _fields_ = [("reserved", ctypes.c_ubyte * 64)]


@dataclass(frozen=True)
class PeerBuffers:
    """The peer buffers of all ranks, as rank `rank` of `size` maps them.

    addresses: [size] int64, on the device. given_up: [1] int32, page-locked on the host: once it isn't 0, kernels stop
    waiting for other ranks.
    """

    rank: int
    size: int
    addresses: torch.Tensor
    given_up: torch.Tensor

    @classmethod
    def alone(cls, device: torch.device) -> PeerBuffers:
        """Placeholders for a model on one GPU, whose kernels exchange nothing."""
        return cls(0, 1, *(torch.zeros(1, dtype=dtype, device=device) for dtype in (torch.int64, torch.int32)))


@dataclass(frozen=True)
class RowPeerBuffers:
    """Peer buffers for sums of up to `MAX_PEER_ROWS` rows; counts: [MAX_PEER_ROWS] int32, sums of each row so far."""

    peer_buffers: PeerBuffers
    counts: torch.Tensor

    @classmethod
    def of(cls, peer_buffers: PeerBuffers, offset: int) -> RowPeerBuffers:
        """The part of `peer_buffers` from byte `offset` on, which must hold zeros."""
        counts = torch.zeros(MAX_PEER_ROWS, dtype=torch.int32, device=peer_buffers.addresses.device)
        return cls(replace(peer_buffers, addresses=peer_buffers.addresses + offset), counts)

    @staticmethod
    def num_bytes(size: int, width: int) -> int:
        """Bytes of each rank's buffer: two words a row, rank and element, `width` rounded up to a power of two."""
        return 2 * size * MAX_PEER_ROWS * (1 << (width - 1).bit_length()) * 8


class SharedBuffers:
    """This rank's buffer, and the other ranks' once they are opened; each rank is a process with a GPU of its own.

    Every rank allocates a buffer, sends its `handle` to the others and opens theirs, even if its allocation failed:
    `open` raises that failure.

    Args:
        num_bytes: of each buffer; zeros at first.
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
        torch.cuda.synchronize(device)  # the buffer is zeroed before another rank can map it
        self.handle = torch.tensor(list(handle.reserved), dtype=torch.uint8, device=device)  # [64]

    def open(self, rank: int, handles: torch.Tensor) -> torch.Tensor:
        """Map every rank's handle [size, 64] uint8 to the address of its buffer in this process: [size] int64.

        Raises:
            KernelError: the allocation failed, or this GPU has no peer access to another.
        """
        if self._failure is not None:
            raise self._failure
        rows = enumerate(handles.tolist())
        addresses = [self._own.value if other == rank else self._open(bytes(row)) for other, row in rows]
        return torch.tensor(addresses, dtype=torch.int64, device=self._device)

    def close(self) -> None:
        """Unmap the other ranks' buffers; no kernel may use them any more. A second call does nothing."""
        with torch.cuda.device(self._device):
            for address in self._opened:
                with contextlib.suppress(KernelError):
                    call("cuIpcCloseMemHandle", address)
        self._opened.clear()

    def free(self) -> None:
        """Free this rank's buffer, once the others have unmapped it; the end of the process does so too."""
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
