"""LoRA adapters, merged as they are read: peft's own merge is the reference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.cli import main
from deepseek_triton.builders.errors import BuildError, CheckpointError, UnsupportedError
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from tests.support.checkpoints import load_reference, make_checkpoint, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # peft speaks of transformers' next release
Change = Callable[[Any], object]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
DOWN = "base_model.model.model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Small checkpoints, each made once."""
    directory = tmp_path_factory.mktemp("bases")

    def base(option: str) -> Path:
        path = directory / option
        return path if path.exists() else make_tokenizer(make_checkpoint(path, option))

    return base


def adapter_of(base: Path, directory: Path, **options: Any) -> Any:
    """peft's model on `base` with random adapters; its adapter is saved to `directory`."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(1)
    model = peft.get_peft_model(load_reference(base), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
    model.peft_config["default"].base_model_name_or_path = f"deepseek-ai/{base.name}"
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
        elif "lora_" in name or "modules_to_save" in name or (parameter.requires_grad and "bias" in name):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    return model


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "every layer": ("qwen2", {"target_modules": "all-linear"}),
    "rslora": ("qwen3", {"target_modules": ALL, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ALL,
            "rank_pattern": {"down_proj": 7, r"layers\.0\.self_attn\.q_proj": 2, "^model.layers.2.mlp.up_proj": 3},
            "alpha_pattern": {"k_proj": 11, r".*\.1\.mlp\.gate_proj": 1},
        },
    ),
    "dora": ("llama", {"target_modules": ALL, "use_dora": True}),
    "dora, rslora": ("qwen2", {"target_modules": ATTENTION, "use_dora": True, "use_rslora": True}),
    "biases": ("llama-biases", {"target_modules": ATTENTION, "bias": "all"}),
    "a bias of its own": ("llama-biases", {"target_modules": ALL, "lora_bias": True}),
    "norms and head saved": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]}),
    "embedding saved": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embedding of a tied model": ("llama-mha-tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "one layer": ("llama", {"target_modules": ALL, "layers_to_transform": [1]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_those_of_peft(kind: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    option, options = KINDS[kind]
    model = adapter_of(bases(option), tmp_path / "adapter", **options)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected_logits = model.eval()(ids).logits[0].numpy()
    merged = model.merge_and_unload()
    checkpoint, base = open_checkpoint(bases(option), tmp_path / "adapter"), open_checkpoint(bases(option))
    assert checkpoint.notes == base.notes
    changed = 0
    state = merged.state_dict()
    for name, shape in checkpoint.spec.tensor_shapes().items():
        values = checkpoint.read(name)
        assert values.shape == shape
        # Of a model that ties them peft merges the embedding's adapter into the head too, which its own logits lack.
        if name != "lm_head.weight" or not base.spec.tie_word_embeddings:
            np.testing.assert_allclose(values, state[name].numpy(), atol=2e-6, rtol=1e-5, err_msg=name)
        stored = base.read(name if name in base.spec.tensor_shapes() else "model.embed_tokens.weight")
        changed += not np.array_equal(values, stored)
    assert changed
    # The weights that were read are those of the model that peft ran.
    plain = load_reference(bases(option))
    if plain.config.tie_word_embeddings:
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.clone())
    plain.load_state_dict(
        {name: torch.tensor(np.array(checkpoint.read(name))) for name in state if name in plain.state_dict()}
    )
    with torch.no_grad():
        np.testing.assert_allclose(plain(ids).logits[0].numpy(), expected_logits, atol=1e-3, rtol=1e-3)


def refusal(base: Path, adapter: Path, error: type[BuildError] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        open_checkpoint(base, adapter)
    text = str(caught.value)
    assert "\n" not in text and str(adapter) in text
    return text


@pytest.fixture(scope="module")
def sound(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound adapter, which every test copies."""
    directory = tmp_path_factory.mktemp("sound") / "adapter"
    adapter_of(bases("llama"), directory, target_modules=ALL)
    return directory


@pytest.fixture
def saved(bases: Callable[[str], Path], sound: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A base and a sound adapter of it."""
    return bases("llama"), shutil.copytree(sound, tmp_path / "adapter")


def configure(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_tensors(adapter: Path, change: Change) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = safetensors.load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    safetensors.save_file(tensors, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', only LORA is supported; merge it with peft's merge_and_unload"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"peft_type": "PROMPT_TUNING"}, "'PROMPT_TUNING'"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4': the adapter was trained on a changed base"),
        ({"init_lora_weights": "olora"}, "'olora'"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is set: an activated LoRA"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is set"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters is set"),
        ({"trainable_token_indices": [3]}, "a LoRA with trained tokens"),
        ({"use_something_new": True}, "use_something_new is True, which nothing here knows"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is true"),
    ],
)
def test_other_methods_are_refused_by_name(changes: dict[str, Any], message: str, saved: tuple[Path, Path]) -> None:
    base, adapter = saved
    configure(adapter, **changes)
    assert message in refusal(base, adapter, UnsupportedError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r is 0, must be a positive number"),
        ({"r": 8}, "down_proj has shape [4, 112], [8, 112] is needed for rank 8 on a layer of [64, 112]"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"use_rslora": "false"}, "use_rslora is 'false', must be true or false"),
        ({"use_dora": 0}, "use_dora is 0, must be true or false"),
        ({"rank_pattern": {"(": 3}}, "no regular expression"),
        ({"rank_pattern": [1]}, "rank_pattern is [1], must be a JSON object"),
        ({"use_dora": True}, "the magnitude of model.layers.0"),
    ],
)
def test_damaged_configurations_are_named(changes: dict[str, Any], message: str, saved: tuple[Path, Path]) -> None:
    base, adapter = saved
    configure(adapter, **changes)
    if message.startswith("down_proj"):
        configure(adapter, rank_pattern=dict.fromkeys([name for name in ALL if name != "down_proj"], 4))
    assert message in refusal(base, adapter)


TENSORS: dict[str, tuple[Change, type[BuildError], str]] = {
    "half a pair": (lambda t: t.pop(f"{DOWN}.lora_B.weight"), CheckpointError, "has only a of a LoRA's two matrices"),
    "unknown layer": (
        lambda t: t.update({f"{DOWN}x.lora_{x}.weight": t[f"{DOWN}.lora_{x}.weight"].clone() for x in "AB"}),
        CheckpointError,
        "'model.layers.1.mlp.down_projx' is no layer of a llama model",
    ),
    "unknown part": (
        lambda t: t.update({f"{DOWN}.lora_E": t[f"{DOWN}.lora_A.weight"].clone()}),
        UnsupportedError,
        "is of no LoRA that is known here",
    ),
    "unknown tensor": (
        lambda t: t.update({"base_model.model.classifier.weight": t[f"{DOWN}.lora_A.weight"].clone()}),
        CheckpointError,
        "'classifier.weight' is not part of the model",
    ),
    "longer vocabulary": (
        lambda t: t.update({"base_model.model.lm_head.weight": t[f"{DOWN}.lora_A.weight"].new_zeros(330, 64)}),
        UnsupportedError,
        "lm_head.weight has shape [330, 64], the model's is [320, 64]: an adapter that changes the vocabulary",
    ),
    "another model's": (
        lambda t: t.update({f"{DOWN}.lora_A.weight": t[f"{DOWN}.lora_A.weight"][:, :100].clone()}),
        CheckpointError,
        "down_proj has shape [4, 100], [4, 112] is needed",
    ),
    "nothing": (lambda t: t.clear(), CheckpointError, "holds no tensor of an adapter"),
}


@pytest.mark.parametrize("damage", TENSORS)
def test_tensors_that_do_not_fit_are_named(damage: str, saved: tuple[Path, Path]) -> None:
    base, adapter = saved
    change, error, message = TENSORS[damage]
    change_tensors(adapter, change)
    assert message in refusal(base, adapter, error)


def test_an_adapter_that_is_not_there_or_is_none(saved: tuple[Path, Path]) -> None:
    base, adapter = saved
    assert "is not a directory; give the directory of a LoRA adapter" in refusal(base, adapter / "nowhere")
    assert "adapter_config.json: No such file" in refusal(base, base)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "is a pickle" in refusal(base, adapter, UnsupportedError)
    (adapter / "adapter_model.bin").unlink()
    assert "adapter_model.safetensors: No such file" in refusal(base, adapter)


def test_another_base_and_another_tokenizer_are_told(saved: tuple[Path, Path]) -> None:
    base, adapter = saved
    (adapter / "tokenizer.json").write_text("{}")
    configure(adapter, base_model_name_or_path="deepseek-ai/DeepSeek-R1-Distill-Llama-8B")
    *_, first, second = open_checkpoint(base, adapter).notes
    assert "was trained on deepseek-ai/DeepSeek-R1-Distill-Llama-8B; the checkpoint is llama" in first
    assert "holds a tokenizer; the checkpoint's own is used" in second


@pytest.mark.slow
def test_the_command_builds_it_and_the_manifest_records_it(
    saved: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = saved
    configure(adapter, base_model_name_or_path="another/model")
    words = ["build", str(base), "--name", "m", "--repository", str(tmp_path / "r"), "--max-seq-len", "32"]
    assert main([*words, "--adapter", str(adapter)]) == 0
    assert "was trained on another/model; the checkpoint is llama" in capsys.readouterr().err
    manifest = Manifest.load(tmp_path / "r" / "m-engine" / "1")
    assert (manifest.adapter["name"], manifest.adapter["base"]) == ("adapter", "another/model")
    assert len(manifest.adapter["sha256"]) == 64 and f"--adapter {adapter}" in manifest.command
    assert main(words) == 0
    plain = Manifest.load(tmp_path / "r" / "m-engine" / "2")
    assert plain.adapter == {} and plain.checkpoint_sha256 == manifest.checkpoint_sha256
    assert plain.files != manifest.files


@pytest.mark.slow
def test_a_manifest_of_before_has_no_adapter(saved: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = saved
    words = ["build", str(base), "--name", "m", "--repository", str(tmp_path / "r"), "--max-seq-len", "32", "--quiet"]
    assert main(words) == 0
    file = tmp_path / "r" / "m-engine" / "1" / "manifest.json"
    values = json.loads(file.read_text())
    del values["adapter"]
    file.write_text(json.dumps(values))
    assert Manifest.load(file.parent).adapter == {}


@pytest.mark.slow
def test_rotary_channels_that_lie_in_pairs_are_reordered_with_their_adapter(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases("v2-lite")
    layers = ["q_proj", "kv_a_proj_with_mqa", "o_proj"]
    model = adapter_of(base, tmp_path / "adapter", target_modules=layers, use_dora=True)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged, checkpoint = open_checkpoint(tmp_path / "merged"), open_checkpoint(base, tmp_path / "adapter")
    for name in checkpoint.spec.tensor_shapes():
        np.testing.assert_allclose(checkpoint.read(name), merged.read(name), atol=2e-6, rtol=1e-5, err_msg=name)
