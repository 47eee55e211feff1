"""Quantised weights that nothing here reads: known by their configuration or by their tensors, and refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from deepseek_triton.builders.errors import UnsupportedError

WAY_OUT = "give the checkpoint that it was made from, or the same model as compressed-tensors FP8 or GGUF"

# quant_method of config.json → what it is.
METHODS = {
    "aqlm": "AQLM (codebooks)",
    "auto-round": "AutoRound (integers)",
    "awq": "AWQ (4-bit integers)",
    "bitnet": "BitNet (ternary weights)",
    "bitsandbytes": "bitsandbytes",
    "eetq": "EETQ (8-bit integers)",
    "exl2": "ExLlamaV2",
    "exl3": "ExLlamaV3",
    "fbgemm_fp8": "FBGEMM FP8",
    "fouroversix": "Four over Six (4-bit floats)",
    "fp_quant": "FP-Quant (4-bit floats)",
    "gguf": "GGUF inside transformers",
    "gptq": "GPTQ (integers)",
    "gptq_marlin": "GPTQ for Marlin (integers)",
    "higgs": "HIGGS",
    "hqq": "HQQ (integers)",
    "marlin": "Marlin (4-bit integers)",
    "metal": "integers for Metal",
    "mxfp4": "MXFP4 (4-bit floats)",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4 (4-bit floats)",
    "quanto": "Quanto",
    "quark": "AMD Quark",
    "quip": "QuIP#",
    "sinq": "SINQ (integers)",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ (codebooks)",
}

# Names of tensors, as patterns → what holds such tensors.
SIGNS = (
    (r".*\.g_idx", METHODS["gptq"]),
    (r".*\.weight_g_idx", "compressed-tensors with columns in another order (actorder)"),
    (r".*\.(?:qweight|qzeros)", "AWQ or GPTQ (integers)"),
    (r".*\.weight_packed", "compressed-tensors with packed integers or 4-bit floats"),
    (r".*\.quant_state\.bitsandbytes__nf4", "bitsandbytes NF4"),
    (r".*\.(?:SCB|absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)", METHODS["bitsandbytes"]),
    (r".*\.(?:W_q|W_q\..*)", METHODS["hqq"]),
    (r".*\.weight_scales", METHODS["eetq"]),
    (r".*[.:]_weight_(?:qdata|scale.*)|.*:_data", METHODS["torchao"]),
    (r".*\._data|.*\.weight\._scale", METHODS["quanto"]),
    (r".*\.codebooks", METHODS["aqlm"]),
    (r".*\.q_weight", METHODS["exl2"]),
    (r".*\.trellis", METHODS["exl3"]),
    (r".*\.weight_scale_2|.*\.weight_global_scale", METHODS["nvfp4"]),
    (r".*_proj\.(?:scales|biases)", "MLX (integers)"),
    (r".*\.lora_(?:A|B|embedding_A|embedding_B)(?:\..*)?", "a LoRA adapter that was not merged"),
)


def refusal(what: str, place: str) -> UnsupportedError:
    """The error for weights quantised by `what`; place: the file that shows it, and how."""
    return UnsupportedError(f"{place}: weights quantised by {what} are not supported; {WAY_OUT}")


def refuse_by_names(names: Iterable[str], place: str) -> None:
    """Raise UnsupportedError where one of the tensors `names` belongs to a method of quantisation.

    place: the checkpoint.
    """
    held = list(names)
    for pattern, what in SIGNS:
        for name in held:
            if re.fullmatch(pattern, name):
                if "LoRA" in what:
                    raise UnsupportedError(
                        f"{place}: {name!r} is of {what}: merge it with peft's merge_and_unload, or keep it in a "
                        "directory of its own and give that as --adapter"
                    )
                raise refusal(what, f"{place}: {name!r}")
