"""A real tritonserver with a tiny model that reasons and knows tools; its answers are nonsense, unless guided."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.conftest import serve
from tests.support.checkpoints import make_tokenizer, write_tiny
from tests.support.gateway import FakeBackend, client_of

THINKER = "thinker"
# As Qwen 3's: tools are told in the prompt, `enable_thinking` switches the reasoning off.
TEMPLATE = (
    "{% for tool in tools or [] %}<tools>{{ tool | tojson }}</tools>\n{% endfor %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments }}}\n</tool_call>'
    "{% endfor %}\n{% endfor %}assistant: "
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>{% endif %}"
)
MAX_SEQ_LEN = 8192  # so long that a whole answer takes seconds


def write_thinker(directory: Path) -> Path:
    """A checkpoint with a token for each byte, <think> and </think>."""
    vocab_size = 320
    make_tokenizer(directory, vocab_size)
    path = directory / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    for unused, name in (("<|256|>", "<think>"), ("<|257|>", "</think>")):
        text = text.replace(json.dumps(unused), json.dumps(name))
    tokenizer = json.loads(text)
    like = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] += [
        {**like, "id": tokenizer["model"]["vocab"][name], "content": name, "special": False}
        for name in ("<think>", "</think>")
    ]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "chat_template": TEMPLATE}), encoding="utf-8")
    return write_tiny(
        directory,
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_SEQ_LEN,
        eos_token_id=vocab_size - 1,
    )


@pytest.fixture(scope="package")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """The server."""
    from deepseek_triton.builders.repository.build import build
    from deepseek_triton.builders.repository.options import BuildOptions

    directory = tmp_path_factory.mktemp("thinker")
    checkpoint = write_thinker(directory / "checkpoint")
    build(BuildOptions(checkpoint, THINKER, directory / "models", max_seq_len=MAX_SEQ_LEN))
    yield from serve(directory / "models", directory)


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture(scope="module")
def client(backend: FakeBackend) -> Iterator[openai.OpenAI]:
    with client_of(backend) as client:
        yield client
