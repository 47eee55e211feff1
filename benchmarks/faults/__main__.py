"""Faults and strangers, measured on the demo model: `python -m benchmarks.faults REPOSITORY`.

Writes benchmarks/results/faults.json. The part `disk` needs the right to mount a tmpfs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults import crafted
from benchmarks.faults.fuzz import fuzz
from benchmarks.faults.giant import giants
from benchmarks.faults.load import mixed_load
from benchmarks.faults.served import Served
from benchmarks.faults.strikes import full_disk, strike_all
from deepseek_triton.ensemble.processes.machine import describe

RESULTS = Path(__file__).parents[1] / "results" / "faults.json"
PARTS = ("strikes", "fuzz", "crafted", "load", "giant", "disk")


def main() -> int:
    """Run the parts and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repository", type=Path, help="model repository with the demo model")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--requests", type=int, default=5000, help="fuzzed requests over HTTP, and over gRPC")
    parser.add_argument("--seed", type=int, default=0, help="another one draws other requests")
    parser.add_argument("--minutes", type=float, default=10.0, help="of mixed load")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    results["machine"] = {**describe(), "load_average": os.getloadavg()}
    parts: dict[str, Callable[[Served], Any]] = {
        "strikes": strike_all,
        "fuzz": lambda served: fuzz(served, arguments.requests, arguments.seed),
        "crafted": lambda served: fuzz(
            served, arguments.requests, arguments.seed, crafted.send_http, crafted.send_grpc
        ),
        "load": lambda served: mixed_load(served, arguments.minutes),
        "giant": giants,
    }
    with tempfile.TemporaryDirectory() as directory:
        for name in arguments.parts:
            if name == "disk":
                results[name] = full_disk(arguments.repository)
            else:
                with Served(arguments.repository, Path(directory) / f"{name}.log") as served:
                    results[name] = {"load_s": round(served.load_s, 1), "found": parts[name](served)}
            print(json.dumps({name: results[name]}, indent=1), flush=True)
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
