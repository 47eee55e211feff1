"""Prune a checkpoint: choose what is kept, and write it as an ordinary Hugging Face checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from deepseek_triton.builders.checkpoint.files.hub_cache import model_name
from deepseek_triton.builders.checkpoint.reader import Checkpoint, open_checkpoint
from deepseek_triton.builders.fp8.calibrate import Report
from deepseek_triton.builders.fp8.texts.calibration_text import calibration_windows
from deepseek_triton.builders.lifecycle.output import new_directory
from deepseek_triton.builders.lifecycle.provenance import Provenance, provenance_of
from deepseek_triton.builders.lifecycle.pruning.by_text import choose_by_text
from deepseek_triton.builders.lifecycle.pruning.choose import Choice, Sizes, choose_by_norms
from deepseek_triton.builders.lifecycle.pruning.options import NEEDS_TEXT, PruneOptions
from deepseek_triton.builders.lifecycle.pruning.write_left import write_left
from deepseek_triton.ensemble.decoder.spec import ModelSpec


@dataclass(frozen=True)
class Pruned:
    """What was written, and the sizes of it and of its parent in elements."""

    output: Path
    spec: ModelSpec
    num_parameters: int
    parent_parameters: int

    @property
    def removed(self) -> float:
        """The share of the parent's parameters that is gone."""
        return 1 - self.num_parameters / self.parent_parameters


def prune(
    options: PruneOptions,
    report: Report = lambda what, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Pruned:
    """Write the pruned checkpoint of `options`; what fails or is killed leaves no output.

    Raises:
        BuildError: the checkpoint, the text or the output can't be used, or the ratio leaves nothing to remove or keep.
    """
    checkpoint = open_checkpoint(options.checkpoint)
    spec = checkpoint.spec
    sizes = Sizes.of(spec, options)
    sizes.check(spec)
    with new_directory(options.output, checkpoint.path, say) as directory, _work(directory) as work:
        choice, data = _choose(checkpoint, options, sizes, work, report)
        left = choice.kept.spec(spec)
        write_left(checkpoint, choice, directory, options.dtype, report)
        Provenance(
            step="prune",
            parent=model_name(checkpoint.path),
            parent_sha256=checkpoint.digest(),
            settings=options.settings(),
            data=data,
            origin=provenance_of(checkpoint.path) or None,
        ).save(directory)
        open_checkpoint(directory)  # every tensor is there in its shape, or this says which isn't
    return Pruned(options.output, left, left.num_parameters(), spec.num_parameters())


def _work(directory: Path) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix=".work-", dir=directory)


def _choose(
    checkpoint: Checkpoint, options: PruneOptions, sizes: Sizes, work: str, report: Report
) -> tuple[Choice, dict[str, str]]:
    """What is kept, and the SHA-256 of the text that it was measured on."""
    source = checkpoint.reopened()
    if options.method not in NEEDS_TEXT:
        return choose_by_norms(source, options, sizes, report), {}
    windows, _ = calibration_windows(checkpoint, options.text, is_generating=False)
    ids = sha256(b"".join(window.tobytes() for window in windows)).hexdigest()
    name = "built-in texts, tokens" if options.text is None else f"{options.text.name}, tokens"
    return choose_by_text(source, options, sizes, windows, Path(work), report), {name: ids}
