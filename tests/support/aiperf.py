"""NVIDIA's load generator aiperf, unmodified, in an environment of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.support.real_tokenizers import smollm2_directory

PACKAGE = "aiperf==0.13.0"
RUN_LIMIT_S = 200.0
NUM_REQUESTS = 4
# A service that measures what no test reads is a process of seconds.
PROMPTS = "".join(json.dumps({"text": f"Tell me of {number} boats."}) + "\n" for number in range(NUM_REQUESTS))
FEW_SERVICES = ("--no-gpu-telemetry", "--no-server-metrics", "--workers-max=1", "--record-processor-service-count=1")


def measure(program: Path, directory: Path, *words: str, **options: object) -> dict[str, Any]:
    """Send four requests; the figures that aiperf reports.

    words: options as the command line has them. options: likewise, with underscores; their values are made texts.
    """
    tokenizer = shutil.copytree(smollm2_directory(), directory / "tokenizer")
    (tokenizer / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    # It prepares to make prompts up, though it is given some: from "random" it can without tokenizing a book first.
    prompts = directory / "prompts.jsonl"
    prompts.write_text(PROMPTS, encoding="utf-8")
    values = {
        "concurrency": 2, "request_count": NUM_REQUESTS, "ui": "none", "input_file": prompts,
        "custom_dataset_type": "single_turn", "prompt_corpus": "random", "tokenizer": tokenizer,
        "output_artifact_dir": directory / "out", **options,
    }  # fmt: skip
    named = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [str(program), "profile", *FEW_SERVICES, *words, *named]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_LIMIT_S)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (report,) = directory.rglob("profile_export_aiperf.json")
    figures: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return figures
