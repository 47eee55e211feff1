"""Write a file completely or not at all."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any


def write_atomically(path: Path, data: Any, error_type: type[Exception]) -> None:
    """Write `data`, a buffer of bytes, to `path`; a failure leaves what was there before.

    Raises:
        error_type: there is no room, or no right to write there.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}-", dir=path.parent, delete=False) as stream:
            temporary = Path(stream.name)
            stream.write(data)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise error_type(f"{path}: {error.strerror}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
