"""What Triton's vLLM backend reads: model.json, which are vLLM's engine arguments, and a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_triton.builders.checkpoint.files.hub_cache import names_model
from deepseek_triton.builders.checkpoint.files.weight_files import shard_files
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.targets.artefacts.memory import gpu_memory
from deepseek_triton.builders.targets.artefacts.target import BuildJob
from deepseek_triton.builders.targets.plan.gpus import GPUS_PER_MACHINE
from deepseek_triton.ensemble.artefacts.tokenizer_files import read_tokenizer_files
from deepseek_triton.ensemble.artefacts.vllm_settings import ARGUMENTS_FILE, TOKENIZER_FOLDER
from deepseek_triton.ensemble.protocol.pipelines import VLLM_SUFFIX, model_name
from deepseek_triton.ensemble.protocol.settings import EngineSettings

GIB = 2**30
COUNTS = (1, 2, 4, 8, 16, 32, 64)


def engine_arguments(job: BuildJob, settings: EngineSettings) -> dict[str, Any]:
    """vLLM's engine arguments. Paths are absolute: the server must see checkpoint and repository where they are now."""
    options = job.options
    is_named = names_model(options.checkpoint)
    model = model_name(options.name, VLLM_SUFFIX)
    num_gpus = settings.tensor_parallel_size * settings.pipeline_parallel_size
    arguments: dict[str, Any] = {
        "model": str(options.checkpoint if is_named else job.checkpoint.path.absolute()),
        "tokenizer": str(options.repository.absolute() / model / job.directory.name / TOKENIZER_FOLDER),
        "max_model_len": job.max_seq_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "enable_expert_parallel": settings.expert_parallel,
        "gpu_memory_utilization": settings.gpu_memory_share,
        "enable_prefix_caching": settings.prefix_reuse != "off",
        # One machine needs no Ray; several have a cluster, which the first one's Triton joins.
        "distributed_executor_backend": "mp" if num_gpus <= GPUS_PER_MACHINE else "ray",
        "generation_config": "vllm",  # the request's options alone count
    }
    return arguments | ({"revision": options.revision} if is_named and options.revision else {})


def write_model(tokenizer: Path, arguments: dict[str, Any], directory: Path) -> None:
    """Write the backend's files into its version `directory`; the tokenizer's own files lie in `tokenizer`.

    A prompt comes as a text with its BOS, so vLLM's tokenizer must add nothing: its post-processor is left out.
    """
    (directory / ARGUMENTS_FILE).write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")
    files = read_tokenizer_files(tokenizer)
    own = directory / TOKENIZER_FOLDER
    own.mkdir()
    values = json.loads(files.backend.to_str()) | {"post_processor": None}
    (own / "tokenizer.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": arguments["max_model_len"],
        **{name: files.special_tokens[name] for name in ("bos_token", "eos_token") if name in files.special_tokens},
    }
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (own / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def require_room(job: BuildJob, settings: EngineSettings) -> Iterator[str]:
    """Check that vLLM can serve the checkpoint on so many GPUs; gives lines for the user on what it needs.

    Raises:
        BuildError: it can't; names the settings with which it could.
    """
    spec, options = job.spec, job.options
    if not job.checkpoint.path.is_dir():
        raise BuildError(f"{job.checkpoint.path}: target vllm serves Hugging Face directories; give the model's own")
    if options.adapter is not None:
        raise BuildError("target vllm leaves the weights as they are: merge the adapter first, or use another target")
    tensor, pipeline = settings.tensor_parallel_size, settings.pipeline_parallel_size
    if settings.gpu_memory_share > 1:
        raise BuildError(f"gpu_memory_share is {settings.gpu_memory_share:g}, must be at most 1")
    if spec.num_heads % tensor:
        raise BuildError(f"tensor_parallel_size is {tensor}, must divide the model's {spec.num_heads} heads")
    if pipeline > spec.num_layers:
        raise BuildError(f"pipeline_parallel_size is {pipeline}, the model has {spec.num_layers} layers")
    if settings.expert_parallel and spec.experts is None:
        raise BuildError("expert_parallel is for a model with experts; leave it out")
    memory = gpu_memory(options.memory)
    weights = sum(path.stat().st_size for path in shard_files(job.checkpoint.path))
    sequence = spec.cache_elements() * 2 * job.max_seq_len

    def free(num_gpus: int, pipeline: int) -> float:
        """Bytes of each GPU beside its weights and the cache of one whole sequence."""
        return memory.num_bytes * settings.gpu_memory_share - weights / num_gpus - sequence / pipeline

    num_gpus = tensor * pipeline
    if free(num_gpus, pipeline) < 0:
        fitting = (n for n in COUNTS if n > num_gpus and spec.num_heads % min(n, GPUS_PER_MACHINE) == 0)
        enough = next((n for n in fitting if free(n, max(1, n // GPUS_PER_MACHINE)) > 0), None)
        advice = "more GPUs don't help: use a shorter --max-seq-len, or larger GPUs" if enough is None else (
            f"{enough} would do: --tensor-parallel-size {min(enough, GPUS_PER_MACHINE)} "
            f"--pipeline-parallel-size {max(1, enough // GPUS_PER_MACHINE)}"
        )  # fmt: skip
        raise BuildError(
            f"{weights / GIB:.1f} GiB of weights, and a sequence of {job.max_seq_len:,} tokens that takes "
            f"{sequence / GIB:.1f} GiB, don't fit on {num_gpus} × {memory.num_bytes / GIB:.0f} GiB; {advice}, or "
            "--memory for what will serve"
        )
    machines = -(-num_gpus // GPUS_PER_MACHINE)
    yield (
        f"needs {num_gpus} GPU{'s' * (num_gpus > 1)} on {machines} machine{'s' * (machines > 1)}: "
        f"{weights / num_gpus / GIB:.1f} GiB of weights on each, and {sequence / pipeline / GIB:.1f} GiB of cache for "
        f"a sequence of {job.max_seq_len:,} tokens"
    )
    yield "the server needs Triton's vLLM backend, and the checkpoint and the repository at the paths they have now"
    if machines > 1:
        yield "several machines need one Ray cluster, which tritonserver's machine belongs to; see docs/vllm.md"
