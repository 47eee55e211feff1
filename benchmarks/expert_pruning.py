"""Remove experts of a small random mixture by REAP's score and by chance: python -m benchmarks.expert_pruning

No small trained mixture can be had offline. The experts' outputs are scaled by a lognormal factor, so that some matter
more than others; a random model predicts nothing, so its figures are the divergence from the parent and the agreement
with it, on a part of the built-in texts that REAP doesn't see. Writes benchmarks/results/expert-pruning.json; seconds.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.weights import smollm2
from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.fp8.texts.calibration_text import calibration_windows, load_tokenizer
from deepseek_triton.builders.lifecycle.pruning.choose import Choice
from deepseek_triton.builders.lifecycle.pruning.kept import Kept
from deepseek_triton.builders.lifecycle.pruning.options import PruneOptions
from deepseek_triton.builders.lifecycle.pruning.prune import prune
from deepseek_triton.builders.lifecycle.pruning.report import measure
from deepseek_triton.builders.lifecycle.pruning.write_left import write_left

RESULT = Path(__file__).parent / "results" / "expert-pruning.json"
NUM_EXPERTS, NUM_LAYERS, HIDDEN, TOKENS = 16, 4, 64, 2044
REMOVED = (2, 4, 8)
CHANCES = 3  # choices by chance for each number
CONFIG: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": HIDDEN, "intermediate_size": 128, "moe_intermediate_size": 32,
    "num_hidden_layers": NUM_LAYERS, "first_k_dense_replace": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_routed_experts": NUM_EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "max_position_embeddings": 512, "eos_token_id": 2, "routed_scaling_factor": 1.0, "norm_topk_prob": True,
}  # fmt: skip


def main() -> int:
    """Print and write the rows."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parent = _make(folder / "parent")
        checkpoint = open_checkpoint(parent)
        windows, _ = calibration_windows(checkpoint, None, is_generating=False)
        half = len(windows) // 2
        texts = {"seen.txt": windows[:half], "held-out.txt": windows[half:]}
        tokenizer = load_tokenizer(checkpoint)
        for name, part in texts.items():
            (folder / name).write_text("\n".join(tokenizer.decode(one.tolist()) for one in part), encoding="utf-8")
        made: dict[str, Path] = {}
        for number in REMOVED:
            made[f"{number} by REAP"] = output = folder / f"reap-{number}"
            prune(PruneOptions(parent, output, number / NUM_EXPERTS, "experts", text=folder / "seen.txt"))
            for seed in range(CHANCES):
                made[f"{number} by chance {seed}"] = output = folder / f"chance-{number}-{seed}"
                rng = np.random.default_rng(seed)
                kept = {
                    layer: np.sort(rng.choice(NUM_EXPERTS, NUM_EXPERTS - number, replace=False))
                    for layer in range(1, NUM_LAYERS)
                }
                output.mkdir()
                write_left(checkpoint.reopened(), Choice(Kept(tuple(range(NUM_LAYERS)), experts=kept)), output)
        found = measure(parent, made, folder / "held-out.txt", num_tokens=TOKENS, is_timed=False)
    rows = [
        {
            "name": row.name,
            "removed": row.removed,
            "bytes": row.num_bytes,
            "mean_kl": row.quality.mean_kl,
            "agreement": row.quality.agreement,
        }
        for row in found.rows
    ]
    values = {"experts": NUM_EXPERTS, "tokens": TOKENS, "parent_bytes": found.parent.num_bytes, "rows": rows}
    RESULT.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['name']:16} KL {row['mean_kl']:.4f}  agreement {row['agreement']:.1%}  {row['bytes']:,} bytes")
    return 0


def _make(directory: Path) -> Path:
    """A random mixture with SmolLM2's tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("deepseek_v3", **CONFIG))
    model.save_pretrained(directory)
    open_checkpoint(smollm2()).write_tokenizer(directory)
    checkpoint = open_checkpoint(directory)
    rng = np.random.default_rng(0)
    scales = {
        f"{layer}.{expert}": rng.lognormal(2.5, 1.0) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)
    }

    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if ".mlp.experts." in name and name.endswith("down_proj.weight"):
            words = name.split(".")
            tensor *= scales[f"{words[2]}.{words[5]}"]
        elif name.endswith("mlp.gate.weight"):
            tensor.normal_(0, 0.3)
    save_file(tensors, file, metadata={"format": "pt"})
    assert checkpoint.spec.experts is not None
    return directory


if __name__ == "__main__":
    sys.exit(main())
