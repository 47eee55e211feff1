"""Target vllm: Triton's vLLM backend runs the checkpoint as it is, over the GPUs of one machine or of several.

The engine of this project then asks that model for its tokens (`ensemble/engine/remote/`), so that a client sees the
same tensors as with every other target. The weights stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek_triton.builders.targets.artefacts.target import Artefacts, BuildJob, CacheBudget, Target
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.artefacts.vllm_settings import FIXED_SETTINGS, VLLM_SETTINGS
from deepseek_triton.ensemble.decoder.architectures import PARTS
from deepseek_triton.ensemble.decoder.part import Split
from deepseek_triton.ensemble.protocol.pipelines import VLLM_SUFFIX
from deepseek_triton.ensemble.protocol.settings import EngineSettings, to_text

if TYPE_CHECKING:
    from deepseek_triton.builders.repository.options import BuildOptions
    from deepseek_triton.ensemble.decoder.spec import ModelSpec

CACHE_BYTES = 16 * 2**30  # of each GPU, for the default max_seq_len: vLLM caches blocks of what is used


class VllmTarget(Target):
    """Writes vLLM's arguments and a tokenizer without additions of its own."""

    name = "vllm"
    precisions = ("stored",)
    parts = PARTS
    quantized_parts = PARTS
    indexed_tasks = ("generate",)
    own_settings = VLLM_SETTINGS
    beside = (VLLM_SUFFIX,)

    def cache_budget(self) -> CacheBudget:
        """See Target."""
        return CacheBudget(CACHE_BYTES, 1, "the default share of each GPU")

    def whole_sequences(self, settings: Mapping[str, Any]) -> int:
        """See Target: one must fit; how many more run depends on their lengths."""
        return 1

    def sequence_bytes(self, spec: ModelSpec, precision: str, max_seq_len: int, split: Split) -> int:
        """See Target. A latent cache isn't split over GPUs: each has all of it."""
        return spec.cache_elements() * max_seq_len * 2

    def weight_bytes(self, spec: ModelSpec, precision: str) -> int:
        """See Target. 0: only the checkpoint's files say it, which `write` looks at."""
        return 0

    def disk_bytes(self, options: BuildOptions, spec: ModelSpec) -> int:
        """See Target: the weights aren't copied."""
        return 0

    def require_packages(self) -> None:
        """See Target: none is needed."""

    def write(self, job: BuildJob, settings: EngineSettings) -> Artefacts:
        """See Target.

        Raises:
            BuildError: vLLM couldn't serve the checkpoint so, or it doesn't fit on so many GPUs.
        """
        from deepseek_triton.builders.targets.artefacts.vllm_model import engine_arguments, require_room

        for line in require_room(job, settings):
            job.say(line)
        arguments = engine_arguments(job, settings)
        fixed = {name: getattr(settings, name) for name in FIXED_SETTINGS}
        return Artefacts(files=(), engine={"arguments": arguments, "settings": fixed})

    def write_beside(self, job: BuildJob, settings: EngineSettings, directories: Mapping[str, Path]) -> None:
        """See Target: what the vLLM backend reads."""
        from deepseek_triton.builders.targets.artefacts.vllm_model import engine_arguments, write_model

        write_model(job.directory, engine_arguments(job, settings), directories[VLLM_SUFFIX])

    def check(self, manifest: Manifest, settings: EngineSettings) -> Iterator[str]:
        """See Target: what vLLM's arguments say can't be changed afterwards."""
        fixed = manifest.engine.get("settings", {})
        for name in FIXED_SETTINGS:
            value = getattr(settings, name)
            if name in fixed and value != fixed[name]:
                built = to_text(fixed[name])
                yield f"{name} is {to_text(value)}, but vLLM's arguments were written for {built}: build again"
        yield from super().check(manifest, settings)


TARGET = VllmTarget()
