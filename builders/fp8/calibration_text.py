"""What calibration reads: a file of the user's, or the built-in set with text of the model's own.

What enters is text and a tokenizer, what leaves is windows of token ids and, in words, where they came from.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.reader import Checkpoint, open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.calibrate import Calibration, CalibrationError, Report, calibrate

if TYPE_CHECKING:
    from deepseek_triton.ensemble.text.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data"
WINDOW_LEN = 512  # tokens
MAX_TOKENS = 16384  # of a user's file; more would only take longer
GENERATED_TOKENS = 320  # continuing each prompt
PROMPTS_PER_TEXT = 4
MIN_WINDOW_LEN = 16  # a shorter rest is left out


def load_or_calibrate(checkpoint: Path, ranges: Path | None, text: Path | None, report: Report) -> Calibration:
    """Activation ranges: read from `ranges` where that file exists, else taken on `text` (None: the built-in set).

    Ranges just taken are saved to `ranges`, if it is given.
    """
    if ranges is not None and ranges.exists():
        return Calibration.load(ranges)
    windows, sources = calibration_windows(open_checkpoint(checkpoint), text, report=report)
    calibration = calibrate(open_checkpoint(checkpoint), windows, sources, report)
    if ranges is not None:
        calibration.save(ranges)
    return calibration


def calibration_windows(
    checkpoint: Checkpoint,
    text: Path | None = None,
    *,
    is_generating: bool = True,
    report: Report = lambda what, done, total: None,
) -> tuple[list[NDArray[np.int64]], tuple[str, ...]]:
    """The windows to calibrate on, and their sources.

    Args:
        checkpoint: for its tokenizer; its tensors are not read.
        text: a UTF-8 file; None: the built-in set and, if `is_generating` and the model fits in memory, its own text.

    Raises:
        CalibrationError: the file can't be read or is empty.
    """
    tokenizer = load_tokenizer(checkpoint)
    if text is not None:
        ids = tokenizer.encode(read_text(text))[:MAX_TOKENS]
        return _windows(ids), (text.name,)
    documents = [(path.name, tokenizer.encode(read_text(path))) for path in sorted(DATA.glob("*.txt"))]
    documents += [("chat", ids) for ids in _chats(tokenizer)]
    windows = [window for _, ids in documents for window in _windows(ids)]
    sources = dict.fromkeys(f"built-in {name}" for name, _ in documents)
    if is_generating:
        from deepseek_triton.builders.fp8.generated_text import fits_in_memory, generate_windows

        if fits_in_memory(checkpoint.spec):
            windows += generate_windows(
                open_checkpoint(checkpoint.path),
                _prompts(tokenizer),
                num_tokens=min(GENERATED_TOKENS, checkpoint.spec.max_position_embeddings // 2),
                report=report,
            )
            sources["generated"] = None
    return windows, tuple(sources)


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer.

    Raises:
        BuildError: it has none, or a damaged one.
    """
    from deepseek_triton.ensemble.text.errors import TokenizerLoadError
    from deepseek_triton.ensemble.text.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory(prefix="deepseek-triton-tokenizer-") as directory:
        checkpoint.write_tokenizer(Path(directory))
        try:
            return Tokenizer.from_directory(directory)
        except TokenizerLoadError as error:
            raise BuildError(str(error)) from error


def read_text(path: Path) -> str:
    """A UTF-8 file that says something.

    Raises:
        CalibrationError: it can't be read, isn't UTF-8, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 (byte {error.start})") from error
    if not text.strip():
        raise CalibrationError(f"{path} is empty: give a text of a page or more")
    return text


def _chats(tokenizer: Tokenizer) -> list[NDArray[np.int32]]:
    """The built-in conversations in the model's own template, or as plain text where it has none."""
    from deepseek_triton.ensemble.text.errors import TextError

    chats = json.loads((DATA / "chat.json").read_text(encoding="utf-8"))
    ids = []
    for messages in chats:
        try:
            request: dict[str, Any] = {"messages": messages, "add_generation_prompt": False}
            ids.append(tokenizer.encode_messages(json.dumps(request)))
        except TextError:  # no template, or one that refuses a system message
            ids.append(tokenizer.encode("\n\n".join(message["content"] for message in messages)))
    return ids


def _prompts(tokenizer: Tokenizer) -> list[NDArray[np.int32]]:
    """Beginnings for the model to continue: paragraphs of each built-in text, and the chats."""
    texts = [read_text(path).split("\n\n")[:PROMPTS_PER_TEXT] for path in sorted(DATA.glob("*.txt"))]
    return [tokenizer.encode(paragraph) for paragraphs in texts for paragraph in paragraphs] + _chats(tokenizer)


def _windows(ids: Sequence[int] | NDArray[Any]) -> list[NDArray[np.int64]]:
    array = np.asarray(ids, np.int64)
    windows = [array[start : start + WINDOW_LEN] for start in range(0, len(array), WINDOW_LEN)]
    # A short text is one window, however short: whether it is enough is for `calibrate` to say.
    return [window for window in windows if len(window) >= MIN_WINDOW_LEN] or windows
