"""A persistent kernel on the CPU, thread for thread: its source, compiled with persistent_host.h's instructions."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from deepseek_triton.ensemble.engine.runners.cuda.persistent.family import Family

COMPILER = shutil.which("c++") or shutil.which("g++")
OPTIONS = ("-std=c++17", "-O1", "-w", "-fno-strict-aliasing", "-shared", "-fPIC")
HEADER = Path(__file__).with_name("persistent_host.h")
ENTRY = """
static void** arguments;

extern "C" int run(void** given, unsigned seed, int slow) {
    arguments = given;
    return run_grid(BLOCKS, ALL_THREADS, SHARED_BYTES, seed, slow, [] {
        void** a = arguments;
        persistent_decode((const i64*)a[0], (const i64*)a[1], (const i64*)a[2], (const u16*)a[3], (const u16*)a[4],
                          (const u8*)a[5], (const float*)a[6], (const float*)a[7], (const Layer*)a[8],
                          (const int*)a[9], (Work*)a[10], (u64* const*)a[11], (const u32*)a[12], (float*)a[13]);
    });
}
"""


class HostKernel:
    """`PersistentDecode` on the CPU.

    Args:
        family: with few blocks: each has nearly 400 threads.
        weights: as `DecoderWeights`, on the CPU.
        keys, values: [layers, ...], slots or blocks; table: of slot 0, or None.
        folder: for what is compiled.
    """

    def __init__(
        self,
        family: Family,
        weights: Any,
        keys: torch.Tensor,
        values: torch.Tensor,
        folder: Path,
        table: torch.Tensor | None = None,
    ) -> None:
        assert COMPILER is not None, "there is no C++ compiler"
        head = weights.head.weight
        page = 0 if table is None else keys.shape[-2]
        extent = keys.shape[-2] if table is None else len(table)
        macros = family.all_macros(vocab=len(head), extent=extent, page=page) | {"SHARED_BYTES": family.memory.total}
        source = folder / "kernel.cpp"
        source.write_text(family.source(HEADER.read_text("utf-8")) + ENTRY, encoding="utf-8")
        library = folder / "kernel.so"
        options = [f"-D{name}={value}" for name, value in macros.items()]
        subprocess.run([COMPILER, *OPTIONS, *options, str(source), "-o", str(library)], check=True, timeout=300)
        self._run = ctypes.CDLL(str(library)).run
        tensors = [
            tensor
            for index, layer in enumerate(weights.layers)
            for tensor in family.tensors(layer, keys[index], values[index])
        ]
        self._held = weights, keys, values, table, tensors
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        self._layers = torch.tensor(addresses, dtype=torch.int64)
        self._work = torch.zeros(-(-family.work_bytes // 16), 2, dtype=torch.int64)
        self._peers, self._given_up = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
        self._logits = torch.zeros(len(head))
        self._fixed = [
            weights.embedding, weights.norm, head, weights.cos, weights.sin, self._layers,
            self._layers if table is None else table, self._work, self._peers, self._given_up, self._logits,
        ]  # fmt: skip

    def __call__(self, token: int, position: int, *, seed: int = 0, slow: int = -1) -> torch.Tensor:
        """Logits [vocab_size] of one token; seed: of the blocks' order; slow: a block that seldom gets a turn."""
        ids, last, where = (torch.tensor([value]) for value in (token, 0, position))
        tensors = [ids, last, where, *self._fixed]
        pointers = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
        reasons = "", "the threads wait for each other", "something is misaligned"
        assert not (code := self._run(pointers, seed, slow)), reasons[code]
        return self._logits.clone()
