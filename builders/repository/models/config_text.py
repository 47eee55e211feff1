"""A ModelConfig → the text of config.pbtxt, with a comment for each block, and a digest by which edits are noticed.

It knows fields and comments, not files. Settings come first, then how requests are batched, then the tensors.
"""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from deepseek_triton.builders.scoring.options import TIMER_LATE_US
from deepseek_triton.ensemble.protocol.settings import GROUPS, EngineSettings, Setting
from deepseek_triton.ensemble.scoring.settings import ScoringSettings

HEADER = """\
# Written by `deepseek-triton build`. Change settings with `deepseek-triton configure` or with another build, not by
# hand: a build writes this file anew. The next line has the SHA-256 of what follows it; by it an edit is noticed.
"""
DIGEST = "# sha256: "
EDITED = "edited by hand"
WIDTH = 118
KINDS = {
    ModelInstanceGroup.KIND_CPU: "KIND_CPU is where Triton keeps the tensors and starts the process; it doesn't say "
    "where the model computes: an engine that runs on a GPU takes the GPU itself.",
    ModelInstanceGroup.KIND_GPU: "KIND_GPU: Triton's own tensorrt backend runs the plan on a GPU.",
}

# Field → what its block is, in the order of the file; a field that isn't here comes last, without a comment.
BLOCKS: Mapping[str, str] = {
    "name": "",
    "platform": "",
    "backend": "",
    "default_model_filename": "",
    "max_batch_size": "Prompts that Triton may hand over at once; an engine that generates forms its own batches.",
    "parameters": "",
    "instance_group": "Processes that run the model.",
    "dynamic_batching": "The queue: requests that wait become one batch; a limit, where one is set, refuses more.",
    "model_warmup": "Run once when the model is loaded, so that the first request isn't slower than the others.",
    "model_transaction_policy": "A request has any number of responses.",
    "ensemble_scheduling": "The models that a request goes through. A key is the model's tensor, its value the "
    "ensemble's; version -1 is the newest that is loaded.",
    "input": "What a request has; optional tensors may be left out.",
    "output": "What a response has.",
    "batch_input": "Where the rows of the requests of a batch begin and end.",
    "batch_output": "How the rows of a batch are shared out among its requests.",
}  # fmt: skip


def to_text(config: ModelConfig, *, is_edited: bool = False) -> str:
    """The text of a config.pbtxt file. is_edited: it holds what somebody wrote by hand, which the header says."""
    body = "".join(_blocks(config))
    return f"{HEADER}{DIGEST}{EDITED if is_edited else _digest(body)}\n{body}"


def is_edited(text: str) -> bool:
    """Whether somebody has changed the text of a config.pbtxt by hand; one without a digest can't tell."""
    head, found, rest = text.partition(DIGEST)
    digest, _, body = rest.partition("\n")
    return bool(found) and (head != HEADER or digest != _digest(body))


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:32]


def _blocks(config: ModelConfig) -> Iterator[str]:
    fields = {descriptor.name for descriptor, _ in config.ListFields()}
    order = [name for name in BLOCKS if name in fields] + sorted(fields - set(BLOCKS))
    for name in order:
        about = BLOCKS.get(name, "")
        if name == "instance_group":
            about = " ".join([about, *(KINDS[kind] for kind in {g.kind for g in config.instance_group} & set(KINDS))])
        if about:
            yield f"\n{_comment(about)}"
        yield from _parameters(config) if name == "parameters" else _field(config, name)


def _field(config: ModelConfig, name: str) -> Iterator[str]:
    """One field's text."""
    text = text_format.MessageToString(_only(config, name), as_utf8=True)
    yield _with_timer(text, config.dynamic_batching.max_queue_delay_microseconds)


def _parameters(config: ModelConfig) -> Iterator[str]:
    """The parameters in the order of their declaration, each group and each setting with its meaning."""
    is_scoring = "max_pass_tokens" in config.parameters
    known: dict[str, Setting] = ScoringSettings.table() if is_scoring else EngineSettings.table()
    names = sorted(
        (name for name in known if name in config.parameters), key=lambda name: GROUPS.index(known[name].group)
    )
    group = ""
    for name in [*names, *sorted(set(config.parameters) - set(known))]:
        part = ModelConfig()
        part.parameters[name].CopyFrom(config.parameters[name])
        if name in known:
            if known[name].group != group:
                group = known[name].group
                yield f"\n{_comment(f'{group}:')}"
            yield _comment(f"{name}: {known[name].help}.")
        yield text_format.MessageToString(part, as_utf8=True)


def _with_timer(text: str, delay_us: int) -> str:
    line = f"  max_queue_delay_microseconds: {delay_us}\n"
    if not delay_us or line not in text:
        return text
    late = f"  # {delay_us + TIMER_LATE_US} at most: Triton's timer is late by up to {TIMER_LATE_US}.\n"
    return text.replace(line, late + line)


def _only(config: ModelConfig, name: str) -> ModelConfig:
    part = ModelConfig()
    value: Any = getattr(config, name)
    if isinstance(value, str | int | bool):
        setattr(part, name, value)
    elif hasattr(value, "CopyFrom"):
        getattr(part, name).CopyFrom(value)
    else:
        getattr(part, name).MergeFrom(value)
    return part


def _comment(text: str) -> str:
    return "".join(f"# {line}\n" for line in textwrap.wrap(text, WIDTH, break_long_words=False))
