r"""How models write tool calls, as data, and which format a chat template asks for.

DeepSeek V3 and R1, one line for the section's frame and one call:
    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n{...}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>
DeepSeek V3.1:
    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜><｜tool▁calls▁end｜>
Hermes, which Qwen 2.5 and 3 write too:
    <tool_call>\n{"name": "NAME", "arguments": {...}}\n</tool_call>

The two of DeepSeek can't be mistaken for each other, so one format reads both, whichever the template shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from deepseek_triton.ensemble.text.tool_calls.match import JSON_NAME, NAME, SPACE, MatchStep, Maybe


@dataclass(frozen=True)
class Opening:
    """What precedes a call's arguments, its `{` included; or, without arguments, the whole call."""

    steps: tuple[MatchStep, ...]
    has_arguments: bool = True


@dataclass(frozen=True)
class ToolFormat:
    """One way to write calls. The first of `openings` that isn't ruled out decides."""

    name: str
    starts: tuple[str, ...]  # a call begins with one of them
    openings: tuple[Opening, ...]
    closing: tuple[str, ...]  # follows the arguments, in this order, with white space between; none must be there
    stops: tuple[str, ...]  # end arguments that were never closed, outside of their strings
    section_end: str | None = None  # after the last call
    whole: tuple[MatchStep, ...] = ()  # a call as one JSON object begins so, in whatever order its members come

    def __post_init__(self) -> None:
        if not self.starts or not self.openings:
            raise ValueError(f"tool format {self.name!r} must have starts and openings")
        for opening in self.openings:
            if opening.has_arguments and opening.steps[-1] != "{":
                raise ValueError(f"tool format {self.name!r}: an opening with arguments must end with '{{'")

    @property
    def markers(self) -> frozenset[str]:
        """Every marker's spelling: a tokenizer that has them as tokens must show them to the parser."""
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
    """A template with all of `present` and none of `absent` asks for this format."""

    format: ToolFormat
    present: tuple[str, ...]
    absent: tuple[str, ...] = ()


_SIGNS = (
    _Sign(DEEPSEEK, ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>")),
    # Qwen3-Coder and GLM put other things than a JSON object into the same tag.
    _Sign(HERMES, ("<tool_call>", "arguments"), absent=("<function=", "<arg_key>")),
)


def detect_format(chat_template: str) -> ToolFormat | None:
    """The format in which a chat template's source writes calls; None where it is none of these.

    The template decides, not the vocabulary: R1-Distill's writes DeepSeek's markers though no token spells them.
    """
    for sign in _SIGNS:
        if all(map(chat_template.__contains__, sign.present)) and not any(map(chat_template.__contains__, sign.absent)):
            return sign.format
    return None
