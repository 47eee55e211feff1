"""The options of a scoring build alone: prompts and labels, batches and their queue."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.ensemble.protocol.ranges import MAX_INT32, MAX_UINT64
from deepseek_triton.ensemble.protocol.settings import Settings, SettingsError, setting, to_text
from deepseek_triton.ensemble.protocol.text_settings import MAX_INSTANCES
from deepseek_triton.ensemble.scoring.profile import PLACE, Normalisation, ScoringProfile, ScoringProfileError

# Triton's timer is late, however long the delay: by 97 to 121 us at the median of delays from 0.5 to 10 ms, by 130 to
# 232 us in the worst of a hundred on a quiet machine. config.pbtxt has a delay that is shorter by this much.
TIMER_LATE_US = 250


@dataclass(frozen=True)
class Batching(Settings):
    """The settings of Triton's dynamic batcher in front of a scoring engine.

    preferred_batch_sizes: a batch of one of these sizes doesn't wait for more requests.
    """

    max_batch_size: int = setting(16, "texts in one batch", lowest=1, highest=65536)
    preferred_batch_sizes: tuple[int, ...] = setting((), "sizes of batches that go at once, beside full ones", lowest=1)
    max_queue_delay_us: int = setting(
        2000,
        "longest time that a request waits for others to share a batch, in microseconds",
        lowest=0,
        highest=MAX_INT32,
    )
    queue_timeout_us: int = setting(
        0,
        "time in the queue after which a request is rejected, in microseconds; 0: never. With a limit of the queue, "
        "Triton 2.51 may leave a request that comes while the engine computes for half a second",
        lowest=0,
        highest=MAX_UINT64,
    )
    max_queue_size: int = setting(
        0,
        "requests that may wait; more are rejected; 0: no limit. Its price is that of queue_timeout_us",
        lowest=0,
        highest=MAX_INT32,
    )
    engine_instances: int = setting(
        1,
        "batches computed at the same time, each with a copy of the weights; on a CPU they share its cores",
        lowest=1,
        highest=MAX_INSTANCES,
    )

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except SettingsError as error:
            raise BuildError(str(error)) from error
        for size in self.preferred_batch_sizes:
            if not 1 <= size <= self.max_batch_size:
                raise BuildError(
                    f"preferred_batch_sizes has {size}, must be 1 to max_batch_size, {self.max_batch_size}"
                )

    @property
    def timer_us(self) -> int:
        """The delay in config.pbtxt with which a request waits no longer than `max_queue_delay_us`."""
        return max(0, self.max_queue_delay_us - TIMER_LATE_US)

    @property
    def preferred(self) -> list[int]:
        """The preferred sizes in config.pbtxt: these and a full batch."""
        return sorted({*self.preferred_batch_sizes, self.max_batch_size})


@dataclass(frozen=True)
class ScoringOptions:
    """How a scoring model makes prompts, and how it batches.

    max_pass_tokens is ScoringSettings', None the target's default; the others but the last three are ScoringProfile's.
    embeddings: the ensemble also gives the hidden state at a prompt's end. given: the settings that were asked for,
    those among them that are at their defaults too.
    """

    template: str = PLACE
    is_chat: bool = False
    labels: tuple[str, ...] = ()
    label_prefix: str | None = None
    normalisation: Normalisation = "mean"
    max_pass_tokens: int | None = None
    embeddings: bool = False
    batching: Batching = field(default_factory=Batching)
    given: frozenset[str] = field(default=frozenset(), compare=False)

    def profile(self, max_seq_len: int, *, is_plan: bool) -> ScoringProfile:
        """The profile that the model keeps; without a label_prefix, a space where no chat template ends the prompt.

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
                # Triton tells a plan how many tokens a request has, not how many each row has: rows are padded to that.
                max_request_tokens=max_seq_len if is_plan else 0,
            )
        except ScoringProfileError as error:
            raise BuildError(str(error)) from error

    def command_words(self) -> list[str]:
        """The options that ask for this again."""
        words = ["--chat"] if self.is_chat else []
        if self.embeddings:
            words.append("--embeddings")
        if self.template != PLACE:
            words += ["--template", self.template]
        if self.labels:
            words += ["--labels", ",".join(self.labels)]
        for owner, names in (
            (self, ("label_prefix", "normalisation", "max_pass_tokens")),
            (self.batching, tuple(self.batching.table())),
        ):
            defaults = {f.name: f.default for f in fields(owner)}
            for name in names:
                if (value := getattr(owner, name)) != defaults[name]:
                    words += ["--" + name.replace("_", "-"), to_text(value)]
        return words


def read_template(text_or_path: str) -> str:
    """Read a template from the command line: the text itself, or the file that it names without its last newline.

    Raises:
        BuildError: it has no place for the text, and no such file can be read.
    """
    if PLACE in text_or_path:
        return text_or_path
    try:
        # Editors end a file with a newline; in a prompt it would put the label on a new line.
        return Path(text_or_path).read_text(encoding="utf-8-sig").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BuildError(
            f"template {text_or_path!r} holds no {PLACE}, and is no file that can be read: {error}"
        ) from error
