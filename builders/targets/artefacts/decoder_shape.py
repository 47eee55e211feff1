"""A model's dimensions as target `cuda` needs them."""

from __future__ import annotations

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.decoder.spec import ModelSpec


def decoder_shape(spec: ModelSpec, max_seq_len: int) -> DecoderShape:
    """The dimensions that the runner needs.

    Raises:
        BuildError: the decoder has an indexer, which no kernel computes.
    """
    if spec.indexer is not None:
        raise BuildError(f"target cuda doesn't compute the indexer of {spec.architecture}")
    return DecoderShape(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        rms_norm_eps=spec.rms_norm_eps,
        max_seq_len=max_seq_len,
        tie_word_embeddings=spec.tie_word_embeddings,
        qk_norm=spec.qk_norm,
        latent=spec.latent,
        experts=spec.experts,
    )
