r"""Formats of tool calls as data tables, and the detection of a model's format from its chat template.

DeepSeek V3 and R1 (a section with one call):
    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n{...}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>
DeepSeek V3.1:
    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜><｜tool▁calls▁end｜>
Hermes, also Qwen 2.5 and Qwen 3:
    <tool_call>\n{"name": "NAME", "arguments": {...}}\n</tool_call>

The two DeepSeek formats are unambiguous, so one ToolFormat parses both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from deepseek_triton.ensemble.text.tool_calls.match import JSON_NAME, NAME, SPACE, MatchStep, Maybe


@dataclass(frozen=True)
class Opening:
    """The pattern of a call up to and including the `{` of its arguments; of the whole call if it has no arguments."""

    steps: tuple[MatchStep, ...]
    has_arguments: bool = True


@dataclass(frozen=True)
class ToolFormat:
    """One format of tool calls. The parser tries `openings` in order and takes the first that matches.

    starts: markers, with one of which each call begins.
    closing: literals that may follow the arguments, in this order, with white space between; each is optional.
    stops: markers that end unclosed arguments, unless they stand in a JSON string.
    section_end: the marker after the last call.
    whole: the beginning of a call that is one JSON object whose members may have any order.
    """

    name: str
    starts: tuple[str, ...]
    openings: tuple[Opening, ...]
    closing: tuple[str, ...]
    stops: tuple[str, ...]
    section_end: str | None = None
    whole: tuple[MatchStep, ...] = ()

    def __post_init__(self) -> None:
        if not self.starts or not self.openings:
            raise ValueError(f"tool format {self.name!r} must have starts and openings")
        for opening in self.openings:
            if opening.has_arguments and opening.steps[-1] != "{":
                raise ValueError(f"tool format {self.name!r}: an opening with arguments must end with '{{'")

    @property
    def markers(self) -> frozenset[str]:
        """The text of every marker. A tokenizer that has them as special tokens must not hide them from the parser."""
        literals = {step for opening in self.openings for step in opening.steps if isinstance(step, str)}
        found = {*self.starts, *self.stops, *literals, *filter(None, [self.section_end])}
        return frozenset(literal for literal in found if literal.startswith("<"))


_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
_BEGIN: tuple[MatchStep, ...] = (Maybe(_CALLS), SPACE, _CALL, SPACE)
_SEPARATOR: tuple[MatchStep, ...] = (SPACE, "<｜tool▁sep｜>", SPACE)
_V31_HEAD: tuple[MatchStep, ...] = (*_BEGIN, NAME, *_SEPARATOR)
_V3_HEAD: tuple[MatchStep, ...] = (*_BEGIN, "function", *_SEPARATOR, NAME, SPACE)
_FENCE: tuple[MatchStep, ...] = (Maybe("```json"), SPACE)
_NO_ARGUMENTS: tuple[MatchStep, ...] = (*_FENCE, Maybe("```"), SPACE, _CALL_END)
DEEPSEEK: Final = ToolFormat(
    name="deepseek",
    starts=(_CALLS, _CALL),
    openings=(
        Opening((*_V31_HEAD, *_FENCE, "{")),
        Opening((*_V31_HEAD, *_NO_ARGUMENTS), has_arguments=False),
        Opening((*_V3_HEAD, *_FENCE, "{")),
        Opening((*_V3_HEAD, *_NO_ARGUMENTS), has_arguments=False),
    ),
    closing=("```", _CALL_END),
    stops=(_CALL_END, _CALLS_END),
    section_end=_CALLS_END,
)

_NAME_MEMBER: tuple[MatchStep, ...] = ('"name"', SPACE, ":", SPACE, JSON_NAME, SPACE, ",", SPACE)
HERMES: Final = ToolFormat(
    name="hermes",
    starts=("<tool_call>",),
    openings=(Opening(("<tool_call>", SPACE, "{", SPACE, *_NAME_MEMBER, '"arguments"', SPACE, ":", SPACE, "{")),),
    closing=("}", "</tool_call>"),
    stops=("</tool_call>",),
    whole=("<tool_call>", SPACE, "{"),
)


@dataclass(frozen=True)
class _Sign:
    """A template whose source has all of `present` and none of `absent` uses this format."""

    format: ToolFormat
    present: tuple[str, ...]
    absent: tuple[str, ...] = ()


_SIGNS = (
    _Sign(DEEPSEEK, ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>")),
    # Qwen3-Coder and GLM use the same tag, but don't put a JSON object into it.
    _Sign(HERMES, ("<tool_call>", "arguments"), absent=("<function=", "<arg_key>")),
)


def detect_format(chat_template: str) -> ToolFormat | None:
    """Return the format of tool calls that a chat template's source uses; None if it uses none of the known formats.

    The template decides, not the vocabulary: R1-Distill writes DeepSeek's markers without having tokens for them.
    """
    for sign in _SIGNS:
        if all(map(chat_template.__contains__, sign.present)) and not any(map(chat_template.__contains__, sign.absent)):
            return sign.format
    return None
