"""Why a model can't do at a server what a command asks of it: the name, the kind of model, or the address is wrong.

Triton's own words for these are about inputs and transaction policies. What is told here is what to write instead.
"""

from __future__ import annotations

from typing import Literal

from deepseek_triton.clients.connect import ProtocolName
from deepseek_triton.clients.errors import ClientError, ServerUnavailable
from deepseek_triton.clients.nearest import name_hint
from deepseek_triton.clients.server.listener import explain_address
from deepseek_triton.clients.server.metadata import ModelMetadata, ask_metadata, ask_names
from deepseek_triton.ensemble.protocol import contract

Task = Literal["generate", "score"]
TIMEOUT_S = 3.0
MAX_ASKED = 50  # models whose metadata a hint asks for
# Task → inputs and outputs that a model must have for it.
TENSORS: dict[Task, tuple[frozenset[str], frozenset[str]]] = {
    "generate": (frozenset({contract.TEXT_INPUT.name}), frozenset({contract.TEXT_OUTPUT.name})),
    "score": (frozenset({contract.TEXT_INPUT.name}), frozenset({contract.LABEL.name, contract.PROBABILITIES.name})),
}
OTHER: dict[Task, str] = {
    "generate": "{0} is a scoring model, which generates no text; use: deepseek-triton score {0} TEXT",
    "score": "{0} generates text, it is no scoring model; use: deepseek-triton generate {0} TEXT",
}


def diagnose(protocol: ProtocolName, url: str, model: str, task: Task) -> str | None:
    """Why `model` can't do `task` at the server, in one line; None if it can, or the server doesn't tell."""
    try:
        metadata = ask_metadata(protocol, url, model, TIMEOUT_S)
    except ServerUnavailable:
        return explain_address(protocol, url)
    except ClientError:
        return None
    if metadata is None:
        return f"the server at {url} has no model {model!r}{_others(protocol, url, model)}"
    if task in tasks_of(metadata):
        return None
    base = model.rpartition("-")[0]  # the parts of a model are called NAME-tokenizer and so on
    if base and _metadata_or_none(protocol, url, base) is not None:
        return f"{model} is a part of {base}, which only {base} calls: ask {base}"
    if tasks_of(metadata):
        return OTHER[task].format(model)
    return f"{model} at {url} is none of this project's models: it doesn't have the tensors of one"


def tasks_of(metadata: ModelMetadata) -> list[Task]:
    """What the model can be asked for."""
    return [
        task for task, (inputs, outputs) in TENSORS.items() if inputs <= metadata.inputs and outputs <= metadata.outputs
    ]


def _others(protocol: ProtocolName, url: str, model: str) -> str:
    """What to ask instead, as far as the server tells which models it has."""
    known = ask_names(protocol, url, TIMEOUT_S)
    names = [
        name for name in known[:MAX_ASKED] if (found := _metadata_or_none(protocol, url, name)) and tasks_of(found)
    ]
    if not names:
        return "; check the name: `deepseek-triton list` shows those of a repository"
    return name_hint(model, names)


def _metadata_or_none(protocol: ProtocolName, url: str, model: str) -> ModelMetadata | None:
    try:
        return ask_metadata(protocol, url, model, TIMEOUT_S)
    except ClientError:
        return None
