"""docs/extending.md's claim: a dense architecture is one entry in the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import UnsupportedError
from deepseek_triton.builders.fp8.forward.layer_session import runnable_opset
from deepseek_triton.builders.graph.decoder import build_graph
from deepseek_triton.ensemble.decoder.architectures import ARCHITECTURES, Architecture
from tests.support.checkpoints import load_reference, make_checkpoint

IDS = np.array([[5, 17, 300, 2, 44, 9]], np.int64)


def test_an_entry_in_the_table_is_read_built_and_computes_what_it_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    ort = pytest.importorskip("onnxruntime")
    path = make_checkpoint(tmp_path / "checkpoint", "qwen3")  # its mathematics: q/k norm, no biases
    with torch.no_grad():
        expected = load_reference(path)(torch.from_numpy(IDS)).logits[0, -1].numpy()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "toy"}))
    monkeypatch.setitem(ARCHITECTURES, "toy", Architecture(qk_norm=True, reads_attention_bias=False))

    checkpoint = open_checkpoint(path)
    assert checkpoint.spec.architecture == "toy"
    graph = build_graph(checkpoint.spec, checkpoint.read, tmp_path, max_seq_len=32, opset=runnable_opset())
    session = ort.InferenceSession(str(graph))
    feeds = {"input_ids": IDS, "start": np.zeros(1, np.int64), "num_tokens": np.array([IDS.shape[1]])}
    caches = {value.name: value.shape for value in session.get_inputs() if value.name.startswith("past_")}
    feeds |= {name: np.zeros((1, *shape[1:]), np.float32) for name, shape in caches.items()}
    np.testing.assert_allclose(session.run(["logits"], feeds)[0][0], expected, atol=1e-3)


def test_an_architecture_that_is_not_in_the_table_is_refused_by_name(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen3")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "toy"}))
    with pytest.raises(
        UnsupportedError,
        match="architecture 'toy' is not supported; supported: deepseek_v2, deepseek_v3, deepseek_v32, llama, qwen2, ",
    ):
        open_checkpoint(path)
