"""Target cuda: kernels in Triton's language and CUDA read the weights directly, on one GPU or several."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.targets.artefacts.target import Artefacts, BuildJob, CacheBudget, Target, split_of
from deepseek_triton.ensemble.artefacts.cuda_settings import CUDA_SETTINGS, PREFIX_IDS
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.decoder.architectures import PARTS
from deepseek_triton.ensemble.decoder.part import Split
from deepseek_triton.ensemble.decoder.spec import part_shapes
from deepseek_triton.ensemble.protocol.settings import EngineSettings, KvCache

if TYPE_CHECKING:
    from deepseek_triton.builders.repository.options import BuildOptions
    from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
    from deepseek_triton.ensemble.decoder.spec import ModelSpec

CACHE_BYTES = 32 * 2**30  # of each GPU, for the default caches; the runner says at load what really fits
NUM_SEQS = 16  # whole sequences that the default max_seq_len leaves room for


class CudaTarget(Target):
    """Writes model.safetensors: fused matrices in E4M3 or bfloat16."""

    name = "cuda"
    precisions = ("fp8", "bf16")
    tasks = ("generate", "score")
    parts = PARTS
    quantized_parts = PARTS
    own_settings = CUDA_SETTINGS

    def cache_budget(self) -> CacheBudget:
        """See Target."""
        return CacheBudget(CACHE_BYTES, NUM_SEQS, "the default share of each GPU")

    def whole_sequences(self, settings: Mapping[str, Any]) -> int:
        """See Target: with pages, one sequence must fit; how many more run depends on their lengths."""
        return super().whole_sequences(settings) if _kv_cache(settings) == "slots" else 1

    def default_settings(self, options: BuildOptions, spec: ModelSpec, max_seq_len: int) -> dict[str, Any]:
        """See Target: as many sequences as have room for their caches.

        Raises:
            BuildError: the caches can't have the form asked for, or as `sequence_bytes`.
        """
        defaults = super().default_settings(options, spec, max_seq_len)
        kv_cache = _kv_cache(options.settings)
        if reason := self._shape(spec, max_seq_len).reason_against_cache(kv_cache):
            raise BuildError(reason)
        own = self.cache_bytes(options, spec, max_seq_len)  # of any form: the GPUs must be able to share the model
        if kv_cache != "slots":
            return defaults
        fitting = CACHE_BYTES // own
        return {**defaults, "max_num_seqs": max(1, min(defaults["max_num_seqs"], fitting))}

    def device_weight_bytes(self, spec: ModelSpec, precision: str, split: Split) -> int:
        """See Target: the embedding is on every GPU, of a head of its own each has a share."""
        table = spec.vocab_size * spec.hidden_size
        own = table + (0 if spec.tie_word_embeddings else table // split.size) + spec.hidden_size
        layers = Counter(spec.parts(layer) for layer in range(spec.num_layers))
        for parts, count in layers.items():
            shapes = part_shapes(part.sharded(split, 0) for part in parts)
            own += count * sum(math.prod(shape) for shape in shapes.values())
        return self.weight_bytes(spec, precision) * own // spec.num_parameters()

    def sequence_bytes(self, spec: ModelSpec, precision: str, max_seq_len: int, split: Split) -> int:
        """See Target.

        Raises:
            BuildError: the model can't be split over so many GPUs.
        """
        from deepseek_triton.ensemble.artefacts.cuda_layout import LayoutError
        from deepseek_triton.ensemble.artefacts.cuda_split import ShardedDecoder

        try:
            shape = ShardedDecoder(self._shape(spec, max_seq_len), 0, split.tensor_size, split.expert_size).shape
            return shape.cache_bytes(1)
        except LayoutError as error:
            raise BuildError(str(error)) from error

    def step_bytes(self, spec: ModelSpec, max_seq_len: int, settings: Mapping[str, Any]) -> int:
        """See Target: what the runner asks for at load too."""
        from deepseek_triton.ensemble.artefacts.cuda_memory import step_bytes
        from deepseek_triton.ensemble.artefacts.cuda_split import ShardedDecoder

        num_seqs, split = settings["max_num_seqs"], split_of(settings)
        shape = ShardedDecoder(self._shape(spec, max_seq_len), 0, split.tensor_size, split.expert_size).shape
        # No step has more tokens than all sequences together.
        num_tokens = min(settings["max_num_batched_tokens"], num_seqs * max_seq_len)
        return step_bytes(shape, num_seqs, num_tokens, split.size)

    def write(self, job: BuildJob, settings: EngineSettings) -> Artefacts:
        """See Target."""
        from deepseek_triton.builders.targets.artefacts.cuda_weights import write_engine_weights

        return write_engine_weights(job, takes_blocks=self.takes_blocks(job.options, job.spec))

    def takes_blocks(self, options: BuildOptions, spec: ModelSpec) -> bool:
        """See Target: not the kernels of dense decoders, and not on several GPUs."""
        sizes = [options.settings.get(f"{kind}_parallel_size") or 1 for kind in ("tensor", "expert")]
        return sizes == [1, 1] and options.task == "generate" and not self._shape(spec, 2).is_plain

    def write_scoring(self, job: BuildJob, prefix_ids: Sequence[int]) -> Artefacts:
        """See Target: the same weights; the runner computes the whole blocks of `prefix_ids` once."""
        from deepseek_triton.builders.targets.artefacts.cuda_weights import write_engine_weights

        written = write_engine_weights(job)
        return replace(written, engine={**written.engine, PREFIX_IDS: list(prefix_ids)})

    def check(self, manifest: Manifest, settings: EngineSettings) -> Iterator[str]:
        """See Target: the model must be divisible among the GPUs too."""
        from deepseek_triton.ensemble.artefacts.cuda_layout import ONE_GPU, DecoderShape, LayoutError
        from deepseek_triton.ensemble.artefacts.cuda_split import check_split

        try:
            shape = DecoderShape.from_dict(manifest.engine)
            if reason := shape.reason_against_cache(settings.kv_cache):
                yield reason
            check_split(shape, Split(settings.tensor_parallel_size, settings.expert_parallel_size))
            num_gpus = settings.tensor_parallel_size * settings.expert_parallel_size
            if num_gpus > 1 and (manifest.recipe or {}).get("weights") == "per_block":
                yield f"{num_gpus} GPUs: {ONE_GPU}"
        except LayoutError as error:
            yield str(error)
        yield from super().check(manifest, settings)

    def check_scoring(self, manifest: Manifest) -> Iterator[str]:
        """See Target: the decoder's dimensions."""
        from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape, LayoutError

        try:
            DecoderShape.from_dict({name: value for name, value in manifest.engine.items() if name != PREFIX_IDS})
        except LayoutError as error:
            yield str(error)

    def _shape(self, spec: ModelSpec, max_seq_len: int) -> DecoderShape:
        from deepseek_triton.builders.targets.artefacts.decoder_shape import decoder_shape

        return decoder_shape(spec, max_seq_len)


def _kv_cache(settings: Mapping[str, Any]) -> KvCache:
    """The form of the cache: what is asked for, or the target's default."""
    form: KvCache = settings.get("kv_cache") or CUDA_SETTINGS.default_values()["kv_cache"]
    return form


TARGET = CudaTarget()
