from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deepseek_triton.examples.image_report.classifier import GRAPH_FILE, Classifier
from deepseek_triton.examples.image_report.findings import CALIBRATION_FILE, FINDINGS, TemperatureScaling
from deepseek_triton.examples.image_report.training.export import export
from deepseek_triton.examples.image_report.training.resnet import ResNet
from deepseek_triton.examples.image_report.training.train import fit_temperatures, logits_of, main

pytestmark = pytest.mark.slow


def test_the_graph_computes_what_the_module_computes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ResNet()
    pixels = torch.rand(3, 3, 128, 128)
    for _ in range(3):  # running means and variances that aren't those of a new layer
        model(pixels)
    export(model.eval(), tmp_path / GRAPH_FILE)
    graph = Classifier(tmp_path / GRAPH_FILE)
    for batch in (pixels, pixels[:1]):
        assert graph.logits(batch.numpy()) == pytest.approx(logits_of(model, batch.numpy()), abs=1e-4)


def test_the_temperature_undoes_what_made_logits_too_certain() -> None:
    random = np.random.default_rng(0)
    honest = random.normal(0, 2, (5_000, len(FINDINGS)))
    truths = random.random(honest.shape) < 1 / (1 + np.exp(-honest))
    factors = np.array([0.5, 1.0, 2.0, 3.0, 4.0])
    assert fit_temperatures(honest * factors, truths) == pytest.approx(tuple(factors), rel=0.12)


def test_training_writes_what_is_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tiles", "8", "--calibration-tiles", "4", "--epochs", "1", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {GRAPH_FILE, CALIBRATION_FILE}
    assert Classifier(tmp_path / GRAPH_FILE).logits(np.zeros((1, 3, 128, 128), np.float32)).shape == (1, 5)
    assert len(TemperatureScaling.load(tmp_path / CALIBRATION_FILE).temperatures) == 5
    assert "accuracy" in capsys.readouterr().out
