"""End tokens: the configuration's, the tokenizer's, and the chat template's end of turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from deepseek_triton.builders.checkpoint.config.hf_config import from_hf
from deepseek_triton.builders.checkpoint.tokenizer.ends import end_ids, end_of_turn
from deepseek_triton.builders.errors import CheckpointError
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.check import check_repository
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.text.tokenizer import Tokenizer
from tests.support import chat_templates
from tests.support.checkpoints import TINY, write_tiny

PLAIN = ("<|EOT|>", "<think>")  # not marked as special, as in DeepSeek's files
SPECIALS = (
    "<|bos|>",
    "<|eos|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<｜end▁of▁sentence｜>",
    "<|EOT|>",
    "<think>",
)
BOS, EOS, IM_START, IM_END, EOT_ID, DEEPSEEK_EOS, EOT = range(256, 263)
CHATML = (
    "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Templates, and the end of turn that each of them has.
TEMPLATES: dict[str, tuple[str, int | None]] = {
    "chatml": (CHATML, IM_END),
    "with a system message of its own": ("<|im_start|>system\nBe kind.<|im_end|>\n" + CHATML, IM_END),
    "ending after the answers only": (
        "{% for m in messages %}{{m.content}}{% if m.role == 'assistant' %}<|eot_id|>{% endif %}{% endfor %}",
        EOT_ID,
    ),
    "a line break before the end": ("{% for m in messages %}{{m.content}}\n<|EOT|>\n{% endfor %}", EOT),
    "the tokenizer's own end": ("{% for m in messages %}{{m.content}}{{eos_token}}{% endfor %}", EOS),
    "text after the answer": ("{% for m in messages %}{{m.role}}: {{m.content}}\n{% endfor %}", None),
    # The token that opens a message isn't one that ends it, also where the template always asks for an answer.
    "always a generation prompt": (
        "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}{% endfor %}<|im_start|>assistant\n",
        None,
    ),
    "with <think> after the answer": ("{% for m in messages %}{{m.content}}<think>{% endfor %}", None),
    "without the answer": ("{% for m in messages if m.role == 'user' %}{{m.content}}<|im_end|>{% endfor %}", None),
    "that refuses an answer": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{raise_exception('no')}}{% endif %}{% endfor %}",
        None,
    ),
}


def write_tokenizer(directory: Path, config: dict[str, Any] | None = None, template: str | None = None) -> Path:
    """All bytes, and SPECIALS from id 256 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(token, special=token not in PLAIN, normalized=False) for token in SPECIALS])
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    values = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": template, **(config or {})}
    (directory / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    return directory


def checkpoint(directory: Path, generation: dict[str, Any] | None = None, **changes: Any) -> Path:
    write_tiny(directory, **{"vocab_size": 270, "max_position_embeddings": 16, **changes})
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return directory


def built_ends(source: Path, directory: Path) -> tuple[int, ...]:
    build(BuildOptions(source, "m", directory))
    assert check_repository(directory) == []
    return Manifest.load(directory / "m-engine/1").end_ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_turn_of_a_template(tmp_path: Path, name: str) -> None:
    template, expected = TEMPLATES[name]
    assert end_of_turn(Tokenizer.from_directory(write_tokenizer(tmp_path, template=template))) == expected


def test_the_end_of_turn_of_the_models_own_templates(tmp_path: Path) -> None:
    ends = {chat_templates.DEEPSEEK_R1: DEEPSEEK_EOS, chat_templates.QWEN3: IM_END}
    for number, (template, expected) in enumerate(ends.items()):
        path = write_tokenizer(tmp_path / str(number), {"eos_token": "<｜end▁of▁sentence｜>"}, template)
        assert end_of_turn(Tokenizer.from_directory(path)) == expected


def test_every_source_ends_a_text(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint", {"eos_token_id": [EOT_ID, 5]}, eos_token_id=5)
    write_tokenizer(source, template=CHATML)
    assert built_ends(source, tmp_path / "repository") == (5, EOT_ID, EOS, IM_END)


@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": None}, {"eos_token_id": []}])
@pytest.mark.parametrize("eos", [None, EOS])
def test_null_is_absence(tmp_path: Path, generation: dict[str, Any] | None, eos: int | None) -> None:
    source = checkpoint(tmp_path / "checkpoint", generation, eos_token_id=eos)
    assert built_ends(write_tokenizer(source), tmp_path / "repository") == (EOS,)


def test_a_model_without_an_end_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint", {"eos_token_id": None}, eos_token_id=None)
    write_tokenizer(source, {"eos_token": None}, "{% for m in messages %}{{m.content}}{% endfor %}")
    with pytest.raises(CheckpointError, match="names no token that ends a text: set eos_token_id in"):
        build(BuildOptions(source, "m", tmp_path / "repository"))
    assert not (tmp_path / "repository").exists()


def test_an_end_beyond_the_model_s_rows_ends_nothing(tmp_path: Path) -> None:
    spec = from_hf({**TINY, "vocab_size": EOS, "eos_token_id": None})
    tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path, template=CHATML))
    with pytest.raises(CheckpointError, match="x names no token"):
        end_ids(spec, tokenizer, "x")


@pytest.mark.parametrize("ends", [[], [270], [-1]])
def test_check_refuses_a_manifest_without_ends(tmp_path: Path, ends: list[int]) -> None:
    source = write_tokenizer(checkpoint(tmp_path / "checkpoint"))
    built_ends(source, tmp_path / "repository")
    file = tmp_path / "repository/m-engine/1/manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "end_ids": ends}))
    problems = [str(problem) for problem in check_repository(tmp_path / "repository")]
    assert any(
        "must be at least one of the model's 270 tokens, or no text would end; rebuild with" in line
        for line in problems
    )
