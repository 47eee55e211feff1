"""Small checkpoints whose linear layers are FP8, as the tools that publish such checkpoints write them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import make_checkpoint

E4M3_MAX = 448.0
LAYERS = 3  # of the small checkpoints
FP8_LAYERS = ("_proj.weight", "_with_mqa.weight", "indexer.wq_b.weight", "indexer.wk.weight")
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """`quantization_config` as llm-compressor writes it."""
    group = {
        "targets": ["Linear"],
        "weights": {
            **FLOAT8,
            "dynamic": False,
            "group_size": None,
            "block_structure": None,
            "actorder": None,
            **weights,
        },
        "input_activations": None if inputs is None else {**FLOAT8, **inputs},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None,
        "global_compression_ratio": 1.5, "sparsity_config": {}, "transform_config": {}, "version": "0.12.2", **more,
    }  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """How a tool writes FP8. scales: of a weight: "tensor", "channel" or (rows, columns) of a block. scale_shape: "[]",
    "[1]" or "[n, 1]". input_scale: the name of a static input scale, or None. is_static: does the configuration say so?
    """

    config: dict[str, Any]
    scales: str | tuple[int, int]
    scale: str = "weight_scale"
    scale_shape: str = "[n, 1]"
    scale_dtype: str = "bfloat16"
    input_scale: str | None = None

    @property
    def is_static(self) -> bool:
        return self.input_scale is not None


TENSOR, CHANNEL = {"strategy": "tensor"}, {"strategy": "channel"}
PER_TOKEN, STATIC = {"strategy": "token", "dynamic": True}, {"strategy": "tensor", "dynamic": False}
CACHE = {"kv_cache_scheme": {**FLOAT8, "strategy": "tensor", "dynamic": False}}
KINDS = {
    "channel, each token": Kind(compressed(CHANNEL, PER_TOKEN), "channel"),
    "tensor, each token": Kind(compressed(TENSOR, PER_TOKEN), "tensor", scale_shape="[1]"),
    "tensor, static": Kind(compressed(TENSOR, STATIC, **CACHE), "tensor", scale_shape="[1]", input_scale="input_scale"),
    "channel, static": Kind(compressed(CHANNEL, STATIC), "channel", scale_dtype="float32", input_scale="input_scale"),
    "weights alone": Kind(compressed(CHANNEL, None, format="naive-quantized"), "channel"),
    "AutoFP8, static": Kind(
        {
            "quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"],
            "kv_cache_scheme": "static",
        },
        "tensor", scale_shape="[]", scale_dtype="float32", input_scale="input_scale",
    ),
    "AutoFP8, dynamic": Kind(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]},
        "tensor", scale_shape="[]", scale_dtype="float32",
    ),
    "transformers, static": Kind(
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None, "modules_to_not_convert": []},
        "tensor", scale="weight_scale_inv", scale_shape="[]", input_scale="activation_scale",
    ),
    "ModelOpt": Kind(
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"], "producer": {"name": "modelopt"}},
        "tensor", scale_shape="[]", scale_dtype="float32", input_scale="input_scale",
    ),
}  # fmt: skip
BLOCKS = {
    "DeepSeek": Kind(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
        (128, 128), scale="weight_scale_inv", scale_dtype="float32",
    ),
    "small blocks": Kind(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 48]},
        (32, 48), scale="weight_scale_inv", scale_dtype="float32",
    ),
    "powers of two": Kind(
        {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [32, 32]},
        (32, 32), scale="weight_scale_inv", scale_dtype="float8_e8m0fnu",
    ),
    "compressed-tensors": Kind(
        compressed(
            {"strategy": "block", "block_structure": [32, 32]},
            {"strategy": "group", "group_size": 128, "dynamic": True},
        ),
        (32, 32),
    ),
    "groups": Kind(compressed({"strategy": "group", "group_size": 16}, PER_TOKEN), (1, 16)),
}  # fmt: skip


def write_fp8(directory: Path, kind: Kind, option: str = "llama", **config: Any) -> Path:
    """The small checkpoint of `option` with its linear layers in FP8; norms, embedding, biases and head stay."""
    safetensors = pytest.importorskip("safetensors.torch")
    path = make_checkpoint(directory, option, dtype="bfloat16", **config)
    file = path / "model.safetensors"
    tensors: dict[str, Any] = safetensors.load_file(file)
    for name in [name for name in tensors if name.endswith(FP8_LAYERS) and "weights_proj" not in name]:
        module = name.removesuffix(".weight")
        tensors[name], tensors[f"{module}.{kind.scale}"] = encoded(tensors[name].float(), kind)
        if kind.input_scale:
            tensors[f"{module}.{kind.input_scale}"] = input_scale(module, kind)
    if kind.config.get("kv_cache_scheme"):
        torch = pytest.importorskip("torch")
        for layer in range(LAYERS):
            for cache in "kv":
                tensors[f"model.layers.{layer}.self_attn.{cache}_scale"] = torch.ones(1)
    safetensors.save_file(tensors, file, metadata={"format": "pt"})
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, "quantization_config": kind.config}))
    return path


def encoded(weight: Any, kind: Kind) -> tuple[Any, Any]:
    """Codes and scale of a weight [out, in]; values are codes × scale, exactly."""
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, kind.scale_dtype)
    rows, columns = weight.shape
    if isinstance(kind.scales, tuple):
        height, width = kind.scales
        padded = torch.zeros(-(-rows // height) * height, -(-columns // width) * width)
        padded[:rows, :columns] = weight
        blocks = padded.reshape(padded.shape[0] // height, height, padded.shape[1] // width, width)
        scale = (blocks.abs().amax((1, 3)) / E4M3_MAX * 1.01).to(dtype)
        each = scale.float().repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns]
    else:
        amax = weight.abs().amax() if kind.scales == "tensor" else weight.abs().amax(1, keepdim=True)
        scale = (amax / E4M3_MAX * 1.01).to(dtype)
        each = scale.float()
        shapes = {"[]": (), "[1]": (1,), "[n, 1]": (-1, 1)}
        scale = scale.reshape(shapes[kind.scale_shape])
    return (weight / each).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def input_scale(module: str, kind: Kind) -> Any:
    """A static scale that depends on which value the module reads: layers that read one value share it."""
    torch = pytest.importorskip("torch")
    readers = {"o_proj": 0.006, "down_proj": 0.05, "gate_proj": 0.02, "up_proj": 0.02}
    value = readers.get(module.rsplit(".", 1)[1], 0.015)
    return torch.tensor(value).reshape(() if kind.scale_shape == "[]" else (1,))


def dequantized(path: Path, kind: Kind) -> dict[str, Any]:
    """Every weight as plain torch gives it back, in float32."""
    safetensors = pytest.importorskip("safetensors.torch")
    tensors: dict[str, Any] = safetensors.load_file(path / "model.safetensors")
    found = {}
    for name, tensor in tensors.items():
        scale = tensors.get(f"{name.removesuffix('.weight')}.{kind.scale}") if name.endswith(".weight") else None
        if name.endswith(("_scale", "_scale_inv")):
            continue
        if scale is not None and isinstance(kind.scales, tuple):
            height, width = kind.scales
            each = scale.float().repeat_interleave(height, 0).repeat_interleave(width, 1)
            found[name] = tensor.float() * each[: tensor.shape[0], : tensor.shape[1]]
        else:
            found[name] = tensor.float() if scale is None else tensor.float() * scale.float()
    return found


def reference_logits(path: Path, kind: Kind, ids: Any) -> Any:
    """transformers' model in float32 with the dequantised weights, each linear layer's input rounded to FP8."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(path)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(dequantized(path, kind))

    def rounding(name: str) -> Any:
        static = float(input_scale(name, kind)) if kind.is_static else None

        def rounded(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            (x,) = arguments
            scale = static or (x.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=2.0**-14)
            return ((x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale,)

        return rounded

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(rounding(name))
    with torch.no_grad():
        return model(torch.tensor(ids)[None]).logits[0].numpy()
