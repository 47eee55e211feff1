"""What a scoring build is asked for beyond any build: prompts and labels, batches and their queue."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.ensemble.scoring.profile import PLACE, Normalisation, ScoringProfile, ScoringProfileError

# Triton's timer rings late: by 97 to 121 us at the median of delays from 0.5 to 10 ms, by 130 to 232 us in the worst
# of a hundred on a quiet machine, however long the delay. config.pbtxt asks for so much less than was promised.
TIMER_LATE_US = 250


@dataclass(frozen=True)
class Batching:
    """Triton's dynamic batcher in front of a stateless engine.

    max_batch_size: texts in one batch. preferred_batch_sizes: a batch of one of these goes at once. max_queue_delay_us:
    the longest that a smaller one waits for company. queue_timeout_us: a request that waited so long is rejected; 0:
    never. max_queue_size: requests beyond so many waiting are rejected; 0: none. engine_instances: batches computed at
    once, each by a copy of the weights; on a CPU they share out the cores.
    """

    max_batch_size: int = 16
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_us: int = 2000
    queue_timeout_us: int = 30_000_000
    max_queue_size: int = 1024
    engine_instances: int = 1

    def __post_init__(self) -> None:
        for name, lowest in (
            ("max_batch_size", 1),
            ("max_queue_delay_us", 0),
            ("queue_timeout_us", 0),
            ("max_queue_size", 0),
            ("engine_instances", 1),
        ):
            if getattr(self, name) < lowest:
                raise BuildError(f"{name} is {getattr(self, name)}, must be at least {lowest}")
        for size in self.preferred_batch_sizes:
            if not 1 <= size <= self.max_batch_size:
                raise BuildError(
                    f"preferred_batch_sizes has {size}, must be 1 to max_batch_size, {self.max_batch_size}"
                )

    @property
    def timer_us(self) -> int:
        """What config.pbtxt says, so that a request waits no longer than `max_queue_delay_us`."""
        return max(0, self.max_queue_delay_us - TIMER_LATE_US)

    @property
    def preferred(self) -> list[int]:
        """What config.pbtxt says: a full batch goes at once, whatever else does."""
        return sorted({*self.preferred_batch_sizes, self.max_batch_size})


@dataclass(frozen=True)
class ScoringOptions:
    """How a scoring model makes prompts, and how it batches; the fields but `batching` are ScoringProfile's."""

    template: str = PLACE
    is_chat: bool = False
    labels: tuple[str, ...] = ()
    label_prefix: str | None = None
    normalisation: Normalisation = "mean"
    max_pass_tokens: int = 512
    batching: Batching = field(default_factory=Batching)

    def profile(self, max_seq_len: int, *, is_plan: bool) -> ScoringProfile:
        """What the model keeps; without a label_prefix, a space where no chat template ends the prompt.

        Raises:
            BuildError: template or labels are at fault.
        """
        prefix = ("" if self.is_chat else " ") if self.label_prefix is None else self.label_prefix
        try:
            return ScoringProfile(
                template=self.template,
                is_chat=self.is_chat,
                labels=self.labels,
                label_prefix=prefix,
                normalisation=self.normalisation,
                max_seq_len=max_seq_len,
                # Triton tells a plan how many tokens a request has, not how many each of its rows: it pads to that.
                max_request_tokens=max_seq_len if is_plan else 0,
            )
        except ScoringProfileError as error:
            raise BuildError(str(error)) from error

    def command_words(self) -> list[str]:
        """The options that ask for this again."""
        words = ["--chat"] if self.is_chat else []
        if self.template != PLACE:
            words += ["--template", self.template]
        if self.labels:
            words += ["--labels", ",".join(self.labels)]
        if self.batching.preferred_batch_sizes:
            words += ["--preferred-batch-sizes", ",".join(map(str, self.batching.preferred_batch_sizes))]
        for owner, names in (
            (self, ("label_prefix", "normalisation", "max_pass_tokens")),
            (
                self.batching,
                ("max_batch_size", "max_queue_delay_us", "queue_timeout_us", "max_queue_size", "engine_instances"),
            ),
        ):
            defaults = {f.name: f.default for f in fields(owner)}
            for name in names:
                if (value := getattr(owner, name)) != defaults[name]:
                    words += ["--" + name.replace("_", "-"), str(value)]
        return words


def read_template(text_or_path: str) -> str:
    """A template from the command line: the text itself, or the file that it names, without the newline at its end.

    Raises:
        BuildError: it has no place for the text, and no such file can be read.
    """
    if PLACE in text_or_path:
        return text_or_path
    try:
        # Editors end a file so; a prompt that ended so would have its label begin a line.
        return Path(text_or_path).read_text(encoding="utf-8-sig").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BuildError(
            f"template {text_or_path!r} holds no {PLACE}, and is no file that can be read: {error}"
        ) from error
