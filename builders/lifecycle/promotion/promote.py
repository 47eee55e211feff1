"""Move a name from the model that answers it to a candidate: by shares, watched, and back if it does worse."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.lifecycle.digest import digest_of
from deepseek_triton.builders.lifecycle.gate.judged_build import identity_of
from deepseek_triton.builders.lifecycle.gate.report import require_passed
from deepseek_triton.builders.lifecycle.promotion.arm_figures import ArmFigures, ask_gateways
from deepseek_triton.builders.lifecycle.promotion.options import BY, PromoteOptions
from deepseek_triton.builders.lifecycle.promotion.route import answering, next_name, write_route
from deepseek_triton.builders.lifecycle.promotion.state import (
    PROMOTED,
    ROLLED_BACK,
    ROLLING_BACK,
    RUNNING,
    Promotion,
    PromotionFile,
)
from deepseek_triton.builders.lifecycle.promotion.triton_control import TritonControl

POLL_S = 0.5
BLIND_S = 10.0  # without metrics the candidate goes: nobody watches it
SETTLE_S = 2.0  # in which every gateway has read the routes, and what it had chosen before has reached the server


def promote(
    options: PromoteOptions,
    build_as: Callable[[str, str], None],
    control: TritonControl,
    say: Callable[[str], None] = lambda line: None,
) -> Promotion:
    """Build, load, share, watch, unload the old; what a killed run of the same candidate did is gone on from.

    What is served is the build that the gate judged. build_as: builds the candidate with the settings of the first
    model, under the name of the second, where the gate judged the checkpoint alone and `options.builds`.

    Raises:
        BuildError: the report isn't the candidate's or says no, another promotion isn't finished, or a step failed;
            the name is answered by what answered it before then.
    """
    sha256 = digest_of(open_checkpoint(options.candidate))
    report = require_passed(options.report, sha256)
    file = PromotionFile(options.repository, options.name)
    with file.locked():
        promotion = _begin(options, file, report, sha256, say)
        if promotion.status == PROMOTED:
            return promotion
        if not (options.repository / promotion.new / "config.pbtxt").exists():  # which a build writes last
            say(f"building {promotion.new} as {promotion.old} is built")
            build_as(promotion.old, promotion.new)
        try:
            say(f"loading {promotion.new} beside {promotion.old}")
            control.load(promotion.new)
            why, promotion = _share(options, file, promotion, say)
        except BuildError as error:
            _back(options.routes, file, promotion, options.by, str(error))
            raise
        if why:
            promotion = _back(options.routes, file, promotion, options.by, why)
            say(f"rolled back to {promotion.old}: {why}")
            time.sleep(SETTLE_S)
            control.unload(promotion.new, options.drain_s)
            return promotion
        time.sleep(SETTLE_S)
        if not options.keeps_old:
            say(f"unloading {promotion.old}, when what runs on it has ended")
            control.unload(promotion.old, options.drain_s)
        return file.save(promotion, status=PROMOTED)


def rollback(
    repository: Path, name: str, routes: Path, control: TritonControl, say: Callable[[str], None] = lambda line: None
) -> Promotion:
    """Let the model before the last promotion answer again, and unload the one that was promoted.

    What a killed run did is gone on from.

    Raises:
        BuildError: nothing was promoted, another process promotes, or the old model can't be loaded.
    """
    file = PromotionFile(repository, name)
    with file.locked():
        promotion = file.load()
        if promotion is None or promotion.status == ROLLED_BACK:
            raise BuildError(f"{name} has no promotion that could be rolled back")
        begin = time.monotonic()
        control.load(promotion.old)
        promotion = _back(routes, file, promotion, None, "by command", ROLLING_BACK)
        say(f"{promotion.old} answers {name} again after {time.monotonic() - begin:.1f} s")
        time.sleep(SETTLE_S)
        control.unload(promotion.new, PromoteOptions.drain_s)
        return file.save(promotion, status=ROLLED_BACK)


def _begin(
    options: PromoteOptions,
    file: PromotionFile,
    report: Mapping[str, Any],
    sha256: str,
    say: Callable[[str], None],
) -> Promotion:
    """The promotion that a killed run began, or a new one."""
    last = file.load()
    if last is not None and last.status == RUNNING:
        if last.candidate_sha256 != sha256:
            raise BuildError(f"another candidate is on its way to {options.name}; finish it, or run `rollback` first")
        say(f"goes on with {last.new}, which had {last.share:g} %")
        return last
    if last is not None and last.status == ROLLING_BACK:
        raise BuildError(f"a rollback of {options.name} was ended in its midst; run `rollback` again first")
    if last is not None and last.status == PROMOTED and last.candidate_sha256 == sha256:
        say(f"{last.new} is this candidate, and answers {options.name} already")
        return last
    old = answering(options.repository, options.name, options.routes)
    if report.get("built"):
        return file.save(Promotion(options.name, old, _judged(options, report["built"], old), sha256))
    if not options.builds:
        raise BuildError(
            f"{options.report} judged the checkpoint, not what a build makes of it: run the gate with --name "
            f"{options.name}, or build it unjudged with --build"
        )
    is_again = last is not None and last.status == ROLLED_BACK and last.candidate_sha256 == sha256 and last.old == old
    new = last.new if last is not None and is_again else next_name(options.repository, options.name)
    return file.save(Promotion(options.name, old, new, sha256))


def _judged(options: PromoteOptions, built: Mapping[str, str], old: str) -> str:
    """The name of the build that the gate judged, if it and what answers now are still what they were.

    Raises:
        BuildError: one of them is another.
    """
    for name, identity in ((built["name"], built["identity"]), (built["base"], built["base_identity"])):
        if identity_of(options.repository, name) != identity:
            raise BuildError(f"{name} is another build than the gate judged: run the gate again")
    if built["base"] != old:
        raise BuildError(f"the gate judged beside {built['base']}, {old} answers {options.name} now: run it again")
    return built["name"]


def _share(
    options: PromoteOptions, file: PromotionFile, promotion: Promotion, say: Callable[[str], None]
) -> tuple[str, Promotion]:
    """Raise the share step by step; returns why the candidate must go, empty if it has all."""
    base_before: ArmFigures | None = None
    for share in options.shares:
        if share < promotion.share:  # a killed run had more
            continue
        write_route(options.routes, options.name, {promotion.old: 100 - share, promotion.new: share}, options.by)
        promotion = file.save(promotion, share=share)
        say(f"{promotion.new} has {share:g} %")
        why, base_before = _watch(options, promotion, base_before)
        if why:
            return why, promotion
    return "", promotion


def _watch(
    options: PromoteOptions, promotion: Promotion, base_before: ArmFigures | None
) -> tuple[str, ArmFigures | None]:
    """Watch one share; returns why the candidate must go, and the base's figures when it was looked at first."""
    models = (promotion.old, promotion.new)
    begin = seen = time.monotonic()
    candidate_before: ArmFigures | None = None
    while True:
        now = time.monotonic()
        try:
            found = ask_gateways(options.gateways, options.name, models)
        except OSError as error:
            if now - seen > BLIND_S:
                return f"the gateway's metrics can't be read: {error}", base_before
            time.sleep(POLL_S)
            continue
        seen = now
        base_before = base_before or found[promotion.old]
        candidate_before = candidate_before or found[promotion.new]
        base = found[promotion.old].since(base_before)
        candidate = found[promotion.new].since(candidate_before)
        if base.is_of_restart or candidate.is_of_restart:
            base_before = candidate_before = None
            continue
        if why := options.bounds.fault(candidate, base):
            return why, base_before
        if now - begin >= options.stage_s and candidate.ended >= options.bounds.min_requests:
            return "", base_before
        if now - begin > options.max_stage_s:
            return (
                f"only {candidate.ended:.0f} requests in {options.max_stage_s:g} s, too few to judge by: "
                f"{options.bounds.min_requests} are needed"
            ), base_before
        time.sleep(POLL_S)


def _back(
    routes: Path, file: PromotionFile, promotion: Promotion, by: str | None, why: str, status: str = ROLLED_BACK
) -> Promotion:
    """All new requests go to the old model."""
    write_route(routes, promotion.name, {promotion.old: 100, promotion.new: 0}, by or BY[0])
    return file.save(promotion, status=status, share=0.0, why=why)
