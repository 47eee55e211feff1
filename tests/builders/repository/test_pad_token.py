"""A token that a training added beyond the model's rows: the checkpoint is accepted, a prompt with it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.ensemble.engine.admission import Admission, OptionError, RequestOptions
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from deepseek_triton.ensemble.sampling import SamplingParams
from deepseek_triton.ensemble.text.tokenizer import Tokenizer
from tests.support.checkpoints import make_tokenizer, write_tiny
from tests.support.fakes import FakeSink

VOCAB_SIZE = 260  # of the model and of its tokenizer, before [PAD]


def checkpoint(directory: Path, **config: object) -> Path:
    write_tiny(directory, vocab_size=VOCAB_SIZE, eos_token_id=VOCAB_SIZE - 1)
    make_tokenizer(directory, VOCAB_SIZE)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **config}), encoding="utf-8")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"pad_token": "[PAD]"}, {"additional_special_tokens": ["[PAD]", "<|image|>"]}])
def test_a_token_beyond_the_rows_is_accepted_and_its_use_refused(tmp_path: Path, more: dict[str, object]) -> None:
    build(BuildOptions(checkpoint(tmp_path / "checkpoint", **more), "m", tmp_path / "repository"))
    engine = tmp_path / "repository/m-engine/1"
    ids = Tokenizer.from_directory(engine).encode("a [PAD]").astype(np.int64)
    assert ids.max() == VOCAB_SIZE
    admission = Admission(engine, VOCAB_SIZE, (VOCAB_SIZE - 1,), EngineSettings())
    with pytest.raises(OptionError, match=r"the prompt holds '\[PAD\]', for which this model has no embedding"):
        admission.make_request(1, "r", ids, RequestOptions(SamplingParams()), FakeSink(), 0.0)
    guided = RequestOptions(SamplingParams(), guide_type="regex", guide="[a-z]+")
    assert admission.make_request(1, "r", ids[:1], guided, FakeSink(), 0.0).sequences[0].guide is not None


def test_a_beginning_beyond_the_rows_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint", bos_token="<b>", added_tokens_decoder={"260": {"content": "<b>"}})
    with pytest.raises(BuildError, match="the tokenizer has 261 tokens, the model 260; they don't belong together"):
        build(BuildOptions(source, "m", tmp_path / "repository"))
