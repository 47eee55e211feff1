"""The directory that a step of the lifecycle writes: there as a whole, or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.staging import staging_directory


def check_new(output: Path, source: Path) -> None:
    """Check that `output` can be made, and not among the files of the checkpoint `source`.

    Raises:
        BuildError: it can't.
    """
    if output.exists() or output.is_symlink():
        raise BuildError(f"{output} exists; give an --output that doesn't, or remove it")
    if source.is_dir() and output.resolve().parent == source.resolve():
        raise BuildError(f"{output} lies among the files of {source}; give an --output elsewhere")


@contextlib.contextmanager
def new_directory(output: Path, source: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """Make a directory beside `output` that becomes `output` at the end; what a killed run left is removed first.

    Raises:
        BuildError: something is there already, or the disk is at fault.
    """
    check_new(output, source)
    try:
        output.resolve().parent.mkdir(parents=True, exist_ok=True)
        with staging_directory(output, "checkpoint", say) as staging:
            try:
                yield staging
                staging.chmod(0o755)
                staging.rename(output)
            except OSError as error:
                if error.filename is not None and not Path(error.filename).is_relative_to(staging):
                    raise
                raise BuildError(
                    f"{output}: {error.strerror}; nothing was written; make room, or give another --output"
                ) from error
    except OSError as error:
        raise BuildError(f"{error.filename or output}: {error.strerror}; give another --output") from error
