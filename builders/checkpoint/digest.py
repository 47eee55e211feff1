"""The digest of a checkpoint's tensors: each is hashed by itself, so that several cores can work at once."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.processes.machine import num_cores


class TensorDigest:
    """SHA-256 over name, dtype, shape and the SHA-256 of the bytes of each tensor, in the order of `add`."""

    def __init__(self) -> None:
        self._tensors: list[tuple[str, Future[bytes]]] = []
        self._free = threading.Semaphore(num_cores())

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Begin to hash a tensor, which may not change afterwards; waits while every core has one."""
        self._free.acquire()
        future = _pool().submit(_hash, array)
        future.add_done_callback(lambda _: self._free.release())
        self._tensors.append((f"{name} {array.dtype.name} {list(array.shape)}\n", future))

    def hexdigest(self) -> str:
        """Of all tensors so far."""
        digest = sha256()
        for head, future in self._tensors:
            digest.update(head.encode())
            digest.update(future.result())
        return digest.hexdigest()


def _hash(array: NDArray[Any]) -> bytes:
    return sha256(np.ascontiguousarray(array).view(np.uint8).data).digest()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_cores(), thread_name_prefix="digest")
