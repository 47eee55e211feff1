"""Strict bodies: what a client sends is understood as a whole or refused, with the name of the field that is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

MAX_SHOWN = 80  # characters of a wrong value in an error


class Body(BaseModel):
    """A JSON object whose fields are all known, and hold what they say: no text where a number belongs.

    NOT_SUPPORTED: fields of the API that this gateway can't follow → the values with which they ask for nothing. Such a
    field is refused by name with any other value than these and null.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    NOT_SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, values: Any) -> Any:
        if not isinstance(values, dict) or cls._is_of_another_kind(values):
            return values
        known = [info.alias or name for name, info in cls.model_fields.items()]
        kept = {}
        for name, value in values.items():
            if name in cls.NOT_SUPPORTED:
                if value is not None and not any(_equal(value, neutral) for neutral in cls.NOT_SUPPORTED[name]):
                    raise field_error(
                        name, f"{name} is not supported{_but(cls.NOT_SUPPORTED[name])}, got {shown(value)}"
                    )
            elif name in known:
                kept[name] = value
            else:
                near = difflib.get_close_matches(
                    name[:MAX_SHOWN], [*known, *cls.NOT_SUPPORTED], 1
                )  # a long one is slow
                hint = f"; did you mean {near[0]}?" if near else ""
                raise field_error(name, f"unknown field {shown(name)}{hint}")
        return kept

    @classmethod
    def _is_of_another_kind(cls, values: dict[str, Any]) -> bool:
        """Whether `type` or `role` says that this is something else: that is the fault then, not the fields of it."""
        kinds = ((name, cls.model_fields[name]) for name in ("type", "role") if name in cls.model_fields)
        return any(info.is_required() and values.get(name) not in get_args(info.annotation) for name, info in kinds)


def field_error(field: str, message: str) -> PydanticCustomError:
    """An error of one field, to be raised in a validator of the object that has it."""
    # The type carries the name: pydantic reports the object's own place.
    return PydanticCustomError("field", "{message}", {"message": message, "field": field})


def first_fault(faults: Sequence[Mapping[str, Any]]) -> tuple[str | None, str]:
    """The field that the first of pydantic's errors is about (None: the body as a whole), and the message for it."""
    fault = faults[0]
    place = _place(fault["loc"])
    if fault["type"] == "field":
        context = fault["ctx"]
        return ".".join(filter(None, [place, context["field"]])), _sentence(place, context["message"])
    if fault["type"] == "json_invalid":
        return None, f"the body must be JSON: {fault['ctx']['error']}"
    if not place:
        return None, "the body must be a JSON object, sent with the header Content-Type: application/json"
    if fault["type"] == "missing":
        return place, f"{place} is required"
    if fault["type"] == "value_error":
        return place, _sentence(place, str(fault["ctx"]["error"]))
    message = fault["msg"].replace("Input should be", "must be", 1)
    message = message[0].lower() + message[1:]
    return (
        place,
        f"{place} {message if message.startswith('must') else f'is wrong: {message}'}, got {shown(fault['input'])}",
    )


def shown(value: Any) -> str:
    """A client's value as an error shows it: as Python writes it, and not as long as the client likes."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _sentence(place: str, message: str) -> str:
    return f"{place}: {message}" if place else message


def _place(location: Sequence[str | int]) -> str:
    """pydantic's location in JavaScript's notation, without the names of a union's members."""
    place = ""
    for part in location[1:]:  # the first is "body"
        if isinstance(part, int):
            place += f"[{part}]"
        elif not part.startswith("<"):  # so are the members of unions called here
            place += f".{part}" if place else part
    return place


def _equal(value: Any, neutral: Any) -> bool:
    return type(value) is type(neutral) and bool(value == neutral)


def _but(neutral: tuple[Any, ...]) -> str:
    return f", except as {' or '.join(map(shown, neutral))}" if neutral else ""
