"""One decode step of sequences that want different things, on runners that choose tokens and on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_triton.ensemble.engine import pipeline
from deepseek_triton.ensemble.engine.decoding import Outcome
from deepseek_triton.ensemble.engine.pipeline import StepPipeline, StepResult
from deepseek_triton.ensemble.engine.runners.base import Logits
from deepseek_triton.ensemble.engine.runners.one_step import pipelined
from deepseek_triton.ensemble.engine.scheduler import EngineStep
from deepseek_triton.ensemble.engine.sequence import Request, Sequence
from deepseek_triton.ensemble.engine.thinking import Thinking, ThinkingTags
from deepseek_triton.ensemble.guided import BackgroundGuide, Guide, GuideCompiler, GuideError, MaskThreads
from deepseek_triton.ensemble.sampling import Sampled, Sampler, SamplingError, SamplingParams
from deepseek_triton.ensemble.text.bad_words import BadWords
from deepseek_triton.ensemble.text.tokenizer import Tokenizer
from tests.support.checkpoints import make_tokenizer
from tests.support.fakes import FakeRunner, FakeSink, SamplingFakeRunner, next_token

VOCAB_SIZE, END = 320, 319
RUNNERS = [FakeRunner, SamplingFakeRunner]
PROMPT_LEN = 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(directory)


@pytest.fixture(scope="module")
def compiler(directory: Path) -> GuideCompiler:
    return GuideCompiler(directory, VOCAB_SIZE, (END,))


@pytest.fixture(autouse=True)
def waits_for_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "MASK_WAIT_S", 30.0)


def guided(guide: Guide) -> BackgroundGuide:
    return MaskThreads().guides(guide, 1)[0]


class Batch:
    """Sequences in slots 0 … n - 1, each with a prompt and a first token in the runner's cache or about to be."""

    def __init__(self, runner: FakeRunner) -> None:
        self.runner, self.pipeline = runner, StepPipeline(pipelined(runner), lambda: 0.0)
        self.sequences: list[Sequence] = []

    def add(self, *, slot: int | None = None, temperature: float = 0.0, **more: Any) -> Sequence:
        own = {"guide", "bad_words", "thinking"}
        params = SamplingParams(temperature=temperature, **{k: v for k, v in more.items() if k not in own})
        slot = len(self.sequences) if slot is None else slot
        prompt = [slot + 1, slot + 2, slot + 3]
        request = Request(slot, "", np.array(prompt), params, FakeSink(), max_new_tokens=50)
        sampler = Sampler(params, prompt, frozenset({END}))
        sequence = Sequence(request, 0, sampler, slot=slot, **{k: v for k, v in more.items() if k in own})
        self.runner.prefill(slot, request.prompt_ids, 0)
        sequence.num_computed = PROMPT_LEN
        sequence.output_ids = [slot + 4]
        sampler.push(slot + 4)
        self.sequences.append(sequence)
        return sequence

    def step(self) -> list[Outcome]:
        """The outcomes, in the order of `sequences`."""
        positions = dict.fromkeys(range(self.runner.max_num_seqs), self.runner.max_seq_len - 1)
        positions |= {s.slot: s.num_computed for s in self.sequences if s.slot is not None}
        assert self.pipeline.begin(EngineStep((), (), (), (), tuple(self.sequences)), positions) == []
        (result,) = self.pipeline.finish()
        assert isinstance(result, StepResult)
        outcomes = {id(sequence): outcome for sequence, outcome in result.outcomes}
        assert len(outcomes) == len(self.sequences)
        return [outcomes[id(sequence)] for sequence in self.sequences]


def likeliest(sequence: Sequence) -> int:
    """What FakeRunner makes of the sequence's prompt and first token."""
    return next_token([*sequence.request.prompt_ids.tolist(), sequence.output_ids[0]], VOCAB_SIZE)


def token(outcome: Outcome) -> int:
    assert isinstance(outcome, Sampled), outcome
    return outcome.token


class ForbidsOne(BadWords):
    """Bad words of which one is exactly the token."""

    def __init__(self, forbidden: int) -> None:
        self.forbidden, self.pushed = forbidden, []  # type: ignore[var-annotated]

    def is_allowed(self, token: int) -> bool:
        return token != self.forbidden

    def push(self, token: int) -> None:
        self.pushed.append(token)


@pytest.mark.parametrize("runner_type", RUNNERS)
def test_each_sequence_of_a_batch_gets_what_it_wants(
    runner_type: type[FakeRunner], compiler: GuideCompiler, tokenizer: Tokenizer
) -> None:
    batch = Batch(runner_type(max_num_seqs=8, max_seq_len=32, vocab_size=VOCAB_SIZE))
    plain = batch.add()
    yes = batch.add(guide=guided(compiler.compile("choice", '["yes"]')))
    worded = batch.add()
    worded.bad_words = words = ForbidsOne(likeliest(worded))
    sampled = batch.add(temperature=0.9, seed=11)
    penalized = batch.add()
    no = batch.add(guide=guided(compiler.compile("choice", '["no"]')), num_log_probs=1)
    forced = batch.add(thinking=Thinking(ThinkingTags(1, 2), is_open=True, budget=0))
    reasoning = batch.add(
        guide=guided(compiler.compile("choice", '["no"]')), thinking=Thinking(ThinkingTags(1, 2), is_open=True)
    )
    # A penalty that makes the likeliest token the unlikeliest: it has come already.
    params = SamplingParams(temperature=0.0, presence_penalty=5.0)
    penalized.sampler = Sampler(params, (), frozenset({END}))
    penalized.sampler.push(likeliest(penalized))

    outcomes = dict(zip(map(id, batch.sequences), batch.step(), strict=True))
    y, n = tokenizer.encode("yn").tolist()
    assert token(outcomes[id(plain)]) == likeliest(plain)
    assert token(outcomes[id(yes)]) == y and token(outcomes[id(no)]) == n
    assert token(outcomes[id(worded)]) not in (likeliest(worded), END)
    assert words.pushed == [token(outcomes[id(worded)])]
    assert token(outcomes[id(penalized)]) != likeliest(penalized)
    assert token(outcomes[id(forced)]) == 2
    assert token(outcomes[id(reasoning)]) == likeliest(reasoning), "the guide begins behind the reasoning"
    told = outcomes[id(no)]
    assert isinstance(told, Sampled) and told.log_prob is not None and len(told.top) == 1
    assert all(sequence.sampler.num_generated == 2 for sequence in batch.sequences)
    if isinstance(batch.runner, SamplingFakeRunner):
        assert batch.runner.num_sampled == 2, "the plain and the reasoning one"
        assert batch.runner.num_logits_rows == 6

    alone = Batch(runner_type(max_num_seqs=8, max_seq_len=32, vocab_size=VOCAB_SIZE))
    alone.add(slot=3, temperature=0.9, seed=11)
    assert token(alone.step()[0]) == token(outcomes[id(sampled)])


@pytest.mark.parametrize("runner_type", RUNNERS)
def test_a_guide_that_can_t_go_on_says_why_and_disturbs_no_other(
    runner_type: type[FakeRunner], compiler: GuideCompiler, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_stuck() -> None:
        raise GuideError("a step costs too much")

    broken = compiler.compile("choice", '["no"]')
    monkeypatch.setattr(broken, "copy", lambda: broken)
    monkeypatch.setattr(broken, "mask", is_stuck)
    batch = Batch(runner_type(max_num_seqs=4, max_seq_len=32, vocab_size=VOCAB_SIZE))
    batch.add(guide=guided(compiler.compile("choice", '["yes"]')))
    batch.add()
    batch.add(guide=guided(broken))
    good, plain, stuck = batch.step()
    assert token(good) == tokenizer.encode("y")[0] and token(plain) == likeliest(batch.sequences[1])
    assert isinstance(stuck, GuideError) and str(stuck) == "a step costs too much"


@pytest.mark.parametrize("runner_type", RUNNERS)
def test_logits_that_are_not_finite_concern_their_row(runner_type: type[FakeRunner]) -> None:
    class Broken(runner_type):  # type: ignore[misc, valid-type]
        def _logits(self, slot: int, length: int) -> Logits:
            logits: Logits = super()._logits(slot, length)
            return logits * np.float32("nan") if slot == 1 else logits

    batch = Batch(Broken(max_num_seqs=3, max_seq_len=32, vocab_size=VOCAB_SIZE))
    for _ in range(3):
        batch.add()
    first, broken, last = batch.step()
    assert isinstance(broken, SamplingError) and "not finite" in str(broken)
    assert [token(first), token(last)] == [likeliest(batch.sequences[0]), likeliest(batch.sequences[2])]


def test_bad_words_see_a_forced_token_too() -> None:
    batch = Batch(FakeRunner(max_num_seqs=1, max_seq_len=32, vocab_size=VOCAB_SIZE))
    words = ForbidsOne(0)
    batch.add(thinking=Thinking(ThinkingTags(1, 2), is_open=True, budget=0), bad_words=words)
    assert token(batch.step()[0]) == 2 and words.pushed == [2]


@pytest.mark.parametrize("runner_type", RUNNERS)
def test_free_slots_below_the_highest_are_written_where_it_does_no_harm(runner_type: type[FakeRunner]) -> None:
    batch = Batch(runner_type(max_num_seqs=4, max_seq_len=32, vocab_size=VOCAB_SIZE))
    batch.runner.cache[:2, :31] = 5
    sequence = batch.add(slot=2)
    before = batch.runner.cache.copy()
    assert token(batch.step()[0]) == likeliest(sequence)
    assert (batch.runner.cache[:2, :31] == before[:2, :31]).all()
    assert batch.runner.calls[-1] == ("decode", 3)
