"""Target tensorrt: the TensorRT runner, a decoder's plan on one GPU with a KV cache that is updated in place.

Each layer's keys and values have a device buffer [max_num_seqs, kv_heads, max_seq_len, head_dim], which is bound both
as past input and as present output. Prefill has an execution context of its own profile and is bound to one slot's part
of each buffer; decode replays CUDA graphs. Everything runs on one stream, which doesn't wait for the default stream.

No GPU has run this module yet: TensorRT for RTX builds its plans without a GPU, and no supported one was available. The
tests run it against a fake of both APIs whose engine is ONNX Runtime, and compare the fake's names with the real
packages'.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.artefacts.tensorrt_api import (
    BEST_ID,
    BEST_LOG_PROB,
    DECODE_PROFILE,
    PLAN_FILE,
    PREFILL_PROFILE,
    Messages,
    PlanInfo,
    TensorRTError,
    load_tensorrt,
    make_logger,
)
from deepseek_triton.ensemble.engine.cuda_runtime import Cuda, CudaError, load_cuda
from deepseek_triton.ensemble.engine.runners.base import Decoded, DeviceSampling, Ids, Logits, RunnerError
from deepseek_triton.ensemble.engine.runners.warm_up import warm_up
from deepseek_triton.ensemble.protocol.settings import EngineSettings

log = logging.getLogger(__name__)
MIB = 2**20


class TensorRTRunner:
    """Runs the plan of `builders/tensorrt/build.py`.

    Args:
        path: model.plan.
        plan: what the manifest says of it.
        max_num_seqs: how many sequences have a cache at once; at most the plan's.
        max_num_batched_tokens: the most tokens that `prefill` will be given at once; at most the plan's.

    Raises:
        RunnerError: the plan isn't for this TensorRT or GPU (found before it is loaded), or doesn't fit into
        memory.
    """

    def __init__(self, path: Path, plan: PlanInfo, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self._graphs: dict[int, Any] = {}
        self._contexts: dict[int, Any] = {}
        self._device: dict[str, int] = {}
        self._host: dict[str, NDArray[Any]] = {}
        self._stream: Any = None
        self._prefill_context: Any = None
        self._num_rows = 0
        self._logits_rows: Sequence[int] = ()
        self._messages = Messages()
        for name, wanted, limit in (
            ("max_num_seqs", max_num_seqs, plan.max_num_seqs),
            ("max_num_batched_tokens", max_num_batched_tokens, plan.max_num_batched_tokens),
        ):
            if wanted > limit:
                raise RunnerError(f"{name} is {wanted}, the plan was built for {limit}; lower it or build again")
        try:
            self._api, self._cuda = load_tensorrt(plan.target), load_cuda()
            _check_fits(plan, self._api, self._cuda)
            self._runtime = self._api.Runtime(make_logger(self._api, self._messages))
            self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            if self._engine is None:
                raise RunnerError(f"{path} can't be loaded by {plan.target} {plan.version}: {self._messages.reason()}")
            self.max_num_seqs, self.max_seq_len = max_num_seqs, plan.max_seq_len
            self.vocab_size = int(self._engine.get_tensor_shape("logits")[1])
            self._allocate(max(max_num_seqs, max_num_batched_tokens))
            self._prefill_context = self._context(PREFILL_PROFILE)
        except (TensorRTError, CudaError, OSError) as error:
            self.close()
            raise RunnerError(str(error)) from error
        except RunnerError:
            self.close()
            raise
        log.info(
            "KV cache: %d slots x %d tokens = %d MiB; plan: %d MiB; attention: %s",
            max_num_seqs, self.max_seq_len, self.cache_bytes // MIB, path.stat().st_size // MIB, plan.attention,
        )  # fmt: skip

    def prefill(self, slot: int, ids: Ids, start: int) -> Logits:
        """See Runner."""
        n = len(ids)
        self._host["input_ids"][:n] = ids
        self._host["start"][0], self._host["num_tokens"][0] = start, n
        self._bind(self._prefill_context, slot, batch=1, seq_len=n)
        self._upload(batch=1, seq_len=n)
        self._enqueue(self._prefill_context)
        logits: Logits = self._download("logits", 1)[0]
        return logits

    def decode(self, ids: Ids, positions: Ids) -> Logits:
        """See Runner."""
        self._decode(ids, positions)
        return self._download("logits", len(ids))

    def can_sample(self, sampling: DeviceSampling) -> bool:
        """Only greedy sampling: the plan chooses the likeliest token."""
        return sampling.temperature == 0

    def start_decode(
        self, ids: Ids, positions: Ids, samplings: Sequence[DeviceSampling | None], logits_rows: Sequence[int]
    ) -> None:
        """See SamplingRunner. It copies eight bytes a slot to the host, and all logits if any are asked for."""
        self._num_rows, self._logits_rows = len(ids), logits_rows
        self._decode(ids, positions)
        for name in (BEST_ID, BEST_LOG_PROB, *(("logits",) if logits_rows else ())):
            self._download(name, len(ids), wait=False)

    def finish_decode(self) -> Decoded:
        """See SamplingRunner."""
        self._cuda.synchronize(self._stream)
        host, n = self._host, self._num_rows
        return Decoded(
            host[BEST_ID][:n, 0].astype(np.int64), host[BEST_LOG_PROB][:n, 0], host["logits"][list(self._logits_rows)]
        )

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """See Runner."""
        for name, size in self._slot_bytes.items():
            _, num_heads, max_seq_len, _ = self._engine.get_tensor_shape(name)
            pitch, address = size // num_heads, self._device[name]  # a head's whole row
            self._cuda.copy_rows(
                address + target * size, address + source * size,
                pitch=pitch, width=pitch // max_seq_len * num_tokens, rows=num_heads, stream=self._stream,
            )  # fmt: skip

    def close(self) -> None:
        """Free the plan and the caches; a second call does nothing."""
        for graph in self._graphs.values():
            self._cuda.destroy_graph(graph)
        self._graphs.clear()
        # Free TensorRT's objects before the memory that they point to, and contexts before their engine.
        self._contexts.clear()
        self._prefill_context = self._engine = self._runtime = None
        for address in self._device.values():
            self._cuda.free(address)
        self._device.clear()
        for array in self._host.values():
            self._cuda.free_pinned(array)
        self._host.clear()
        if self._stream is not None:
            self._cuda.destroy_stream(self._stream)
            self._stream = None

    def _allocate(self, num_ids: int) -> None:
        """Allocate device memory and page-locked host memory for all that the engine reads and writes."""
        cuda, engine, slots = self._cuda, self._engine, self.max_num_seqs
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._caches = {name: f"present_{name.removeprefix('past_')}" for name in names if name.startswith("past_")}
        self._slot_bytes = {
            name: int(np.prod(engine.get_tensor_shape(name)[1:])) * engine.get_tensor_dtype(name).itemsize
            for name in self._caches
        }
        self.cache_bytes = slots * sum(self._slot_bytes.values())
        scratch = int(engine.device_memory_size_v2)
        needed = self.cache_bytes + scratch
        if (free := cuda.free_bytes()) < needed:
            raise RunnerError(
                f"{slots} slots of {self.max_seq_len} tokens need {-(-needed // MIB)} MiB, "
                f"the GPU has {free // MIB} MiB free; lower max_num_seqs"
            )
        for past, present in self._caches.items():
            if engine.get_aliased_input_tensor(present) != past:
                raise RunnerError(f"the plan doesn't update {past} in place; build it again")
        self._stream = cuda.create_stream()
        self._device["scratch"] = cuda.allocate(max(scratch, 1))
        for name, size in self._slot_bytes.items():
            self._device[name] = cuda.allocate(slots * size)
        shapes: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
            "input_ids": ((num_ids,), np.int64),
            "start": ((slots,), np.int64),
            "num_tokens": ((slots,), np.int64),
            "logits": ((slots, self.vocab_size), np.float32),
            BEST_ID: ((slots, 1), np.int32),
            BEST_LOG_PROB: ((slots, 1), np.float32),
        }
        for name, (shape, dtype) in shapes.items():
            self._host[name] = cuda.pinned(shape, dtype)
            self._device[name] = cuda.allocate(self._host[name].nbytes)

    def _context(self, profile: int) -> Any:
        """A context of `profile`. All contexts share one scratch memory, since no two run at once."""
        strategy = self._api.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise RunnerError(f"TensorRT can't create an execution context: {self._messages.reason()}")
        context.set_device_memory(self._device["scratch"], int(self._engine.device_memory_size_v2))
        self._check(context.set_optimization_profile_async(profile, int(self._stream)))
        self._cuda.synchronize(self._stream)
        return context

    def _decode(self, ids: Ids, positions: Ids) -> None:
        """Run one token for slots 0 … n - 1, with the graph of the next captured size."""
        n = len(ids)
        size = captured_size(n, self.max_num_seqs)
        self._host["input_ids"][:n], self._host["start"][:n] = ids, positions
        # Rows beyond n write to the last position, which a sequence writes before it first reads it.
        self._host["input_ids"][n:size], self._host["start"][n:size] = 0, self.max_seq_len - 1
        self._host["num_tokens"][:size] = 1
        self._upload(batch=size, seq_len=1)
        if size in self._graphs:
            self._cuda.launch(self._graphs[size], self._stream)
            return
        # A graph depends on its context's state, so each size has a context of its own that isn't changed again. This
        # run computes the step, and TensorRT needs a run before the capture to initialise itself.
        context = self._contexts[size] = self._context(DECODE_PROFILE)
        self._bind(context, 0, batch=size, seq_len=1)
        self._enqueue(context)
        self._cuda.synchronize(self._stream)
        self._graphs[size] = self._cuda.capture(self._stream, lambda: self._enqueue(context))

    def _bind(self, context: Any, slot: int, *, batch: int, seq_len: int) -> None:
        """Set every shape and address of `context`; its row 0 is `slot`."""
        self._check(context.set_input_shape("input_ids", (batch, seq_len)))
        for name in ("start", "num_tokens"):
            self._check(context.set_input_shape(name, (batch,)))
        for past, present in self._caches.items():
            shape = tuple(self._engine.get_tensor_shape(past))[1:]
            self._check(context.set_input_shape(past, (batch, *shape)))
            address = self._device[past] + slot * self._slot_bytes[past]
            self._check(context.set_tensor_address(past, address))
            self._check(context.set_tensor_address(present, address))
        for name in self._host:
            self._check(context.set_tensor_address(name, self._device[name]))

    def _upload(self, *, batch: int, seq_len: int) -> None:
        for name, count in (("input_ids", batch * seq_len), ("start", batch), ("num_tokens", batch)):
            self._cuda.to_device(self._device[name], self._host[name][:count], self._stream)

    def _download(self, name: str, rows: int, *, wait: bool = True) -> NDArray[Any]:
        host = self._host[name][:rows]
        self._cuda.to_host(host, self._device[name], self._stream)
        if wait:
            self._cuda.synchronize(self._stream)
        return host

    def _enqueue(self, context: Any) -> None:
        self._check(context.execute_async_v3(int(self._stream)))

    def _check(self, is_done: bool) -> None:
        if not is_done:
            raise RunnerError(f"TensorRT refused a call: {self._messages.reason()}")


def load(directory: Path, manifest: Manifest, settings: EngineSettings) -> TensorRTRunner:
    """Load the runner of an engine that generates text.

    Raises:
        RunnerError: the manifest's description of the plan is damaged, or as `TensorRTRunner`.
    """
    try:
        plan = PlanInfo.from_dict({name: value for name, value in manifest.engine.items() if name != "census"})
    except TensorRTError as error:
        raise RunnerError(f"{directory}: {error}; {manifest.command}") from error
    runner = TensorRTRunner(
        directory / PLAN_FILE,
        plan,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
    )
    sizes = {captured_size(n, settings.max_num_seqs) for n in range(1, settings.max_num_seqs + 1)}
    warm_up(runner, settings.max_num_batched_tokens, sorted(sizes))
    return runner


def captured_size(n: int, max_num_seqs: int) -> int:
    """The batch size that runs `n` rows: the next power of two, at most all slots."""
    return min(1 << (n - 1).bit_length(), max_num_seqs)


def _check_fits(plan: PlanInfo, api: Any, cuda: Cuda) -> None:
    if api.__version__ != plan.version:
        raise RunnerError(
            f"the plan was built with {plan.target} {plan.version}, here is {api.__version__}; build again"
        )
    if (found := cuda.compute_capability()) != plan.compute_capability:
        raise RunnerError(
            f"the plan was built for compute capability {plan.compute_capability}, this GPU has {found}; build again"
        )
