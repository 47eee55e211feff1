"""The items of a response's input, in OpenAI's form → the messages that a model's chat template takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from deepseek_triton.gateway.apis.wire.validation import Body, shown

Turn = dict[str, Any]


class TextContent(Body):
    """A part of a message that is text; `annotations` and `logprobs` come back from answers and say nothing new."""

    NOT_SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"prompt_cache_breakpoint": ()}

    type: Literal["input_text", "output_text", "reasoning_text", "summary_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    parsed: Any = None


class RefusalContent(Body):
    """A part of an answer that refuses."""

    type: Literal["refusal"]
    refusal: str


def _part_tag(value: Any) -> str:
    return "<refusal>" if isinstance(value, dict) and value.get("type") == "refusal" else "<text>"


def _content_tag(value: Any) -> str:
    return "<parts>" if isinstance(value, list) else "<text>"


ContentPart = Annotated[
    Annotated[TextContent, Tag("<text>")] | Annotated[RefusalContent, Tag("<refusal>")], Discriminator(_part_tag)
]
ItemContent = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[ContentPart], Field(min_length=1), Tag("<parts>")],
    Discriminator(_content_tag),
]
Status = Literal["in_progress", "completed", "incomplete"]


class MessageItem(Body):
    """A message, of the user or of an earlier answer."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: ItemContent
    id: str | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(Body):
    """A call of an earlier answer; `parsed_arguments` is the OpenAI client's own copy of `arguments`."""

    NOT_SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"async": (False,), "caller": (), "namespace": ()}

    type: Literal["function_call"]
    call_id: str
    name: str = Field(min_length=1)
    arguments: str
    id: str | None = None
    status: Status | None = None
    parsed_arguments: Any = None


class FunctionOutputItem(Body):
    """The result of a call."""

    NOT_SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"caller": ()}

    type: Literal["function_call_output"]
    call_id: str
    output: ItemContent
    id: str | None = None
    status: Status | None = None


class ReasoningItem(Body):
    """The reasoning of an earlier answer."""

    NOT_SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"encrypted_content": ()}

    type: Literal["reasoning"]
    summary: list[TextContent] | None = None
    content: list[TextContent] | None = None
    id: str | None = None
    status: Status | None = None


def _refuse_kind(value: Any) -> Any:
    raise ValueError(f"items of type {shown(value.get('type'))} are not supported")


_KINDS = ("message", "function_call", "function_call_output", "reasoning")


def _item_tag(value: Any) -> str:
    kind = value.get("type", "message") if isinstance(value, dict) else "message"
    return f"<{kind}>" if kind in _KINDS else "<other>"


InputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionOutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[MessageItem, BeforeValidator(_refuse_kind), Tag("<other>")],
    Discriminator(_item_tag),
]


def turns_of(items: Iterable[InputItem]) -> list[Turn]:
    """The template's messages. An answer's reasoning, text and calls, which are items of their own, become one."""
    turns: list[Turn] = []
    answer: Turn | None = None  # the assistant's message that further items belong to
    for item in items:
        if isinstance(item, FunctionOutputItem):
            answer = None
            turns.append({"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id})
        elif isinstance(item, MessageItem) and item.role != "assistant":
            answer = None
            turns.append({"role": "system" if item.role == "developer" else item.role, "content": _text(item.content)})
        else:
            if answer is None or (isinstance(item, MessageItem | ReasoningItem) and "tool_calls" in answer):
                answer = {"role": "assistant", "content": None}
                turns.append(answer)
            _add(answer, item)
    for turn in turns:
        if turn["content"] is None and "tool_calls" not in turn:
            turn["content"] = ""
    return turns


def answer_turns(output: list[dict[str, Any]]) -> list[Turn]:
    """The answer's own message. Its reasoning isn't told again, as chat templates have it."""
    texts = [part["text"] for item in output if item["type"] == "message" for part in item["content"]]
    calls = [
        {"id": item["call_id"], "type": "function", "function": {"name": item["name"], "arguments": item["arguments"]}}
        for item in output
        if item["type"] == "function_call"
    ]
    turn: Turn = {"role": "assistant", "content": "".join(texts) if texts or not calls else None}
    return [{**turn, "tool_calls": calls} if calls else turn]


def _add(answer: Turn, item: MessageItem | FunctionCallItem | ReasoningItem) -> None:
    if isinstance(item, FunctionCallItem):
        function = {"name": item.name, "arguments": item.arguments}
        answer.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
    elif isinstance(item, ReasoningItem):
        text = "".join(part.text for part in item.content or ())
        answer["reasoning_content"] = answer.get("reasoning_content", "") + text
    else:
        answer["content"] = (answer["content"] or "") + _text(item.content)


def _text(content: str | list[TextContent | RefusalContent]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.refusal if isinstance(part, RefusalContent) else part.text for part in content)
