"""Pages compared with a model of the blocks: what a sequence is promised is in its blocks, and none is lost."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deepseek_triton.ensemble.engine.cache.manager import Ids
from deepseek_triton.ensemble.engine.cache.pages import Pages

BLOCK, LENGTH = 4, 24
# Few tokens and long common beginnings, so that prompts share much.
PROMPTS = st.builds(
    lambda root, length, tail: [root] * length + tail,
    st.integers(1, 2), st.integers(0, 14), st.lists(st.integers(1, 2), min_size=1, max_size=5),
)  # fmt: skip


class Blocks(RuleBasedStateMachine):
    """An engine that does what it is told, with what each block really holds."""

    @initialize(max_num_seqs=st.integers(1, 4), num_blocks=st.integers(LENGTH // BLOCK, 14), is_reused=st.booleans())
    def begin(self, max_num_seqs: int, num_blocks: int, is_reused: bool) -> None:
        self.pages = Pages(max_num_seqs, LENGTH, num_blocks=num_blocks, block_size=BLOCK, is_reused=is_reused)
        self.is_reused = is_reused
        self.max_num_seqs = max_num_seqs
        self.cells = np.full((num_blocks + 1, BLOCK), -1, np.int64)
        self.tables: dict[int, list[int]] = {}
        self.running: dict[int, tuple[list[int], int]] = {}  # slot → its tokens, and how many are computed

    def follow(self) -> None:
        for change in self.pages.take_changes():
            table = self.tables[change.slot]
            assert change.first == len(table), "a table grows at its end"
            table += change.blocks

    def content(self, slot: int, length: int) -> list[int]:
        found: list[int] = self.cells[self.tables[slot]].reshape(-1)[:length].tolist()
        return found

    def write(self, slot: int, position: int, token: int) -> None:
        self.cells[self.tables[slot][position // BLOCK], position % BLOCK] = token

    @precondition(lambda self: len(self.running) < self.max_num_seqs)
    @rule(prompt=PROMPTS)
    def admit(self, prompt: list[int]) -> None:
        num_free, num_running = self.pages.num_free_blocks, len(self.running)
        placement = self.pages.take(np.array(prompt, np.int64))
        if placement is None:
            assert num_running and num_free < len(prompt) // BLOCK + 1 + num_running
            assert self.pages.num_free_blocks == num_free
            return
        slot = placement.slot
        assert slot == min(set(range(self.max_num_seqs)) - set(self.running))
        self.tables[slot] = []
        self.follow()
        assert 0 <= placement.num_reused < len(prompt)
        assert self.is_reused or not placement.num_reused
        assert self.content(slot, placement.num_reused) == prompt[: placement.num_reused]
        assert len(self.tables[slot]) * BLOCK > len(prompt), "there is room for the next token"
        self.running[slot] = prompt, placement.num_reused

    @precondition(lambda self: self.running)
    @rule(data=st.data(), holds_first=st.booleans())
    def compute(self, data: st.DataObject, holds_first: bool) -> None:
        """Compute some of the tokens; in truth they may be found before they are written, by whom is computed later."""
        slot = data.draw(st.sampled_from(sorted(self.running)))
        tokens, num_computed = self.running[slot]
        end = data.draw(st.integers(num_computed, len(tokens)))
        for position in range(num_computed, end):
            self.write(slot, position, tokens[position])
        if end < len(self.tables[slot]) * BLOCK:  # a step that advances others may write behind the end
            self.write(slot, end, -2)
        self.pages.hold(slot, np.array(tokens[:end], np.int64))
        self.running[slot] = tokens, end

    @precondition(lambda self: self.running)
    @rule(data=st.data(), token=st.integers(1, 2))
    def grow(self, data: st.DataObject, token: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.running)))
        tokens, num_computed = self.running[slot]
        if len(tokens) == LENGTH:
            return
        has_room = self.pages.grow(slot, len(tokens) + 1)
        self.follow()
        if not has_room:
            assert self.pages.num_free_blocks == 0 and len(self.tables[slot]) * BLOCK == len(tokens)
            return
        self.running[slot] = [*tokens, token], num_computed

    @precondition(lambda self: self.running and max(self.running) >= len(self.running))
    @rule()
    def move(self) -> None:
        slot = max(self.running)
        target = self.pages.move(slot)
        assert target == min(set(range(self.max_num_seqs)) - set(self.running))
        self.tables[target], kept = [], self.tables.pop(slot)
        self.follow()
        assert self.tables[target] == kept
        self.running[target] = self.running.pop(slot)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.running)))
        tokens, num_computed = self.running.pop(slot)
        self.pages.hold(slot, np.array(tokens[:num_computed], np.int64))
        self.pages.give_back(slot)
        del self.tables[slot]

    @rule()
    def forget(self) -> None:
        self.pages.forget()
        for block in set(range(1, len(self.cells))) - {block for table in self.tables.values() for block in table}:
            self.cells[block] = -1

    @invariant()
    def every_promise_holds(self) -> None:
        if not hasattr(self, "pages"):
            return
        for slot, (tokens, num_computed) in self.running.items():
            assert self.content(slot, num_computed) == tokens[:num_computed]
        holders = Counter(block for table in self.tables.values() for block in set(table))
        assert 0 not in holders
        assert all(len(set(table)) == len(table) for table in self.tables.values())
        assert self.pages.num_free_blocks == self.pages.num_blocks - len(holders), "no block is lost"
        assert self.pages.num_free == self.max_num_seqs - len(self.running)
        assert self.is_reused or all(count == 1 for count in holders.values())


TestBlocks = pytest.mark.slow(Blocks.TestCase)
TestBlocks.settings = settings(max_examples=150, stateful_step_count=30)


def ids(*parts: int | range) -> Ids:
    return np.array([i for part in parts for i in (part if isinstance(part, range) else [part])], np.int64)


def pages(num_blocks: int = 12, max_num_seqs: int = 8) -> Pages:
    return Pages(max_num_seqs, LENGTH, num_blocks=num_blocks, block_size=BLOCK)


def test_sequences_that_begin_alike_have_the_same_blocks_and_never_the_last_token_s() -> None:
    made = pages()
    first = made.take(ids(range(10)))
    assert first is not None and first.num_reused == 0
    made.hold(0, ids(range(10)))
    second = made.take(ids(range(12)))
    assert second is not None and second.num_reused == 8 and not second.copies
    changes = made.take_changes()
    assert changes[1].blocks == changes[0].blocks[:2] and changes[0].blocks != changes[2].blocks
    same = made.take(ids(range(8)))
    assert same is not None and same.num_reused == 4, "its last token's logits are needed"


def test_what_was_released_long_ago_makes_room_first_and_from_its_end() -> None:
    made = pages(num_blocks=6)
    for first in (100, 200):
        made.take(ids(range(first, first + 8)))
        made.hold(0, ids(range(first, first + 8)))
        made.give_back(0)
    made.take(ids(range(300, 311)))  # 3 blocks: two are empty, one is the end of the oldest chain
    made.give_back(0)
    for first, kept in ((200, 8), (100, 4)):
        placement = made.take(ids(range(first, first + 9)))
        assert placement is not None and placement.num_reused == kept
        made.give_back(0)


def test_one_block_is_left_for_each_that_runs() -> None:
    made = pages(num_blocks=8)
    assert made.take(ids(range(11))) is not None  # 3 blocks
    assert made.take(ids(range(40, 51))) is not None  # 3 more; the first one's growth has two left
    assert made.take(ids(1)) is None
    assert made.grow(0, 16) and made.grow(1, 16) and not made.grow(0, 17)
