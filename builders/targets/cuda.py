"""Target cuda: kernels in Triton's language and CUDA read the weights directly, on one GPU or several."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.targets.artefacts.target import Artefacts, BuildJob, CacheBudget, Target
from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape, LayoutError
from deepseek_triton.ensemble.artefacts.cuda_split import ShardedDecoder
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.protocol.settings import EngineSettings, target_defaults

if TYPE_CHECKING:
    from deepseek_triton.builders.repository.options import BuildOptions
    from deepseek_triton.ensemble.decoder.spec import ModelSpec

CACHE_BYTES = 32 * 2**30  # of each GPU, for the default caches; the runner says at load what really fits
NUM_SEQS = 16  # whole sequences that the default max_seq_len leaves room for


class CudaTarget(Target):
    """Writes model.safetensors: fused matrices in E4M3 or bfloat16."""

    name = "cuda"
    precisions = ("fp8", "bf16")

    def cache_budget(self) -> CacheBudget:
        """See Target."""
        return CacheBudget(CACHE_BYTES, NUM_SEQS, "the default share of each GPU")

    def default_settings(self, options: BuildOptions, spec: ModelSpec, max_seq_len: int) -> dict[str, Any]:
        """See Target. A GPU reads its weights once for all rows, so many sequences at once cost little."""
        defaults = target_defaults(self.name)
        fitting = CACHE_BYTES // self.cache_bytes(options, spec, max_seq_len)
        return {**defaults, "max_num_seqs": max(1, min(defaults["max_num_seqs"], fitting))}

    def cache_bytes(self, options: BuildOptions, spec: ModelSpec, max_seq_len: int) -> int:
        """See Target.

        Raises:
            BuildError: the model can't be split over so many GPUs.
        """
        from deepseek_triton.builders.targets.artefacts.cuda_weights import decoder_shape

        size = EngineSettings(**options.settings).tensor_parallel_size
        try:
            return ShardedDecoder(decoder_shape(spec, max_seq_len), 0, size).shape.cache_bytes(1)
        except LayoutError as error:
            raise BuildError(str(error)) from error

    def write(self, job: BuildJob, settings: EngineSettings) -> Artefacts:
        """See Target."""
        from deepseek_triton.builders.targets.artefacts.cuda_weights import decoder_shape, write_engine_weights

        path, recipe = write_engine_weights(job)
        return Artefacts((path,), recipe, engine=decoder_shape(job.spec, job.max_seq_len).to_dict())

    def check(self, manifest: Manifest, settings: EngineSettings) -> Iterator[str]:
        """See Target: the model must be divisible among the GPUs too."""
        try:
            ShardedDecoder(DecoderShape.from_dict(manifest.engine), 0, settings.tensor_parallel_size)
        except LayoutError as error:
            yield str(error)
        yield from super().check(manifest, settings)


TARGET = CudaTarget()
