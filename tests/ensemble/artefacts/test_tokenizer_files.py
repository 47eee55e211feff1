"""A tokenizer's files against transformers: special tokens, added tokens and chat templates, wherever they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from deepseek_triton.ensemble.artefacts.tokenizer_files import read_tokenizer_files
from deepseek_triton.ensemble.text.errors import TextError, TokenizerLoadError
from deepseek_triton.ensemble.text.tokenizer import Tokenizer

CHATML = "{% for m in messages %}<|{{m.role}}|>{{m.content}}{{eos_token}}{% endfor %}"
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
USER = [{"role": "user", "content": "Hi"}]
Files = dict[str, Any]


def added(content: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    return {"content": content, "special": special, "lstrip": False, "rstrip": False, "single_word": False,
            "normalized": not special, **flags}  # fmt: skip


def write(directory: Path, files: Files) -> Path:
    """A byte-level tokenizer.json of all bytes, "Hi" (256) and <s> (257), which is special; `files` beside it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={token: index for index, token in enumerate([*alphabet, "Hi"])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<s>", special=True, normalized=False)])
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    for name, content in {"tokenizer_config.json": {}, **files}.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return directory


def fast(**config: Any) -> dict[str, Any]:
    return {"tokenizer_class": "PreTrainedTokenizerFast", **config}


ADDED = {"<|x|>": 258, "<|y|>": 259}
DECODER = {"257": added("<s>"), "258": added("<|x|>"), "259": added("<|y|>", special=False)}
# Files whose special tokens and added tokens transformers reads as they stand there.
LAYOUTS: dict[str, Files] = {
    "tokenizer_config alone": {"tokenizer_config.json": fast(bos_token="<s>", eos_token="<|x|>", unk_token="<|y|>")},
    "special_tokens_map alone": {
        "tokenizer_config.json": fast(),
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": added("<|x|>"), "pad_token": "<|y|>"},
    },
    "special_tokens_map before tokenizer_config": {
        "tokenizer_config.json": fast(bos_token="<|x|>", eos_token="<s>"),
        "special_tokens_map.json": {"bos_token": "<s>", "mask_token": "<|y|>"},
    },
    "added_tokens": {
        "tokenizer_config.json": fast(eos_token="<|x|>"),
        "added_tokens.json": ADDED,
    },
    "added_tokens_decoder": {"tokenizer_config.json": fast(bos_token="<s>", added_tokens_decoder=DECODER)},
    "added_tokens_decoder before special_tokens_map": {
        "tokenizer_config.json": fast(added_tokens_decoder=DECODER, eos_token="<|x|>"),
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "<|y|>"},
        "added_tokens.json": {"<|z|>": 258},
    },
    "serialised tokens": {
        "tokenizer_config.json": fast(
            bos_token={"__type": "AddedToken", **added("<s>")}, eos_token={"__type": "AddedToken", **added("<|x|>")}
        ),
    },
    "additional_special_tokens": {
        "tokenizer_config.json": fast(bos_token="<s>", additional_special_tokens=["<|x|>", "<|y|>", "Hi"]),
    },
    "extra_special_tokens by name": {
        "tokenizer_config.json": fast(extra_special_tokens={"image_token": "<|x|>"}, audio_token="<|y|>")
    },
    "extra_special_tokens": {"tokenizer_config.json": fast(extra_special_tokens=["<|x|>", "<|y|>"], eos_token="<s>")},
    "flags that differ from tokenizer.json's": {
        "tokenizer_config.json": fast(added_tokens_decoder={"257": added("<s>", lstrip=True), "258": added("<|x|>")}),
    },
    "the classes' own": {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None}},
}  # fmt: skip
TEXTS = ("Hi<|x|> a <|y|>b", " <s>Hi", "<s> <|x|><|y|>é Hi</s>")


@pytest.mark.parametrize("name", LAYOUTS)
def test_ids_and_special_tokens_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    path = write(tmp_path, LAYOUTS[name])
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    files = read_tokenizer_files(path)
    assert files.special_tokens == theirs.special_tokens_map
    if any(files.backend.token_to_id(token) is None for token in files.special_tokens.values()):
        return  # transformers makes a token of it; here it is an error, below
    for text in TEXTS:
        assert (
            files.backend.encode(text, add_special_tokens=False).ids == theirs(text, add_special_tokens=False).input_ids
        )


@pytest.mark.parametrize(
    "config",
    [
        {"image_token": "<s>"},
        {"image_token": added("<s>")},
        {"extra_special_tokens": {"image_token": "<s>"}},
        {"model_specific_special_tokens": {"image_token": "<s>"}},
    ],
)
def test_a_model_s_own_special_tokens_are_variables_of_its_template(config: Files, tmp_path: Path) -> None:
    files = {"tokenizer_config.json": fast(chat_template="{{ image_token }}{{ messages[0].content }}", **config)}
    tokenizer = Tokenizer.from_directory(write(tmp_path, files))
    assert tokenizer.chat_prompt(json.dumps(USER)).text == "<s>Hi"


def test_a_beginning_or_end_that_is_in_no_vocabulary_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, LAYOUTS["tokenizer_config alone"])
    with pytest.raises(TokenizerLoadError, match=r"eos_token '<\|x\|>' is not in tokenizer.json"):
        Tokenizer.from_directory(path)


def test_tokens_of_other_files_are_told_of(tmp_path: Path) -> None:
    assert read_tokenizer_files(write(tmp_path / "a", LAYOUTS["added_tokens"])).has_more_tokens
    assert not read_tokenizer_files(
        write(tmp_path / "b", {"tokenizer_config.json": fast(bos_token="<s>")})
    ).has_more_tokens


def test_a_class_has_special_tokens_of_its_own(tmp_path: Path) -> None:
    for number, name in enumerate(("LlamaTokenizer", "LlamaTokenizerFast")):
        path = write(tmp_path / str(number), {"tokenizer_config.json": {"tokenizer_class": name}})
        assert read_tokenizer_files(path).special_tokens == {"bos_token": "<s>"}  # </s> isn't in the vocabulary
        path = write(tmp_path / str(number), {"tokenizer_config.json": {"tokenizer_class": name, "bos_token": None}})
        assert read_tokenizer_files(path).special_tokens == {}


TEMPLATES: dict[str, Files] = {
    "one": {"tokenizer_config.json": fast(bos_token="<s>", chat_template="ONE " + CHATML)},
    "a list": {
        "tokenizer_config.json": fast(
            chat_template=[
                {"name": "default", "template": "DEFAULT " + CHATML},
                {"name": "tool_use", "template": "TOOLS {{tools|tojson}}" + CHATML},
                {"name": "rag", "template": "RAG " + CHATML},
            ]
        )
    },
    "a file": {"tokenizer_config.json": fast(chat_template="CONFIG"), "chat_template.jinja": "FILE " + CHATML},
    "files": {
        "tokenizer_config.json": fast(chat_template="CONFIG"),
        "chat_template.jinja": "FILE " + CHATML,
        "additional_chat_templates/tool_use.jinja": "TOOLS {{tools|tojson}}" + CHATML,
        "additional_chat_templates/rag.jinja": "RAG " + CHATML,
    },
    "every special token": {
        "tokenizer_config.json": fast(
            bos_token="<s>", eos_token="<s>", unk_token="<s>", pad_token="<s>", sep_token="<s>", cls_token="<s>",
            mask_token="<s>",
            chat_template="{{bos_token}}{{eos_token}}{{unk_token}}{{pad_token}}{{sep_token}}{{cls_token}}{{mask_token}}|"
            "{{image_token}}{{messages[0].content}}",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_is_the_one_that_transformers_chooses(tmp_path: Path, name: str, tools: Any) -> None:
    transformers = pytest.importorskip("transformers")
    path = write(tmp_path, TEMPLATES[name])
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    expected = theirs.apply_chat_template(USER, tools=tools, tokenize=False, add_generation_prompt=True)
    request = {"messages": USER, **({"tools": tools} if tools else {})}
    tokenizer = Tokenizer.from_directory(path)
    if tools and "TOOLS" not in expected:  # transformers drops them without a word
        with pytest.raises(TextError, match="this model's chat template knows none"):
            tokenizer.chat_prompt(json.dumps(request))
        return
    assert tokenizer.chat_prompt(json.dumps(request)).text == expected


def test_a_request_may_name_a_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write(tmp_path, TEMPLATES["files"]))

    def prompt(**request: Any) -> str:
        return tokenizer.chat_prompt(json.dumps({"messages": USER, **request})).text

    assert prompt(chat_template="rag").startswith("RAG")
    assert prompt(chat_template="default").startswith("FILE")
    with pytest.raises(TextError, match="this model's chat template knows none"):
        prompt(chat_template="default", tools=TOOLS)
    with pytest.raises(TextError, match="no chat template 'other': set chat_template to one of "):
        prompt(chat_template="other")
    with pytest.raises(TextError, match="chat_template must be the name of one"):
        prompt(chat_template=["rag"])
    with pytest.raises(TextError, match="stands beside messages"):
        prompt(chat_template_kwargs={"chat_template": "{{ 1 }}"})


def test_the_default_of_the_configuration_is_kept_where_files_have_none(tmp_path: Path) -> None:
    files = {
        "tokenizer_config.json": fast(chat_template="CONFIG " + CHATML),
        "additional_chat_templates/tool_use.jinja": "TOOLS {{tools|tojson}}" + CHATML,
    }
    tokenizer = Tokenizer.from_directory(write(tmp_path, files))
    assert tokenizer.chat_prompt(json.dumps(USER)).text.startswith("CONFIG")
    assert tokenizer.chat_prompt(json.dumps({"messages": USER, "tools": TOOLS})).text.startswith("TOOLS")


def test_several_templates_without_a_default_need_a_name(tmp_path: Path) -> None:
    named = [{"name": name, "template": name.upper()} for name in ("a", "b")]
    tokenizer = Tokenizer.from_directory(write(tmp_path, {"tokenizer_config.json": fast(chat_template=named)}))
    with pytest.raises(TextError, match="no chat template 'default': set chat_template to one of a, b"):
        tokenizer.chat_prompt(json.dumps(USER))
    assert tokenizer.chat_prompt(json.dumps({"messages": USER, "chat_template": "b"})).text == "B"


def test_a_request_s_own_variable_counts_before_a_special_token(tmp_path: Path) -> None:
    config = fast(bos_token="<s>", chat_template="{{bos_token}}{{messages[0].content}}")
    tokenizer = Tokenizer.from_directory(write(tmp_path, {"tokenizer_config.json": config}))
    request = {"messages": USER, "chat_template_kwargs": {"bos_token": "<b>"}}
    assert tokenizer.chat_prompt(json.dumps(request)).text == "<b>Hi"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"special_tokens_map.json": "["}, "special_tokens_map.json is not JSON"),
        ({"special_tokens_map.json": []}, "special_tokens_map.json must hold a JSON object"),
        ({"special_tokens_map.json": {"bos_token": 5}}, "special_tokens_map.json: bos_token must be a str, got 5"),
        ({"added_tokens.json": {"<|x|>": "y"}}, "added_tokens.json has id 'y', must be a whole number"),
        (
            {"added_tokens.json": {"<|x|>": 300}},
            "added_tokens.json gives '<|x|>' id 300, beside tokenizer.json it gets",
        ),
        ({"tokenizer_config.json": {"added_tokens_decoder": [1]}}, "added_tokens_decoder must hold a JSON object"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"1": 2}}}, "added_tokens_decoder: 1 must be a str, got 2"),
        ({"tokenizer_config.json": {"additional_special_tokens": "x"}}, "additional_special_tokens must be a list"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "a"}]}}, "each with a name of its own"),
        ({"tokenizer_config.json": {"chat_template": 5}}, "chat_template must be a str, got 5"),
        ({"additional_chat_templates/a.jinja": "{% if"}, "additional_chat_templates/a.jinja is not a valid template"),
    ],
)
def test_a_file_at_fault_is_named(tmp_path: Path, files: Files, message: str) -> None:
    path = write(tmp_path, files)
    with pytest.raises(TokenizerLoadError) as error:
        Tokenizer.from_directory(path)
    assert message in str(error.value)
