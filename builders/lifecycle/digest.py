"""The digest of a whole checkpoint, as a build's manifest has it in `checkpoint_sha256`.

A build that leaves out the indexer, for short texts, has the digest of what it read.
"""

from __future__ import annotations

from deepseek_triton.builders.checkpoint.reader import Checkpoint


def digest_of(checkpoint: Checkpoint) -> str:
    """SHA-256 of all tensors, in the order of `ModelSpec.tensor_shapes`."""
    opened = checkpoint.reopened()
    for name in opened.spec.tensor_shapes():
        opened.read(name)
    return opened.digest()
