"""Target vllm: nothing is computed here; another model of the server, of Triton's vLLM backend, is asked."""

from __future__ import annotations

from pathlib import Path

from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.artefacts.vllm_settings import VLLM_SETTINGS
from deepseek_triton.ensemble.engine.remote.model import RemoteModel
from deepseek_triton.ensemble.protocol.settings import EngineSettings

SETTINGS = VLLM_SETTINGS


def load(directory: Path, manifest: Manifest, settings: EngineSettings) -> RemoteModel:
    """The limits of the model that vLLM runs."""
    return RemoteModel(settings.max_num_seqs, manifest.max_seq_len, int(manifest.spec["vocab_size"]))
