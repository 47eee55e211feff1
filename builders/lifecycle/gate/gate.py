"""Judge a candidate against the base that it is to replace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path

from deepseek_triton.builders.checkpoint.files.hub_cache import model_name
from deepseek_triton.builders.checkpoint.reader import Checkpoint, open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.lifecycle.digest import digest_of
from deepseek_triton.builders.lifecycle.gate.built_process import BuiltProcess
from deepseek_triton.builders.lifecycle.gate.judged_build import BuildOfGate, JudgedBuild
from deepseek_triton.builders.lifecycle.gate.limits import NUMBERS, GateLimits, read_limits
from deepseek_triton.builders.lifecycle.gate.measure import GateFigures, Subject
from deepseek_triton.builders.lifecycle.gate.report import JUDGED, LimitVerdict, Report
from deepseek_triton.builders.lifecycle.learning.examples import ON_BAD, Lesson, read_examples
from deepseek_triton.builders.lifecycle.learning.options import DEVICES, LearnOptions
from deepseek_triton.builders.lifecycle.provenance import provenance_of
from deepseek_triton.builders.repository.models.built import BuiltModel
from deepseek_triton.ensemble.text.chat import end_workers
from deepseek_triton.quick_imports import quick_imports

SPEED_ROUNDS = 5  # of which each subject's best counts
Measured = tuple[list[GateFigures], tuple[float, float]]  # of candidate and base; tokens a second of each


@dataclass(frozen=True)
class GateOptions:
    """What is judged by what.

    candidate: a checkpoint. base: the checkpoint that it shall replace; None: what answers `name` in `repository`, and
    what is judged is the candidate's build beside it. routes: the gateway's route file, which says what answers.
    held_out: the share that `learn` kept; None: as the candidate's provenance says.

    Raises:
        BuildError: a value out of range.
    """

    candidate: Path
    base: Path | None
    limits: Path
    data: Path
    replay: Path
    repository: Path | None = None
    name: str = ""
    routes: Path | None = None
    held_out: float | None = None
    window_len: int = LearnOptions.window_len
    micro_batch: int = LearnOptions.micro_batch
    device: str = "auto"
    bad_lines: str = ON_BAD[0]

    def __post_init__(self) -> None:
        if self.held_out is not None and not 0 < self.held_out < 1:
            raise BuildError(f"held-out is {self.held_out}, must lie between 0 and 1")
        if self.window_len < 2 or self.micro_batch < 1:
            raise BuildError("window must be at least 2, micro-batch at least 1")
        if (self.base is None) != bool(self.name and self.repository):
            raise BuildError("give --against, to judge the checkpoint, or --name, to judge its build: one of the two")
        if self.device not in DEVICES:
            raise BuildError(f"device is {self.device!r}, must be one of {', '.join(DEVICES)}")


def gate(
    options: GateOptions,
    say: Callable[[str], None] = lambda line: None,
    build_as: Callable[[str, str], None] = lambda old, new: None,
) -> Report:
    """Measure both, and judge.

    build_as: builds the candidate with the settings of the first model, under the name of the second.

    Raises:
        BuildError: something can't be used. A candidate that doesn't pass is no error.
    """
    limits = read_limits(options.limits)
    candidate = open_checkpoint(options.candidate)
    share = options.held_out or _share_of(candidate)
    files = {
        name: read_examples(path, options.bad_lines) for name, path in (("new", options.data), ("old", options.replay))
    }
    held_out = {name: one.held_out(share) for name, one in files.items()}
    sha256_of_candidate = digest_of(candidate)
    built: dict[str, str] = {}
    judged = JUDGED
    if options.base is not None:
        base = open_checkpoint(options.base)
        base_of_report = {"name": model_name(base.path), "sha256": digest_of(base)}
        found, speeds = _of_checkpoints(candidate, base, options, limits, held_out, say)
    else:
        assert options.repository is not None
        place = BuildOfGate(options.repository, options.name, options.routes)
        one = place.make(sha256_of_candidate, build_as, say)
        built, judged = asdict(one), _described(options.repository, one)
        base_manifest = BuiltModel.read(options.repository, one.base).manifest
        base_of_report = {"name": one.base, "sha256": base_manifest.checkpoint_sha256}
        found, speeds = _of_builds(options.repository, one, options, limits, held_out, say)
    return Report(
        candidate={"name": model_name(candidate.path), "sha256": sha256_of_candidate},
        base=base_of_report,
        verdicts=tuple(verdicts(limits, found[0], found[1], speeds)),
        data={name: {"sha256": file.sha256, "examples": len(held_out[name])} for name, file in files.items()},
        not_checked=tuple(
            name
            for name in (*NUMBERS, "checks")
            if name not in limits.numbers and not (name == "checks" and limits.checks)
        ),
        limits_sha256=sha256(options.limits.read_bytes()).hexdigest(),
        at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        judged=judged,
        built=built,
    )


def _of_checkpoints(
    candidate: Checkpoint,
    base: Checkpoint,
    options: GateOptions,
    limits: GateLimits,
    held_out: Mapping[str, Sequence[Lesson]],
    say: Callable[[str], None],
) -> Measured:
    """The candidate's and the base's figures and speeds, computed by transformers."""
    with quick_imports():
        import torch  # noqa: F401
        import transformers  # noqa: F401

    from deepseek_triton.builders.lifecycle.recovery.models import choose_device

    device = choose_device(options.device)
    try:
        subjects = [Subject(one, device) for one in (candidate, base)]
        measured = []
        for subject in subjects:
            say(f"measuring {subject.checkpoint.path}")
            measured.append(subject.measure(held_out, limits.checks, options.window_len, options.micro_batch))
    finally:
        end_workers()
    return measured, _speeds(subjects, limits)


def _of_builds(
    repository: Path,
    built: JudgedBuild,
    options: GateOptions,
    limits: GateLimits,
    held_out: Mapping[str, Sequence[Lesson]],
    say: Callable[[str], None],
) -> Measured:
    """The same of the two builds, computed by their runners, each in a process of its own."""
    measured = []
    with ExitStack() as stack:
        subjects: list[BuiltProcess] = []
        for name in (built.name, built.base):
            say(f"measuring {name}")
            subject = stack.enter_context(closing(BuiltProcess(repository, name)))
            measured.append(subject.measure(held_out, limits.checks, options.window_len))
            subjects.append(subject)
        return measured, _speeds(subjects, limits)


def _described(repository: Path, built: JudgedBuild) -> str:
    manifest = BuiltModel.read(repository, built.name).manifest
    return (
        f"{built.name}, the build that `promote` serves: {manifest.precision} for target {manifest.target}, as its "
        f"own runner computes it, beside {built.base}"
    )


def verdicts(
    limits: GateLimits, candidate: GateFigures, base: GateFigures, speeds: tuple[float, float]
) -> Iterator[LimitVerdict]:
    """One for each limit; speeds: tokens a second of the two. A loss that isn't a number passes nothing."""
    for section, data, sign, word in (("old_data", "old", 1, "rise"), ("new_data", "new", -1, "fall")):
        change = candidate.losses[data] - base.losses[data]
        limit = limits.numbers[section]
        passed = change <= limit if sign > 0 else -change >= limit
        bound = "at most" if sign > 0 else "at least"
        yield LimitVerdict(
            section,
            passed,
            f"{candidate.losses[data]:.4f}",
            f"{base.losses[data]:.4f}",
            f"{bound} {limit:g} nats",
            f"The loss on held-out {data} data must {word} by {bound} {limit:g} nats a token; "
            f"it changed by {change:+.4f}.",
        )
    ratios: list[tuple[str, tuple[float, float], str, int]] = [
        ("speed", speeds, "tokens a second", 1),
        ("memory", (candidate.weight_bytes, base.weight_bytes), "bytes of weights", -1),
    ]
    if candidate.process_bytes and base.process_bytes:
        memory = candidate.process_bytes, base.process_bytes
        ratios.append(("memory", memory, "highest bytes of the process that computes", -1))
    for section, (own, other), what, sign in ratios:
        if section in limits.numbers:
            limit, ratio = limits.numbers[section], own / other
            bound = "at least" if sign > 0 else "at most"
            yield LimitVerdict(
                section,
                ratio >= limit if sign > 0 else ratio <= limit,
                f"{own:,.1f}" if sign > 0 else f"{own:,}",
                f"{other:,.1f}" if sign > 0 else f"{other:,}",
                f"{bound} {limit:g} times",
                f"The {what} must be {bound} {limit:g} times the base's; they are {ratio:.3f} times.",
            )
    for check in limits.checks:
        fault = check.fault(candidate.answers[check.name])
        asked = ", ".join(
            f"{name} {getattr(check, name)!r}"
            for name in ("must_match", "must_not_match", "is_json")
            if getattr(check, name)
        )
        why = f"It must hold that {asked}: " + (fault or "it does") + "."
        yield LimitVerdict(
            f"check {check.name}", not fault, candidate.answers[check.name], base.answers[check.name], asked, why
        )


def _speeds(subjects: Sequence[Subject | BuiltProcess], limits: GateLimits) -> tuple[float, float]:
    """Each subject's best of several rounds, in turn: what else the machine does meets both. Measured if limited."""
    if "speed" not in limits.numbers:
        return 1.0, 1.0
    best = [0.0, 0.0]
    for _ in range(SPEED_ROUNDS):
        for index, subject in enumerate(subjects):
            best[index] = max(best[index], subject.tokens_per_s())
    return best[0], best[1]


def _share_of(candidate: Checkpoint) -> float:
    """The share of the lines that the candidate wasn't trained on."""
    provenance = provenance_of(candidate.path) if candidate.path.is_dir() else {}
    share = provenance.get("settings", {}).get("held_out")
    return share if isinstance(share, float) and 0 < share < 1 else LearnOptions.held_out
