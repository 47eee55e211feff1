"""The image report's figures: accuracy and calibration of the findings, exactness of reports, and where the time goes.

    python -m benchmarks.image_report [--tiles 400] [--reports 20]

writes benchmarks/results/image-report.{json,png,md}. Its tiles are those of seeds that neither training nor
calibration saw.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import describe
from benchmarks.weights import smollm2
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.clients import GrpcClient
from deepseek_triton.clients.report import report_engine, report_inputs
from deepseek_triton.clients.score import Tensor
from deepseek_triton.ensemble.protocol.contract import IMAGE
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from deepseek_triton.examples.image_report.classifier import GRAPH_FILE, Classifier
from deepseek_triton.examples.image_report.contract import FINDER, LOGITS, PIXELS
from deepseek_triton.examples.image_report.findings import CALIBRATION_FILE, FINDINGS, Finding, TemperatureScaling
from deepseek_triton.examples.image_report.images.decode import pixels_of
from deepseek_triton.examples.image_report.report import ReportError, impressions, read_report
from deepseek_triton.examples.image_report.repository import DATA, add_report_models
from deepseek_triton.examples.image_report.tiles import Tile, make_tile

RESULTS = Path(__file__).parent / "results"
TEXT_MODEL = "smollm2"
REPORT = f"{TEXT_MODEL}-report"
TEST_SEED = 2_000_000
NUM_BINS = 10
GOAL_S = 8.0
Values = NDArray[np.float64]


def png(tile: Tile) -> bytes:
    """The tile as a file."""
    buffer = io.BytesIO()
    tile.image.save(buffer, "PNG")
    return buffer.getvalue()


def bins(probabilities: Values, truths: NDArray[np.bool_]) -> list[dict[str, float]]:
    """Equal bins of the probability: how many findings, their mean probability, and the share that is there."""
    index = np.minimum((probabilities * NUM_BINS).astype(int), NUM_BINS - 1)
    return [
        {
            "findings": int((index == one).sum()),
            "mean_probability": round(float(probabilities[index == one].mean()), 4),
            "share_present": round(float(truths[index == one].mean()), 4),
        }
        for one in range(NUM_BINS)
        if (index == one).any()
    ]


def calibration_error(rows: Sequence[dict[str, float]]) -> float:
    """The expected calibration error over `bins`."""
    total = sum(row["findings"] for row in rows)
    return round(sum(row["findings"] * abs(row["mean_probability"] - row["share_present"]) for row in rows) / total, 4)


def judge_classifier(tiles: Sequence[Tile]) -> dict[str, Any]:
    """Accuracy of each finding, how it is calibrated, and how often it is uncertain."""
    scaling = TemperatureScaling.load(DATA / CALIBRATION_FILE)
    classifier = Classifier(DATA / GRAPH_FILE, 2)
    logits = np.concatenate([classifier.logits(pixels_of(png(tile))[None]) for tile in tiles]).astype(np.float64)
    truths = np.array([tile.truths for tile in tiles])
    before, after = (1 / (1 + np.exp(-logits / t)) for t in (1.0, np.array(scaling.temperatures)))
    certain = np.maximum(after, 1 - after) >= scaling.certain_from
    is_right = (after > 0.5) == truths
    curves = {"before": bins(before.ravel(), truths.ravel()), "after": bins(after.ravel(), truths.ravel())}
    return {
        "tiles": len(tiles),
        "accuracy": {name: round(float(share), 4) for name, share in zip(FINDINGS, is_right.mean(axis=0), strict=True)},
        "accuracy_of_majority": {
            name: round(float(max(share, 1 - share)), 4)
            for name, share in zip(FINDINGS, truths.mean(axis=0), strict=True)
        },
        "share_uncertain": round(float(1 - certain.mean()), 4),
        "accuracy_where_certain": round(float(is_right[certain].mean()), 4),
        "expected_calibration_error": {when: calibration_error(rows) for when, rows in curves.items()},
        "curves": curves,
    }


def expected_findings(image: bytes) -> tuple[Finding, ...]:
    """What the classifier says of an image, computed here."""
    logits = Classifier(DATA / GRAPH_FILE).logits(pixels_of(image)[None])[0]
    return TemperatureScaling.load(DATA / CALIBRATION_FILE).findings(logits.tolist())


def judge_reports(url: str, images: Sequence[bytes]) -> dict[str, Any]:
    """Reports through the ensemble: the share that states exactly the findings, and the seconds of each part."""
    rows: list[dict[str, float]] = []
    exact = 0
    with GrpcClient(url, REPORT) as client:
        client.engine = report_engine(REPORT)
        for image in images:
            begin = time.perf_counter()
            first, text, chunk = 0.0, "", None
            for chunk in client.stream_tensors(report_inputs(image)):
                first = first or time.perf_counter()
                text += chunk.text
            end = time.perf_counter()
            try:
                said, expected = read_report(text), expected_findings(image)
                exact += said.findings == expected and said.impression in impressions(expected)
            except ReportError as error:
                print(error, file=sys.stderr)
            assert chunk is not None
            parts = part_seconds(client, image)
            rows.append(
                {
                    **parts,
                    "prompt_s": first - begin - sum(parts.values()),
                    "tokens_s": end - first,
                    "whole_s": end - begin,
                    "prompt_tokens": chunk.num_input_tokens,
                    "new_tokens": chunk.num_output_tokens,
                }
            )
    return {
        "reports": len(rows),
        "share_exact": exact / len(rows),
        "median": {name: round(float(np.median([row[name] for row in rows])), 4) for name in rows[0]},
        "slowest_whole_s": round(max(row["whole_s"] for row in rows), 3),
        "goal_s": GOAL_S,
    }


def part_seconds(client: GrpcClient, image: bytes) -> dict[str, float]:
    """Seconds of the models before the text model, each called alone."""
    times = [time.perf_counter()]
    pixels = client.infer(f"{REPORT}-preprocessor", {IMAGE: Tensor((1, 1), (image,))}, (PIXELS,))
    times.append(time.perf_counter())
    logits = client.infer(f"{REPORT}-resnet", {PIXELS: pixels[PIXELS.name]}, (LOGITS,))
    times.append(time.perf_counter())
    client.infer(f"{REPORT}-findings", {LOGITS: logits[LOGITS.name]}, FINDER.outputs)
    times.append(time.perf_counter())
    names = ("preprocessor_s", "resnet_s", "findings_s")
    return {name: end - begin for name, begin, end in zip(names, times, times[1:], strict=False)}


def plot(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw the calibration before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for when, rows in curves.items():
        axes.plot(
            [row["mean_probability"] for row in rows], [row["share_present"] for row in rows], marker="o", label=when
        )
    axes.set(xlabel="probability that is stated", ylabel="share that is there", title="Findings on synthetic tiles")
    axes.legend(title="temperature scaling")
    figure.savefig(path, dpi=110, bbox_inches="tight")


def page(result: dict[str, Any]) -> str:
    """The table in Markdown."""
    found, reports, machine = result["classifier"], result["reports"], result["machine"]
    error, median = found["expected_calibration_error"], reports["median"]
    rows = [
        f"| {name} | {share:.3f} | {found['accuracy_of_majority'][name]:.3f} |"
        for name, share in found["accuracy"].items()
    ]
    return "\n".join(
        [
            "# Image to report",
            "",
            "Synthetic tiles, no medical device. Measured by `python -m benchmarks.image_report` on"
            f" {found['tiles']} tiles"
            f" and {reports['reports']} reports; {machine['processor']}, {machine['cores']} cores.",
            "",
            "| finding | accuracy | always the commoner answer |",
            "|---|---|---|",
            *rows,
            "",
            f"- Expected calibration error: {error['before']:.4f} before temperature scaling,"
            f" {error['after']:.4f} after.",
            f"- {found['share_uncertain']:.1%} of the findings are stated as uncertain; of the others"
            f" {found['accuracy_where_certain']:.1%} are right.",
            f"- Reports that state exactly the classifier's findings: {reports['share_exact']:.3f}.",
            f"- End to end: {median['whole_s']:.2f} s in the median, {reports['slowest_whole_s']:.2f} s at most"
            f" (goal: {reports['goal_s']:g} s).",
            "",
            "| part | seconds (median) |",
            "|---|---|",
            f"| image → pixels | {median['preprocessor_s']:.3f} |",
            f"| ResNet | {median['resnet_s']:.3f} |",
            f"| findings, prompt, schema | {median['findings_s']:.3f} |",
            f"| text model: schema and prompt ({median['prompt_tokens']:.0f} tokens) | {median['prompt_s']:.3f} |",
            f"| text model: {median['new_tokens']:.0f} new tokens | {median['tokens_s']:.3f} |",
            "",
            "![Calibration](image-report.png)",
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; returns the exit status."""
    parser = argparse.ArgumentParser(description="Measure the image report.")
    parser.add_argument("--tiles", type=int, default=400, help="tiles for the classifier (default: %(default)s)")
    parser.add_argument("--reports", type=int, default=20, help="reports of the ensemble (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="the directory that is written (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    tiles = [make_tile(TEST_SEED + seed) for seed in range(options.tiles)]
    classifier = judge_classifier(tiles)
    with tempfile.TemporaryDirectory() as directory:
        repository = Path(directory) / "models"
        build(BuildOptions(smollm2(), TEXT_MODEL, repository, max_seq_len=1024, precision="stored"))
        add_report_models(repository, TEXT_MODEL)
        with TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as server:
            reports = judge_reports(server.grpc_url, [png(tile) for tile in tiles[: options.reports]])
    result = {"machine": describe(), "classifier": classifier, "reports": reports}
    (options.out / "image-report.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (options.out / "image-report.md").write_text(page(result), encoding="utf-8")
    plot(classifier["curves"], options.out / "image-report.png")
    print(page(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
