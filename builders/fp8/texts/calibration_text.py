"""Text for calibration: the user's file, or the built-in texts together with text that the model generates.

Text and a tokenizer enter; windows of token ids and the names of their sources leave.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.reader import Checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.calibrate import Calibration, CalibrationError, Report, calibrate
from deepseek_triton.builders.fp8.journal import BuildJournal

if TYPE_CHECKING:
    from deepseek_triton.ensemble.text.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data"
WINDOW_LEN = 512  # tokens
MAX_TOKENS = 16384  # of a user's file: more take longer and change the ranges little
GENERATED_TOKENS = 320  # per prompt
PROMPTS_PER_TEXT = 4
MIN_WINDOW_LEN = 16  # a shorter remainder of a text is left out


def load_or_calibrate(
    checkpoint: Checkpoint, ranges: Path | None, text: Path | None, report: Report, journal: BuildJournal | None = None
) -> Calibration:
    """Read activation ranges from `ranges` if that file exists; else measure them on `text` (None: the built-in set).

    Newly measured ranges are saved to `ranges`, if it is given. A `journal` keeps what was done, should the build be
    killed.
    """
    if ranges is not None and ranges.exists():
        return Calibration.load(ranges)
    journal = journal or BuildJournal()
    content = None if text is None else sha256(read_text(text).encode()).hexdigest()
    section = journal.section("texts", text=content)
    if (kept := section.load_windows("windows")) is None:
        windows, sources = calibration_windows(checkpoint.reopened(), text, report=report)
        section.save_windows("windows", windows, np.array(sources))
    else:
        windows, sources = kept[0], tuple(map(str, kept[1]))
    told = sha256(b"".join(np.asarray(window, np.int64).tobytes() for window in windows)).hexdigest()
    section = journal.section("calibrate", windows=told)
    calibration = calibrate(checkpoint.reopened(), windows, sources, report, section=section)
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
    """The windows to calibrate on, and the names of their sources.

    Args:
        checkpoint: its tokenizer is read, its tensors are not.
        text: a UTF-8 file. None: the built-in set and, if `is_generating` and the model fits in memory, text that the
            model generates.

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
        from deepseek_triton.builders.fp8.texts.generated_text import fits_in_memory, generate_windows

        if fits_in_memory(checkpoint.spec):
            windows += generate_windows(
                checkpoint.reopened(),
                _prompts(tokenizer),
                num_tokens=min(GENERATED_TOKENS, checkpoint.spec.max_position_embeddings // 2),
                report=report,
            )
            sources["generated"] = None
    return windows, tuple(sources)


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer.

    Raises:
        BuildError: the tokenizer is missing or damaged.
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
    """The text of a UTF-8 file.

    Raises:
        CalibrationError: the file can't be read, isn't UTF-8, or is empty.
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
    """The built-in conversations through the model's chat template, or as plain text if it has none."""
    from deepseek_triton.ensemble.text.errors import TextError

    chats = json.loads((DATA / "chat.json").read_text(encoding="utf-8"))
    ids = []
    for messages in chats:
        try:
            request: dict[str, Any] = {"messages": messages, "add_generation_prompt": False}
            ids.append(tokenizer.encode_messages(json.dumps(request)))
        except TextError:  # there is no template, or it refuses a system message
            ids.append(tokenizer.encode("\n\n".join(message["content"] for message in messages)))
    return ids


def _prompts(tokenizer: Tokenizer) -> list[NDArray[np.int32]]:
    """Prompts for the model to continue: paragraphs of each built-in text, and the conversations."""
    texts = [read_text(path).split("\n\n")[:PROMPTS_PER_TEXT] for path in sorted(DATA.glob("*.txt"))]
    return [tokenizer.encode(paragraph) for paragraphs in texts for paragraph in paragraphs] + _chats(tokenizer)


def _windows(ids: Sequence[int] | NDArray[Any]) -> list[NDArray[np.int64]]:
    array = np.asarray(ids, np.int64)
    windows = [array[start : start + WINDOW_LEN] for start in range(0, len(array), WINDOW_LEN)]
    # A text below the minimum is one window all the same; `calibrate` decides whether it has enough tokens.
    return [window for window in windows if len(window) >= MIN_WINDOW_LEN] or windows
