"""Which TensorRT is which, and what a plan must say about itself.

Two packages share one Python API: `tensorrt` (datacenter, from NVIDIA's containers) and `tensorrt-rtx`
(GeForce and RTX cards; builds without a GPU). This is the only module that imports either; builders and the
runner get the module as a value and never ask which one it is. It knows nothing of graphs, files or CUDA.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

# Profiles of a decoder's plan, in the order in which they are added.
PREFILL_PROFILE, DECODE_PROFILE = 0, 1
PLAN_FILE = "model.plan"
# What the builder adds to the graph's outputs, so that greedy decoding copies 8 bytes a row instead of a
# vocabulary.
BEST_ID, BEST_LOG_PROB = "best_id", "best_log_prob"
# Without a GPU each object that TensorRT makes logs this; it keeps nothing from being built.
NO_GPU_MESSAGE = "CUDA driver version is insufficient"

PARSER_CHATTER = "ModelImporter.cpp"  # prints the node at fault over several messages; the parser's errors name it
# What precedes and follows the reason in TensorRT's messages, in the order in which it is taken away.
NOISE = tuple(
    re.compile(pattern)
    for pattern in (
        r" *\(See http.*",
        r"^\w+\.cpp:\d+: (ERROR: )?",
        r"^\S+: Error Code \d+: [^(]*\((\[[^\]]*\] )?",
        r"\w+Exception: \S+:\d+: CHECK\(.*\) failed\. ",
        r" In \w+ at /.*",
    )
)


class TensorRTError(Exception):
    """TensorRT is missing, too old, or not the one that a plan was built with; one line."""


@dataclass(frozen=True)
class TensorRTDistribution:
    """One of the two packages: what to import, the lowest version that has what is used here, how to install it."""

    module: str
    minimum: tuple[int, int]
    install: str


DISTRIBUTIONS: dict[str, TensorRTDistribution] = {
    "tensorrt": TensorRTDistribution(
        "tensorrt", (10, 15), "pip install 'tensorrt>=10.15', or build in NVIDIA's Triton container"
    ),
    "tensorrt-rtx": TensorRTDistribution("tensorrt_rtx", (1, 7), "pip install 'tensorrt-rtx>=1.7'"),
}


@dataclass(frozen=True)
class PlanInfo:
    """What a decoder's plan was built with and for; kept in the manifest, checked before the plan is loaded.

    version: TensorRT's, exactly; a plan loads in no other. compute_capability: the GPU's, as "8.9".
    attention: "lengths" (true key/value lengths, lower-right causality) or "mask"; attention_is_fused:
    whether every attention has a kernel of its own. max_num_seqs, max_num_batched_tokens, max_seq_len: the largest that
    its profiles allow.
    """

    target: str
    version: str
    compute_capability: str
    attention: str
    attention_is_fused: bool
    max_num_seqs: int
    max_num_batched_tokens: int
    max_seq_len: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PlanInfo:
        """Read `to_dict`'s values back.

        Raises:
            TensorRTError: a field is missing or unknown.
        """
        if odd := sorted({field.name for field in fields(cls)} ^ set(values)):
            raise TensorRTError(f"the manifest's engine has missing or unknown fields {odd}; build the model again")
        return cls(**values)


def load_tensorrt(target: str) -> Any:
    """The Python module of `target`.

    Raises:
        TensorRTError: unknown target, not installed (with the command that installs it), or too old.
    """
    if target not in DISTRIBUTIONS:
        raise TensorRTError(f"target is {target!r}, must be one of {', '.join(DISTRIBUTIONS)}")
    distribution = DISTRIBUTIONS[target]
    try:
        api = importlib.import_module(distribution.module)
    except ModuleNotFoundError as error:
        raise TensorRTError(f"{error.name} is not installed; {distribution.install}") from error
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        raise TensorRTError(f"{distribution.module} can't be loaded: {reason}; {distribution.install}") from error
    found = tuple(int(part) for part in api.__version__.split(".")[:2])
    if found < distribution.minimum:
        lowest = ".".join(map(str, distribution.minimum))
        raise TensorRTError(
            f"{distribution.module} is {api.__version__}, {lowest} or later is needed; {distribution.install}"
        )
    return api


@dataclass
class Messages:
    """What TensorRT logged: errors and warnings, oldest first."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, severity: str, text: str) -> None:
        """Take one message in; anything milder than a warning is dropped."""
        if NO_GPU_MESSAGE in text:
            return
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(text)
        elif severity == "WARNING":
            self.warnings.append(text)

    def reason(self) -> str:
        """The first error on one line: the later ones only say what failed because of it."""
        causes = [text for text in self.errors if not text.startswith(PARSER_CHATTER)] or self.errors[-1:]
        return one_line(causes[0]) if causes else "TensorRT gave no reason"


def one_line(text: str) -> str:
    """TensorRT's message without line breaks, source locations and links."""
    text = " ".join(text.split())
    for pattern in NOISE:
        text = pattern.sub("", text)
    return text.strip(" .")


def make_logger(api: Any, messages: Messages) -> Any:
    """An `api.ILogger` that writes into `messages`."""

    def initialise(self: Any) -> None:
        api.ILogger.__init__(self)

    def log(_: Any, severity: Any, text: str) -> None:
        messages.add(severity.name, text)

    return type("Logger", (api.ILogger,), {"__init__": initialise, "log": log})()
