"""Fitting: labelled examples are scored by a server of its own, and the calibration is written into the repository."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deepseek_triton.builders.repository.check import require_sound
from deepseek_triton.builders.repository.options import Report
from deepseek_triton.builders.scoring.fit import (
    CONTENT_FREE,
    Example,
    FitError,
    Method,
    ScoredTexts,
    fit,
    read_examples,
    read_profile,
    write_calibration,
)
from deepseek_triton.builders.tune.repository import read_configs
from deepseek_triton.clients.base import BaseClient
from deepseek_triton.clients.errors import RequestRejected
from deepseek_triton.clients.features import Features, read_features
from deepseek_triton.clients.grpc import GrpcClient
from deepseek_triton.ensemble.scoring.calibration import ProbabilityCalibration, label_scores
from deepseek_triton.ensemble.scoring.profile import ScoringProfile
from deepseek_triton.ensemble.server.tritonserver import TritonServer

CHUNK = 8  # texts in a request, where the engine's batches have room for so many


def fit_model(
    repository: Path, name: str, examples_path: Path, method: Method, report: Report
) -> tuple[ProbabilityCalibration, Path]:
    """Fit scoring model `name`, and write the calibration; returns it and its file.

    Raises:
        BuildError, ServerError, ClientError: with one line.
    """
    require_sound(repository)
    profile = read_profile(repository, name)
    examples = read_examples(examples_path, profile.labels)
    with (
        TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0, models=[name]) as server,
        GrpcClient(server.grpc_url, name) as client,
    ):
        most = read_configs(repository, name)[name].max_batch_size
        # A plan's requests of several texts have a limit of their own.
        chunk = 1 if profile.max_request_tokens else min(CHUNK, most)
        calibration = fit_on(client, profile, method, examples, report, chunk=chunk)
    return calibration, write_calibration(repository, name, calibration)


def fit_on(
    client: BaseClient,
    profile: ScoringProfile,
    method: Method,
    examples: list[Example],
    report: Report = lambda what, done, total: None,
    *,
    chunk: int = CHUNK,
) -> ProbabilityCalibration:
    """Ask the server behind `client` about every example, and fit."""
    prior = measure(client, profile, list(CONTENT_FREE), chunk=chunk).scores if method == "contextual" else None
    measured = measure(client, profile, [example.text for example in examples], report, chunk=chunk)
    truth = np.array([profile.labels.index(example.label) for example in examples])
    return fit(method, profile.labels, profile.normalisation, measured, truth, prior)


def measure(
    client: BaseClient,
    profile: ScoringProfile,
    texts: list[str],
    report: Report = lambda what, done, total: None,
    *,
    chunk: int = CHUNK,
) -> ScoredTexts:
    """Scores and hidden states of `texts`, `chunk` in a request.

    Raises:
        FitError: the server refuses some, for their length say; names which.
    """
    features: list[Features] = []
    for start in range(0, len(texts), chunk):
        asked = texts[start : start + chunk]
        try:
            features += read_features(client, asked)
        except RequestRejected as error:
            which = f"examples {start + 1} to {start + len(asked)}, of which the first begins {asked[0][:30]!r}"
            raise FitError(f"{which}: {error}") from error
        report("examples", len(features), len(texts))
    scores = [
        label_scores(np.array(own.log_probs), np.array(own.target_labels), len(profile.labels), profile.normalisation)[
            1
        ]
        for own in features
    ]
    return ScoredTexts(np.stack(scores), np.array([own.hidden for own in features]))
