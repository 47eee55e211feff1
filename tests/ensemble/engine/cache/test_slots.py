"""Slots compared with a model of the caches: after the copies, each slot must hold what its placement says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from deepseek_triton.ensemble.engine.cache.manager import Copy, Placement
from deepseek_triton.ensemble.engine.cache.manager import Ids as IdArray
from deepseek_triton.ensemble.engine.cache.slots import MIN_REUSED_TOKENS, Slots

LENGTH = 64
# Few tokens and long common beginnings, so that prompts share much.
PROMPTS = st.builds(
    lambda root, length, tail: [root] * length + tail,
    st.integers(1, 3), st.integers(0, 40), st.lists(st.integers(1, 3), min_size=1, max_size=20),
)  # fmt: skip


def ids(*parts: int | range) -> IdArray:
    return np.array([i for part in parts for i in (part if isinstance(part, range) else [part])], np.int64)


class Caches(RuleBasedStateMachine):
    """An engine that does what it is told, with what each slot really holds."""

    @initialize(max_num_seqs=st.integers(1, 5))
    def begin(self, max_num_seqs: int) -> None:
        self.slots = Slots(max_num_seqs)
        self.caches = np.full((max_num_seqs, LENGTH), -1, np.int64)
        self.noise = 1000
        self.running: dict[int, tuple[list[int], int]] = {}  # slot → its prompt, and how much of it is computed

    @precondition(lambda self: len(self.running) < len(self.caches))
    @rule(prompt=PROMPTS)
    def admit(self, prompt: list[int]) -> None:
        free = set(range(len(self.caches))) - set(self.running)
        for slot, (own, num_computed) in self.running.items():  # as the scheduler does
            self.slots.hold(slot, np.array(own[:num_computed], np.int64))
        placement = self.slots.take(np.array(prompt, np.int64))
        assert placement.slot == min(free)
        for copy in placement.copies:
            assert copy.target in free and copy.source != copy.target
            assert (self.caches[copy.source, : copy.num_tokens] >= 0).all(), "nothing is copied that isn't there"
            self.caches[copy.target] = self.new_noise()  # what lies behind the copy is anything
            self.caches[copy.target, : copy.num_tokens] = self.caches[copy.source, : copy.num_tokens]
        assert 0 <= placement.num_reused < len(prompt)
        assert self.caches[placement.slot, : placement.num_reused].tolist() == prompt[: placement.num_reused]
        assert placement.num_reused == 0 or placement.num_reused >= MIN_REUSED_TOKENS
        self.running[placement.slot] = prompt, placement.num_reused

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.running)))
        prompt, num_computed = self.running[slot]
        end = data.draw(st.integers(num_computed, len(prompt)))
        self.caches[slot, num_computed:] = self.new_noise()[num_computed:]
        self.caches[slot, num_computed:end] = prompt[num_computed:end]
        self.running[slot] = prompt, end

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.running)))
        prompt, num_computed = self.running.pop(slot)
        self.slots.hold(slot, np.array(prompt[:num_computed], np.int64))
        self.slots.give_back(slot)
        assert self.slots.num_free == len(self.caches) - len(self.running)

    @rule()
    def lose_what_is_free(self) -> None:
        for slot in set(range(len(self.caches))) - set(self.running):
            self.caches[slot] = -1
        self.slots.forget()

    def new_noise(self) -> IdArray:
        self.noise += 1
        return np.full(LENGTH, self.noise, np.int64)


TestCaches = pytest.mark.slow(Caches.TestCase)
TestCaches.settings = settings(max_examples=150, stateful_step_count=30)


def use(slots: Slots, prompt: IdArray) -> Placement:
    """A prompt's whole life."""
    placement = slots.take(prompt)
    slots.hold(placement.slot, prompt)
    slots.give_back(placement.slot)
    return placement


A, B, C = ids(range(100, 120)), ids(range(200, 220)), ids(range(300, 320))


def test_the_lowest_free_slot_is_taken_first() -> None:
    slots = Slots(3)
    assert [slots.take(ids(n)).slot for n in range(3)] == [0, 1, 2]
    slots.give_back(2)
    slots.give_back(0)
    assert [slots.take(ids(n)).slot for n in range(2)] == [0, 2] and slots.num_free == 0


def test_what_the_lowest_slot_held_moves_to_the_one_used_longest_ago() -> None:
    slots = Slots(3)
    assert use(slots, A) == Placement(0)
    assert use(slots, B) == Placement(0, 0, (Copy(0, 1, 20),))
    assert use(slots, C) == Placement(0, 0, (Copy(0, 2, 20),))
    # Slot 1, with A, was used longest ago: C goes there. The next time slot 2 can't be taken, for it is copied from.
    assert use(slots, ids(range(400, 420))) == Placement(0, 0, (Copy(0, 1, 20),))
    assert use(slots, np.append(B, 1)) == Placement(0, 20, (Copy(0, 1, 20), Copy(2, 0, 20)))
    assert slots.take(np.append(A, 1)).num_reused == 0


def test_a_prompt_is_found_again_where_it_is_or_by_a_copy() -> None:
    slots = Slots(2)
    use(slots, A)
    assert use(slots, np.append(A, 1)) == Placement(0, 20), "in its own slot"
    running = slots.take(np.append(A, [1, 2]))
    slots.hold(0, np.append(A, [1, 2]))
    assert running == Placement(0, 21)
    assert slots.take(np.append(A, 3)) == Placement(1, 20, (Copy(0, 1, 20),)), "from one that runs"


@pytest.mark.parametrize(("length", "expected"), [(MIN_REUSED_TOKENS - 1, 0), (MIN_REUSED_TOKENS, MIN_REUSED_TOKENS)])
def test_a_short_common_beginning_is_not_worth_it(length: int, expected: int) -> None:
    slots = Slots(1)
    use(slots, A)
    assert slots.take(np.append(A[:length], 1)).num_reused == expected


def test_the_last_token_is_computed_in_any_case() -> None:
    slots = Slots(1)
    use(slots, A)
    assert slots.take(A).num_reused == len(A) - 1


def test_reuse_can_be_switched_off() -> None:
    slots = Slots(2, is_reused=False)
    assert use(slots, A) == Placement(0) and use(slots, A) == Placement(0)


def test_what_was_forgotten_is_not_found() -> None:
    slots = Slots(2)
    use(slots, A)
    slots.forget()
    assert slots.take(np.append(A, 1)) == Placement(0)
