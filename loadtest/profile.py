"""A load profile: arrivals, requests and service levels. TOML in, frozen dataclasses out.

It knows neither Locust nor a server. Every table of the file is one dataclass below; an unknown or missing key is an
error.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DIRECTORY = Path(__file__).parent / "profiles"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
MAX_STAGE_S = 7 * 24 * 3600.0

Arrivals = Literal["open", "closed"]
# openai: through the gateway, by OpenAI's API.
ProtocolName = Literal["grpc-stream", "grpc", "http-stream", "http", "openai-stream", "openai"]
PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)
Form = Literal["text", "chat", "score", "report"]
# What the forms without max_tokens may go over.
PROTOCOLS_OF: Mapping[Form, tuple[ProtocolName, ...]] = {"score": ("grpc", "http"), "report": ("grpc-stream",)}


class LoadProfileError(ValueError):
    """The profile is invalid; the message names the field, its value and what is allowed."""


@dataclass(frozen=True)
class Stage:
    """A period in which the level goes linearly from `start` to `end`: requests/s (open) or users (closed)."""

    seconds: float
    start: float
    end: float

    def __post_init__(self) -> None:
        """Check every field."""
        _check("seconds", self.seconds, 0.1, MAX_STAGE_S)
        for name in ("start", "end"):
            _check(name, getattr(self, name), 0, 1e6)


@dataclass(frozen=True)
class Length:
    """A lognormal distribution, clipped to `least` … `most`; with `sigma` 0 every value is the median."""

    median: float
    sigma: float
    least: float
    most: float

    def __post_init__(self) -> None:
        """Check every field."""
        _check("least", self.least, 0, 1e6)
        _check("most", self.most, max(self.least, 1e-3), 1e6)
        _check("median", self.median, max(self.least, 1e-3), self.most)
        _check("sigma", self.sigma, 0, 5)


@dataclass(frozen=True)
class Conversation:
    """A conversation of several turns. Each turn contains those before it, and is sent `think_s` after their answer."""

    turns: Length
    think_s: Length
    context_tokens: int  # a conversation ends before it exceeds this

    def __post_init__(self) -> None:
        """Check every field."""
        _check("turns.least", self.turns.least, 1, 1000)
        _check("context_tokens", self.context_tokens, 1, 2**31 - 1)


@dataclass(frozen=True)
class Requests:
    """The requests. Prompts are counted in words, because the load generator has no tokenizer."""

    # text: sent as text_input; chat: sent as messages, through the model's chat template; score: to a scoring model;
    # report: images, to an ensemble that reports on them
    form: Form
    prompt_words: Length
    answer_tokens: Length | None = None  # max_tokens of the request; an answer may end before; not for score and report
    temperature: float = 0.0
    conversation: Conversation | None = None
    texts: str = ""  # for score: a file with one text on each line, beside the profile; empty: sentences
    num_texts: int = 1  # for score: texts in each request
    images: str = ""  # for report: a folder of JPEG or PNG files, beside the profile

    def __post_init__(self) -> None:
        """Check every field."""
        _check_one_of("form", self.form, get_args(Form))
        _check("prompt_words.least", self.prompt_words.least, 1, 1e6)
        if (self.answer_tokens is None) != (self.form in PROTOCOLS_OF):
            told = f"answer_tokens is {'missing' if self.answer_tokens is None else f'not for form {self.form}'}"
            raise LoadProfileError(told)
        if bool(self.images) != (self.form == "report"):
            raise LoadProfileError(f"images go with form report, got {self.images!r} with form {self.form!r}")
        if self.answer_tokens is not None:
            _check("answer_tokens.least", self.answer_tokens.least, 1, 1e6)
        if self.texts and self.form != "score":
            raise LoadProfileError(f"texts needs form score, got {self.form!r}")
        _check("num_texts", self.num_texts, 1, 1000)
        if self.num_texts > 1 and self.form != "score":
            raise LoadProfileError(f"num_texts is {self.num_texts}, which needs form score, got {self.form!r}")
        _check("temperature", self.temperature, 0, 100)
        if self.conversation and self.form != "chat":
            raise LoadProfileError(f"conversation needs form chat, got {self.form!r}")


@dataclass(frozen=True)
class Levels:
    """Service levels: upper limits; None: no limit. A run that exceeds one fails."""

    p99_latency_s: float | None = None
    p99_first_token_s: float | None = None
    p99_inter_token_s: float | None = None
    max_error_ratio: float | None = None  # share of the counted requests, 0 … 1
    max_backlog: int | None = None  # requests that are due and have no first response, at any moment
    max_backlog_s: float | None = None  # seconds during which the backlog was never empty, around its peak

    def __post_init__(self) -> None:
        """Check every field."""
        for level in dataclasses.fields(self):
            if (limit := getattr(self, level.name)) is not None:
                _check(level.name, limit, 0, 1 if level.name == "max_error_ratio" else 1e6)


@dataclass(frozen=True)
class Basis:
    """The measurements that the levels were derived from, by `loadtest/basis.py`: the figures of valid runs."""

    WITHOUT_MARGIN: ClassVar[tuple[str, ...]] = ("max_error_ratio",)  # always 0, whatever is measured

    margin: float  # a level is `margin` times the median of the runs
    machine: str
    runs: Mapping[str, Sequence[float]]  # level → its figure in each run

    def __post_init__(self) -> None:
        """Check every field."""
        _check("margin", self.margin, 1, 100)
        levels = [each.name for each in dataclasses.fields(Levels) if each.name not in self.WITHOUT_MARGIN]
        if not isinstance(self.runs, Mapping):
            raise LoadProfileError(f"runs must be a table, got {self.runs!r}")
        for name, values in self.runs.items():
            _check_one_of("runs", name, tuple(levels))
            if not isinstance(values, list | tuple) or not values:
                raise LoadProfileError(f"runs.{name} must be an array with one number at least, got {values!r}")
            for value in values:
                _check(f"runs.{name}", value, 0, 1e6)

    def limit(self, name: str) -> float:
        """The level derived from the runs: `margin` times the median, rounded up to two digits."""
        exact = self.margin * statistics.median(self.runs[name])
        if not exact:
            return 0
        step = 10.0 ** (math.floor(math.log10(exact)) - 1)
        limit = float(f"{math.ceil(exact / step - 1e-9) * step:.2g}")
        return math.ceil(limit) if name == "max_backlog" else limit


@dataclass(frozen=True)
class LoadProfile:
    """A whole load profile. Times are seconds."""

    name: str
    description: str
    arrivals: Arrivals  # open: requests arrive independently of answers; closed: each user waits for the answer
    seed: int
    warmup_s: float  # before the first stage, at its first level; not counted in any figure
    timeout_s: float  # of one request
    stages: tuple[Stage, ...]
    requests: Requests
    protocols: Mapping[str, float]  # protocol → its share of the requests
    levels: Levels = field(default_factory=Levels)
    basis: Basis | None = None  # of the levels
    think_s: float = 0.0  # a closed user's pause between an answer and the next request

    def __post_init__(self) -> None:
        """Check every field."""
        _check_one_of("arrivals", self.arrivals, get_args(Arrivals))
        _check("warmup_s", self.warmup_s, 0, MAX_STAGE_S)
        _check("timeout_s", self.timeout_s, 0.1, 86400)
        _check("think_s", self.think_s, 0, 86400)
        if not self.stages or not any(stage.start or stage.end for stage in self.stages):
            raise LoadProfileError(f"stages must hold one with a level above 0, got {self.stages!r}")
        if not isinstance(self.protocols, Mapping) or not self.protocols:
            raise LoadProfileError(f"protocols must be a table with one at least, got {self.protocols!r}")
        for name, share in self.protocols.items():
            _check_one_of("protocols", name, PROTOCOLS)
            _check(f"protocols.{name}", share, 1e-6, 1e6)
        form, given = self.requests.form, ", ".join(self.protocols)
        allowed = PROTOCOLS_OF.get(form, PROTOCOLS)
        if not set(self.protocols) <= set(allowed):
            raise LoadProfileError(f"protocols of form {form} must be of {', '.join(allowed)}, got {given}")
        if self.arrivals == "open" and self.think_s:
            raise LoadProfileError(f"think_s is of closed users, got {self.think_s!r} with open arrivals")

    @property
    def duration_s(self) -> float:
        """Seconds during which requests are sent and counted, after the warm-up."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def needs_gateway(self) -> bool:
        """Whether requests go through the gateway."""
        return any(name.startswith("openai") for name in self.protocols)

    @property
    def load(self) -> LoadProfile:
        """The profile without its service levels: two runs with equal loads can be compared."""
        return dataclasses.replace(self, levels=Levels(), basis=None)

    def scaled(self, factor: float) -> LoadProfile:
        """The same profile at `factor` times the level; numbers of users are rounded when they are used."""
        _check("scale", factor, 1e-6, 1e6)
        stages = tuple(Stage(s.seconds, s.start * factor, s.end * factor) for s in self.stages)
        return dataclasses.replace(self, stages=stages)


def names() -> list[str]:
    """Names of the project's own profiles."""
    return sorted(path.stem for path in DIRECTORY.glob("*.toml"))


def load(name: str) -> LoadProfile:
    """Read a profile by its name or by the path of its .toml file. Raises `LoadProfileError`."""
    path = Path(name) if name.endswith(".toml") else DIRECTORY / f"{name}.toml"
    if not path.is_file():
        raise LoadProfileError(f"no profile {name!r}; there are {', '.join(names())}, or give a .toml file")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LoadProfileError(f"{path} is not TOML: {error}") from error
    try:
        return _with_files(from_dict({"name": path.stem} | table), path.parent)
    except LoadProfileError as error:
        raise LoadProfileError(f"{path}: {error}") from error


def _with_files(profile: LoadProfile, directory: Path) -> LoadProfile:
    """The profile with the places of its texts and images as whole paths; they must be there."""
    requests = profile.requests
    if requests.texts:
        texts = (directory / requests.texts).resolve()
        if not texts.is_file() or not texts.read_text(encoding="utf-8").strip():
            raise LoadProfileError(f"requests.texts must be a file with a text on each line, got {texts}")
        requests = dataclasses.replace(requests, texts=str(texts))
    if requests.images:
        images = (directory / requests.images).resolve()
        if not image_files(images):
            raise LoadProfileError(f"requests.images must be a folder of .jpg, .jpeg or .png files, got {images}")
        requests = dataclasses.replace(requests, images=str(images))
    return dataclasses.replace(profile, requests=requests)


def image_files(directory: Path) -> tuple[Path, ...]:
    """The images of a folder in the order of their names; (): there is none."""
    if not directory.is_dir():
        return ()
    return tuple(sorted(path for path in directory.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES))


def from_dict(table: Mapping[str, Any]) -> LoadProfile:
    """Make a profile of parsed TOML, or of what `dataclasses.asdict` returned. Raises `LoadProfileError`."""
    return _read(LoadProfile, table, "")


T = TypeVar("T")


def _read(kind: type[T], table: Any, where: str) -> T:
    if not isinstance(table, Mapping):
        raise LoadProfileError(f"{where or 'the profile'} must be a table, got {table!r}")
    prefix = f"{where}." if where else ""
    fields = {each.name: each for each in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in table:
        if name not in fields:
            raise LoadProfileError(f"unknown field {prefix}{name}; there are {', '.join(fields)}")
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, each in fields.items():
        if name in table:
            values[name] = _value(name, hints[name], table[name], prefix + name)
        elif each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            raise LoadProfileError(f"{prefix}{name} is missing")
    try:
        return kind(**values)
    except LoadProfileError as error:
        raise LoadProfileError(f"{prefix}{error}" if where else str(error)) from None


def _value(name: str, hint: Any, value: Any, where: str) -> Any:
    if name == "stages":
        if not isinstance(value, list | tuple):
            raise LoadProfileError(f"{where} must be an array of tables, got {value!r}")
        return tuple(_read(Stage, stage, f"{where}[{i}]") for i, stage in enumerate(value))
    tables = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    if tables:
        # Only an optional table may be None: a result's JSON has null there, TOML has no such value.
        return None if value is None and hint is not tables[0] else _read(tables[0], value, where)
    allowed = _SCALARS.get(str(hint))
    if allowed and (not isinstance(value, allowed) or isinstance(value, bool)):
        raise LoadProfileError(f"{where} must be {' or '.join(kind.__name__ for kind in allowed)}, got {value!r}")
    return value


_SCALARS: dict[str, tuple[type, ...]] = {
    str(float): (float, int),
    str(float | None): (float, int, type(None)),
    str(int): (int,),
    str(int | None): (int, type(None)),
    str(str): (str,),
}


def _check(name: str, value: float, lowest: float, highest: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
        raise LoadProfileError(f"{name} must be a number from {lowest:g} to {highest:g}, got {value!r}")


def _check_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise LoadProfileError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
