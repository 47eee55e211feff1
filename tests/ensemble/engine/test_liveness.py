from __future__ import annotations

import numpy as np
import pytest

from deepseek_triton.ensemble.engine.liveness import LATENCY_MARGIN, MAX_UNACKNOWLEDGED, Liveness
from deepseek_triton.ensemble.engine.sequence import Request
from deepseek_triton.ensemble.sampling import SamplingParams
from tests.support.fakes import FakeSink


def make(*, expects_acknowledgement: bool = True) -> Request:
    return Request(
        stream_id=1, request_id="", prompt_ids=np.array([1]), params=SamplingParams(), sink=FakeSink(),
        expects_acknowledgement=expects_acknowledgement,
    )  # fmt: skip


def test_a_silent_request_sends_a_heartbeat_in_time_to_be_found() -> None:
    liveness, request = Liveness(1.0), make()
    assert not liveness.needs_heartbeat(request, 0.25)
    assert liveness.needs_heartbeat(request, 0.26)
    liveness.sent(request, 0.26)
    assert not liveness.needs_heartbeat(request, 9.0), "one that isn't acknowledged is enough"
    assert not liveness.is_abandoned(request, 1.0)
    assert liveness.is_abandoned(request, 1.02)
    liveness.acknowledged(request, 1.02)
    assert not liveness.is_abandoned(request, 9.0) and not liveness.needs_heartbeat(request, 0.5)
    assert liveness.needs_heartbeat(request, 0.52)


@pytest.mark.parametrize("cancel_after_s", [0.2, 1.0, 30.0])
def test_whenever_the_client_goes_it_is_found_within_the_limit(cancel_after_s: float) -> None:
    liveness, request = Liveness(cancel_after_s), make()
    step = cancel_after_s / 100
    gone_at = 5 * cancel_after_s
    now = 0.0
    while not liveness.is_abandoned(request, now):
        assert now <= gone_at + cancel_after_s + 2 * step
        if liveness.needs_heartbeat(request, now):
            liveness.sent(request, now)
            if now < gone_at:
                liveness.acknowledged(request, now + step / 100)
        now += step
    assert now > gone_at


def test_a_direct_call_is_not_acknowledged_but_asked() -> None:
    liveness, request = Liveness(1.0), make(expects_acknowledgement=False)
    for now in range(100):
        assert liveness.may_send(request) and not liveness.needs_heartbeat(request, now)
        assert not liveness.is_abandoned(request, now)
        liveness.sent(request, now)
    assert isinstance(request.sink, FakeSink)
    request.sink.has_gone = True
    assert liveness.is_abandoned(request, 0.0)


def test_only_so_many_responses_are_on_their_way() -> None:
    liveness, request = Liveness(1.0), make()
    for number in range(MAX_UNACKNOWLEDGED):
        assert liveness.may_send(request)
        liveness.sent(request, number * 0.01)
    assert not liveness.may_send(request)
    liveness.acknowledged(request, 0.1)
    assert liveness.may_send(request) and request.unacknowledged == [0.01], "the oldest was received"


def test_an_acknowledgement_too_many_changes_nothing() -> None:
    liveness, request = Liveness(1.0), make()
    liveness.acknowledged(request, 5.0)
    liveness.sent(request, 5.0)
    assert request.unacknowledged == [5.0] and liveness.is_abandoned(request, 5.8)


def test_where_all_are_slow_nobody_has_gone() -> None:
    liveness, request = Liveness(1.0), make()
    for number in range(200):
        liveness.sent(request, number)
        liveness.acknowledged(request, number + 0.5)
    liveness.sent(request, 1000.0)
    assert not liveness.is_abandoned(request, 1000.0 + LATENCY_MARGIN * 0.49)
    assert liveness.is_abandoned(request, 1000.0 + LATENCY_MARGIN * 0.51)


def test_time_in_which_the_detokenizer_did_not_run_does_not_count() -> None:
    ran = 0.0
    liveness, request = Liveness(1.0, lambda began: ran), make()
    liveness.sent(request, 5.0)
    assert not liveness.is_abandoned(request, 9.0), "nothing says that it could have been acknowledged"
    ran = 1.1
    assert not liveness.is_abandoned(request, 9.0)
    ran = 1.2
    assert liveness.is_abandoned(request, 9.0)
    assert not liveness.is_abandoned(request, 5.7), "its patience is that of the clock too"


def test_what_was_sent_later_to_another_client_and_has_arrived_tells_that_one_has_gone() -> None:
    liveness, gone, other = Liveness(1.0, lambda began: 0.0), make(), make()
    liveness.sent(gone, 5.0)
    liveness.sent(other, 5.3)
    liveness.acknowledged(other, 5.4)
    assert not liveness.is_abandoned(gone, 9.0), "it may have overtaken"
    liveness.sent(other, 5.4)
    assert not liveness.is_abandoned(gone, 9.0)
    liveness.acknowledged(other, 6.0)
    assert liveness.is_abandoned(gone, 9.0)
    assert not liveness.is_abandoned(gone, 5.7)
