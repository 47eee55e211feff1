"""DeepSeek's own FP8, a scale for 128 × 128 weights, in the cuda runner: the codes are the checkpoint's."""

# without triton the file is skipped before it imports what needs it

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.support.cuda_device import DEVICE, DTYPE, HAS_GPU  # isort: skip  # before triton


from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.fp8.stored import stored_recipe
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.targets.cuda import TARGET
from deepseek_triton.ensemble.artefacts.cuda_layout import WEIGHTS_FILE, DecoderShape
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.artefacts.tensor_file import TensorFile
from deepseek_triton.ensemble.engine.runners.base import PromptChunk, RunnerError
from deepseek_triton.ensemble.engine.runners.cuda.loading import load
from deepseek_triton.ensemble.engine.runners.cuda.pages import CacheForm
from deepseek_triton.ensemble.engine.runners.cuda.runner import CudaRunner
from deepseek_triton.ensemble.engine.runners.cuda.weights import StoredWeights
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from tests.builders.graph.test_latent_fp8 import round_reference
from tests.builders.graph.test_parity import prompt
from tests.support.checkpoints import load_reference, make_tokenizer
from tests.support.fp8_checkpoints import BLOCKS, Kind, dequantized, write_fp8

# The interpreter computes masked lanes too, and makes numbers of arrays.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("RuntimeWarning", "DeprecationWarning")]
Array = NDArray[Any]
V3 = BLOCKS["DeepSeek"]
V31 = replace(V3, config={**V3.config, "scale_fmt": "ue8m0"}, scale_dtype="float8_e8m0fnu")
SIZES: dict[str, Any] = {  # more than one block of rows and of columns, and blocks that are not whole
    "hidden_size": 160, "intermediate_size": 144, "moe_intermediate_size": 136, "num_hidden_layers": 2,
    "q_lora_rank": 136, "v_head_dim": 36, "n_shared_experts": 1,
}  # fmt: skip


def built(directory: Path, kind: Kind, **settings: Any) -> tuple[Path, Path]:
    """A checkpoint in blocks, and the engine's directory."""
    checkpoint = make_tokenizer(write_fp8(directory / "c", kind, "v3", **SIZES))
    options = BuildOptions(
        checkpoint, "m", directory / "models", target="cuda", precision="fp8", max_seq_len=64, settings=settings
    )
    build(options)
    return checkpoint, directory / "models" / "m-engine" / "1"


def as_floats(checkpoint: Path, kind: Kind, directory: Path) -> Path:
    """The same checkpoint with the weights that its codes stand for."""
    from safetensors.torch import save_file

    directory.mkdir()
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in dequantized(checkpoint, kind).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("kind", [V3, V31], ids=["float32 scales", "ue8m0"])
def test_codes_and_scales_are_the_checkpoints(kind: Kind, tmp_path: Path) -> None:
    checkpoint, engine = built(tmp_path, kind)
    stored, source = TensorFile(engine / WEIGHTS_FILE), open_checkpoint(checkpoint)
    spec = source.spec
    DecoderShape.from_dict(Manifest.load(engine).engine).check(stored.entries)

    def read(name: str, dtype: torch.dtype) -> torch.Tensor:
        entry = stored.entries[name]
        return torch.from_numpy(stored.read(name).copy()).view(dtype).view(entry.shape)

    def weights(name: str) -> Array:
        codes, scale = read(f"{name}.weight", torch.float8_e4m3fn).float(), read(f"{name}.scale", torch.float32)
        values: Array = (codes * scale.repeat_interleave(128, -1)[..., : codes.shape[-1]]).numpy()
        return values

    layer = "model.layers.1."
    attention = ("q_a_proj", "kv_a_proj_with_mqa")
    expected = {
        "q_kv_a": np.concatenate([source.read(f"{layer}self_attn.{name}.weight") for name in attention]),
        "q_b": source.read(f"{layer}self_attn.q_b_proj.weight"),
        "o": source.read(f"{layer}self_attn.o_proj.weight"),
        "experts_down": np.stack([source.read(f"{layer}mlp.experts.{i}.down_proj.weight") for i in range(8)]),
        "shared_down": source.read(f"{layer}mlp.shared_experts.down_proj.weight"),
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(weights(f"layers.1.{name}"), values, err_msg=name)
    assert stored.entries["layers.1.kv_b.weight"].dtype == "BF16"
    recipe = Manifest.load(engine).recipe
    assert recipe is not None and (recipe["weights"], recipe["rounding"]) == ("per_block", "stored")
    # No other target has scales for blocks.
    assert stored_recipe(source) is None
    assert spec.experts is not None


def test_the_runner_computes_what_the_blocks_stand_for(tmp_path: Path) -> None:
    checkpoint, engine = built(tmp_path, V3)
    shape = DecoderShape.from_dict(Manifest.load(engine).engine)
    runner = CudaRunner(
        StoredWeights(engine / WEIGHTS_FILE), shape, max_num_seqs=3, max_num_batched_tokens=80,
        cache_form=CacheForm("slots", 0), dtype=DTYPE, device=str(DEVICE),
    )  # fmt: skip
    reference, ids = load_reference(as_floats(checkpoint, V3, tmp_path / "floats")), prompt(10)
    with torch.no_grad():
        exact = reference(torch.tensor(ids)[None]).logits[0].numpy()
        round_reference(reference, weight_of=lambda weight: weight)
        expected = reference(torch.tensor(ids)[None]).logits[0].numpy()
    (found,) = runner.prefill_many([PromptChunk(0, ids[:9], 0)])
    step = runner.decode(np.array([ids[9], 0, 0]), np.array([9, -1, -1]))[0]
    for ours, theirs, unrounded in zip((found, step), expected[8:], exact[8:], strict=True):
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        # A value on the border between two codes may fall either way, and moves what follows.
        assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) > 0.99
        if not HAS_GPU:
            assert np.abs(ours - theirs).max() < np.abs(theirs - unrounded).max()
    runner.close()


def test_blocks_are_for_one_gpu(tmp_path: Path) -> None:
    checkpoint, engine = built(tmp_path, V3)
    options, spec = (
        BuildOptions(checkpoint, "m", tmp_path, target="cuda", precision="fp8"),
        open_checkpoint(checkpoint).spec,
    )
    assert TARGET.takes_blocks(options, spec)
    assert not TARGET.takes_blocks(replace(options, settings={"tensor_parallel_size": 2}), spec)
    settings = EngineSettings(tensor_parallel_size=2, kv_cache="slots")
    with pytest.raises(RunnerError, match="blocks are for one GPU"):
        load(engine, Manifest.load(engine), settings)
