"""Encoding against the tokenizers library itself; BOS, templates and everything a client can get wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from deepseek_triton.ensemble.text.chat import ChatTemplate, parse_messages
from deepseek_triton.ensemble.text.errors import TextError, TokenizerLoadError
from deepseek_triton.ensemble.text.tokenizer import Tokenizer
from deepseek_triton.ensemble.text.tool_calls.formats import DEEPSEEK, HERMES
from tests.support import chat_templates
from tests.support.real_tokenizers import HARD_TEXTS, deepseek, deepseek_directory, smollm2, smollm2_directory

BOS, EOS = 0, 1


def write_files(
    directory: Path,
    config: dict[str, Any] | None = None,
    template: str | None = None,
    adds_bos: bool = False,
    specials: Sequence[str] = (),
) -> Path:
    """A byte-level tokenizer without merges: <s>, </s>, <eot> and all bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", "<eot>", *alphabet])}
    backend = tokenizers.Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", *specials])
    backend.add_tokens([AddedToken("<eot>", special=False)])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", BOS)])
    backend.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


def chat(template: str, messages: Any, directory: Path, config: dict[str, Any] | None = None) -> str:
    """What the template makes of `messages`, read back from the ids."""
    tokenizer = Tokenizer.from_directory(write_files(directory, config, template))
    ids = tokenizer.encode_messages(messages if isinstance(messages, str) else json.dumps(messages))
    text: str = tokenizer._backend.decode(ids.tolist(), skip_special_tokens=False)
    return text


USER = [{"role": "user", "content": "Hi"}]


# --- Encoding


@cache
def ours_and_theirs(name: str) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """A tokenizer as this project and as the library reads it."""
    ours, directory = {"deepseek": (deepseek, deepseek_directory), "smollm2": (smollm2, smollm2_directory)}[name]
    return ours(), tokenizers.Tokenizer.from_file(str(directory() / "tokenizer.json"))


@pytest.mark.parametrize("text", HARD_TEXTS)
@pytest.mark.parametrize("name", ["deepseek", "smollm2"])
def test_ids_are_the_librarys_and_come_back_as_the_text(name: str, text: str) -> None:
    tokenizer, theirs = ours_and_theirs(name)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == theirs.encode(text).ids
    assert tokenizer.decode(ids) == theirs.decode(ids.tolist())
    if not any(token.special and token.content in text for token in theirs.get_added_tokens_decoder().values()):
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text.encode()).tolist() == ids.tolist()


def test_batch_is_each_text_alone() -> None:
    tokenizer, texts = smollm2(), list[str | bytes]([*HARD_TEXTS, b"bytes"])
    batch = tokenizer.encode_prompts([tokenizer.text_prompt(text) for text in texts])
    assert [ids.tolist() for ids in batch] == [smollm2().encode(text).tolist() for text in [*HARD_TEXTS, "bytes"]]


def test_decode_leaves_out_specials_and_ids_outside_of_the_vocabulary() -> None:
    tokenizer = smollm2()
    ids = [
        tokenizer.bos_id or 0,
        *tokenizer.encode("Hi").tolist(),
        tokenizer.vocab_size,
        tokenizer.eos_id or 0,
    ]
    assert tokenizer.decode(ids) == tokenizer.decode(np.array(ids, dtype=np.int32)) == "Hi"


@pytest.mark.parametrize(
    ("config", "adds_bos", "text", "specials"),
    [
        (None, False, "a", []),
        (None, True, "a", [BOS]),
        ({"bos_token": "<s>"}, True, "<s>a", [BOS]),  # not doubled
        ({"bos_token": "<s>", "add_bos_token": True}, False, "a", [BOS]),  # DeepSeek
        ({"bos_token": "<s>", "add_bos_token": True}, True, "a", [BOS]),
        ({"bos_token": "<s>", "add_bos_token": True}, False, "<s>a", [BOS]),
        ({"bos_token": "<s>", "add_bos_token": False}, True, "a", []),
        ({"bos_token": {"__type": "AddedToken", "content": "<s>"}, "add_bos_token": True}, False, "a", [BOS]),
        ({"eos_token": "</s>", "add_eos_token": True}, False, "a", [EOS]),
        ({"eos_token": "</s>", "add_eos_token": True}, False, "a</s>", [EOS]),
    ],
)
def test_bos_and_eos(
    tmp_path: Path, config: dict[str, Any] | None, adds_bos: bool, text: str, specials: list[int]
) -> None:
    ids = Tokenizer.from_directory(write_files(tmp_path, config, adds_bos=adds_bos)).encode(text).tolist()
    assert [index for index in ids if index in (BOS, EOS)] == specials
    assert (ids[0] == BOS) == (BOS in specials) and (ids[-1] == EOS) == (EOS in specials)


def test_the_eos_token_is_special_even_where_tokenizer_json_says_otherwise(tmp_path: Path) -> None:
    """DeepSeek Coder's <|EOT|>."""
    assert Tokenizer.from_directory(write_files(tmp_path)).decode([2]) == "<eot>"
    tokenizer = Tokenizer.from_directory(write_files(tmp_path, {"eos_token": "<eot>"}))
    assert (tokenizer.eos_id, tokenizer.decode([2])) == (2, "")


def test_limits_from_training_do_not_cut_prompts(tmp_path: Path) -> None:
    file = write_files(tmp_path) / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(file))
    assert len(Tokenizer.from_directory(tmp_path).encode("a" * 50)) == 50


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "text_input is empty: send"),
        (b"", "text_input is empty: send"),
        (b"ok \xff\xfe", r"text_input is not UTF-8 \(byte 3\)"),
        ("half \ud83d", "text_input holds a lone surrogate"),
    ],
)
def test_bad_text(text: str | bytes, message: str) -> None:
    with pytest.raises(TextError, match=message):
        smollm2().encode(text)


# --- Chat


def test_smollm2_chat() -> None:
    tokenizer = smollm2()
    ids = tokenizer.encode_messages('[{"role": "user", "content": "What is the capital of France?"}]')
    assert ids.dtype == np.int32
    assert tokenizer._backend.decode(ids.tolist(), skip_special_tokens=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids[:3].tolist() == [1, 9690, 198]  # the template's own <|im_start|>, once


def test_template_writes_bos_itself(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True}
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}!"
    assert chat(template, USER, tmp_path, config) == "<s>Hi</s>!"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "{% for m in messages %}\n    {% if true %}\nx\n    {% endif %}\n{% endfor %}\n",
            "x\n",
        ),  # trim, lstrip
        ("{{ {'a': '<é>&\"'} | tojson }}", '{"a": "<é>&\\""}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("a{% generation %}b{{ messages[0].content }}{% endgeneration %}c", "abHic"),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
        ("{% if tools is none and add_generation_prompt %}yes{% endif %}", "yes"),
        ("x{{ bos_token }}", "x"),
    ],
)
def test_template_features(tmp_path: Path, template: str, expected: str) -> None:
    assert chat(template, USER, tmp_path) == expected


def test_object_form(tmp_path: Path) -> None:
    template = "{{ messages | length }} {{ tools[0].name }} {{ thinking }} {{ add_generation_prompt }}"
    request = {
        "messages": USER,
        "tools": [{"name": "f"}],
        "add_generation_prompt": False,
        "chat_template_kwargs": {"thinking": True, "messages": "not these"},
    }
    assert chat(template, request, tmp_path) == "1 f True False"


def test_text_parts_and_tool_calls() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]}
    messages = parse_messages(json.dumps([{"role": "user", "name": "Ann", "content": parts}, call]))["messages"]
    assert messages == [{"role": "user", "name": "Ann", "content": "one\ntwo"}, call]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (b"\xff[]", r"messages is not UTF-8 \(byte 0\)"),
        ("", "messages is not JSON"),
        ("[", "messages is not JSON"),
        ("[" * 100_000, "messages is not JSON"),
        ('"Hi"', "messages must be a JSON list"),
        ("{}", "messages must be a JSON list"),
        ("[]", "messages is empty"),
        (
            '{"messages": [{"role": "user", "content": "Hi"}], "tool": []}',
            "unknown key 'tool': known are messages",
        ),
        ('{"messages": [{"role": "user", "content": "Hi"}], "tools": {"a": 1}}', "tools must be a JSON list"),
        ("[1]", r"messages\[0\] must be an object"),
        ('[{"content": "Hi"}]', r"messages\[0\]\.role must be a string"),
        ('[{"role": 1, "content": "Hi"}]', r"messages\[0\]\.role must be a string"),
        ('[{"role": "user", "content": "Hi"}, {"role": "user"}]', r"messages\[1\]\.content is missing"),
        ('[{"role": "user", "content": null}]', r"messages\[0\]\.content is missing"),
        ('[{"role": "user", "content": 1}]', r"messages\[0\]\.content must be a string"),
        ('[{"role": "user", "content": ["Hi"]}]', r"content\[0\] must be .* this model accepts text only"),
        ('[{"role": "user", "content": [{"type": "image_url"}]}]', r"content\[0\] must be"),
        ('[{"role": "user", "content": "\\ud83d"}]', "messages holds a lone surrogate"),
    ],
)
def test_bad_messages(messages: str | bytes, message: str) -> None:
    with pytest.raises(TextError, match=message) as caught:
        smollm2().encode_messages(messages)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "refused the messages: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refused the messages: can only concatenate"),
        ("{{ nothing.at.all }}", "refused the messages: 'nothing' is undefined"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refused the messages: access to attribute"),
        ("{{ messages.append(1) }}", "refused the messages: .*unsafe"),
        ("{{ range(10 ** 9) }}", "refused the messages: Range too big"),
        ("{% if false %}x{% endif %}", "empty prompt"),
    ],
)
def test_template_refuses(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(TextError, match=message):
        chat(template, USER, tmp_path)


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="no chat template: send text_input"):
        Tokenizer.from_directory(write_files(tmp_path)).encode_messages(json.dumps(USER))


# --- Reasoning and tools


MARKERS = ["<think>", "</think>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁end｜>", "<tool_call>"]


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (None, []),
        (chat_templates.PLAIN, []),
        (chat_templates.QWEN25, ["<tool_call>"]),
        (chat_templates.QWEN3, ["<think>", "</think>", "<tool_call>"]),
        (chat_templates.DEEPSEEK_V31, ["<think>", "</think>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁end｜>"]),
    ],
)
def test_the_templates_markers_are_shown_though_special(tmp_path: Path, template: str | None, shown: list[str]) -> None:
    tokenizer = Tokenizer.from_directory(write_files(tmp_path, {"eos_token": "</s>"}, template, specials=MARKERS))
    ids = tokenizer.encode("".join(MARKERS) + "Hi</s>")
    assert len(ids) == len(MARKERS) + 3
    assert tokenizer.decode(ids) == "".join(shown) + "Hi"


def test_deepseeks_own_markers_are_ordinary_tokens() -> None:
    text = "<think>Hm</think>".join(["", *sorted(DEEPSEEK.markers), "Hi"])
    assert deepseek().decode(deepseek().encode(text)) == text


@pytest.mark.parametrize(
    ("template", "enable_thinking", "is_open"),
    [
        (chat_templates.DEEPSEEK_R1, None, True),
        (chat_templates.DEEPSEEK_V31, True, True),
        (chat_templates.DEEPSEEK_V31, None, False),
        (chat_templates.QWEN3, True, False),  # the model opens it itself
        (chat_templates.QWEN3, False, False),
        (chat_templates.QWEN25, None, None),
    ],
)
def test_what_a_chat_says_of_its_answer(
    tmp_path: Path, template: str, enable_thinking: bool | None, is_open: bool | None
) -> None:
    tokenizer = Tokenizer.from_directory(write_files(tmp_path, template=template))
    answer = tokenizer.chat_prompt(json.dumps(USER), enable_thinking)
    assert (answer.is_reasoning_open, answer.has_tools) == (is_open, False)
    mixed = tokenizer.encode_prompts([tokenizer.text_prompt("a text"), answer, tokenizer.text_prompt("another")])
    alone = [tokenizer.encode("a text"), tokenizer.encode_messages(json.dumps(USER), enable_thinking)]
    assert [ids.tolist() for ids in mixed[:2]] == [ids.tolist() for ids in alone]
    with_tools = tokenizer.chat_prompt(json.dumps({"messages": USER, "tools": [{"type": "function"}]}))
    assert with_tools.has_tools
    assert not tokenizer.chat_prompt(json.dumps({"messages": USER, "tools": []})).has_tools


def test_tool_format_is_the_templates(tmp_path: Path) -> None:
    assert Tokenizer.from_directory(write_files(tmp_path)).tool_format is None
    assert Tokenizer.from_directory(write_files(tmp_path, template=chat_templates.QWEN3)).tool_format is HERMES
    assert smollm2().tool_format is None


# --- Files


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    cases: list[tuple[dict[str, Any], str | None, str]] = [
        ({"chat_template": "S"}, None, "S"),
        ({"chat_template": named}, None, "D"),
        ({"chat_template": "S"}, "J", "J"),
    ]
    for config, file, expected in cases:
        directory = tmp_path / expected
        directory.mkdir()
        tokenizer = Tokenizer.from_directory(write_files(directory, config, file))
        assert tokenizer.decode(tokenizer.encode_messages(json.dumps(USER))) == expected


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json cannot be read"),
        ("tokenizer.json", "{}", "tokenizer.json is not a tokenizer"),
        ("tokenizer.json", "\udcff", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json must hold a JSON object"),
        (
            "tokenizer_config.json",
            '{"bos_token": 1}',
            "tokenizer_config.json: bos_token must be a str, got 1",
        ),
        ("tokenizer_config.json", '{"bos_token": "<x>"}', "bos_token '<x>' is not in tokenizer.json"),
        ("tokenizer_config.json", '{"add_bos_token": 1}', "add_bos_token must be a bool, got 1"),
        ("tokenizer_config.json", '{"add_bos_token": true}', "add_bos_token is true without bos_token"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}', "each with a name of its own"),
        (
            "tokenizer_config.json",
            '{"chat_template": "{% if"}',
            "tokenizer_config.json: chat_template is not a valid",
        ),
        ("chat_template.jinja", "{{", "chat_template.jinja is not a valid template"),
    ],
)
def test_bad_files(tmp_path: Path, file: str, content: str | None, message: str) -> None:
    path = write_files(tmp_path) / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(TokenizerLoadError, match=re.escape(message)):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.slow
def test_transformers_agrees() -> None:
    """On what it loads rightly: its own loader breaks DeepSeek's tokenizer (issue 45488)."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(smollm2_directory())
    for text in HARD_TEXTS:
        assert smollm2().encode(text).tolist() == theirs.encode(text), text
    messages = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "你好 <b>&"}]
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert smollm2().encode_messages(json.dumps(messages)).tolist() == theirs.encode(prompt)


def test_template_is_compiled_once_and_keeps_nothing() -> None:
    template = ChatTemplate("{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}")
    assert [template.render({}), template.render({})] == ["1", "1"]
