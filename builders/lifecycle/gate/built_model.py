"""A built version as the gate measures it: what will be served, computed by its own runner, with its own tokenizer.

The runner is the engine's, with the settings that config.pbtxt gives it; Triton isn't needed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.lifecycle.gate.limits import Check
from deepseek_triton.builders.lifecycle.gate.measure import SPEED_PROMPT, SPEED_TOKENS, GateFigures, prompt_of
from deepseek_triton.builders.lifecycle.learning.examples import Lesson
from deepseek_triton.builders.lifecycle.learning.loss import parts
from deepseek_triton.builders.lifecycle.learning.tokens import TokenSequence, tokenize
from deepseek_triton.builders.repository.models.built import BuiltModel
from deepseek_triton.ensemble.artefacts.manifest import ManifestError
from deepseek_triton.ensemble.engine.runners.base import Ids, Logits, PagedRunner, RunnerError
from deepseek_triton.ensemble.engine.runners.load import load_runner
from deepseek_triton.ensemble.protocol.pipelines import TOKENIZER_SUFFIX, model_name
from deepseek_triton.ensemble.protocol.settings import EngineSettings, SettingsError

if TYPE_CHECKING:
    from deepseek_triton.ensemble.text.tokenizer import Tokenizer


class BuiltSubject:
    """The newest version of a model in a repository, loaded into this process.

    Raises:
        BuildError: it can't be loaded here, or it doesn't generate text.
    """

    def __init__(self, repository: Path, name: str) -> None:
        from deepseek_triton.ensemble.text.errors import TokenizerLoadError
        from deepseek_triton.ensemble.text.tokenizer import Tokenizer

        model = BuiltModel.read(repository, name)
        if model.task != "generate":
            raise BuildError(f"{name} scores: the gate judges models that generate text")
        version = model.versions[-1]
        parameters = {key: value.string_value for key, value in model.configs[model.engine].parameters.items()}
        tokenizer_dir = repository / model_name(name, TOKENIZER_SUFFIX) / str(version)
        try:
            settings = EngineSettings.from_parameters(parameters)
            self._manifest, self._runner = load_runner(model.version_dir(version), settings)
            self._tokenizer: Tokenizer = Tokenizer.from_directory(tokenizer_dir)
        except (ManifestError, RunnerError, SettingsError, TokenizerLoadError) as error:
            raise BuildError(f"{name} can't be judged here: {error}") from error
        self._chunk_len = settings.max_num_batched_tokens
        self._num_slots = self._runner.max_num_seqs
        if isinstance(self._runner, PagedRunner) and self._runner.num_blocks:
            self._give_blocks(self._runner)

    def measure(self, data: Mapping[str, Sequence[Lesson]], checks: Sequence[Check], window_len: int) -> GateFigures:
        """Everything but speed.

        Raises:
            BuildError: data has no token to predict, a check's chat doesn't fit the template, or the runner failed.
        """
        losses = {}
        window_len = min(window_len, self._runner.max_seq_len)
        try:
            for name, examples in data.items():
                sequences = tokenize(examples, self._tokenizer, window_len, self._manifest.end_ids[0])
                if not sequences:
                    raise BuildError(f"no example of the {name} data is held out: the gate has nothing to judge by")
                total = sum(self._summed_loss(part) for part in parts(sequences, self._num_slots))
                losses[name] = total / sum(int(one.is_learnt.sum()) for one in sequences)
            answers = {check.name: self._answer(check) for check in checks}
        except RunnerError as error:
            raise BuildError(f"{self._manifest.name} can't be judged here: {error}") from error
        num_bytes = sum(file.bytes for file in self._manifest.files.values())
        return GateFigures(losses, answers, num_bytes, highest_memory())

    def tokens_per_s(self) -> float:
        """Tokens a second of one greedy answer, in this process: to compare two builds, not to promise a speed."""
        prompt = np.arange(SPEED_PROMPT) % self._runner.vocab_size
        begin = time.perf_counter()
        self._generate(prompt, SPEED_TOKENS, ends=())
        return SPEED_TOKENS / (time.perf_counter() - begin)

    def _summed_loss(self, sequences: Sequence[TokenSequence]) -> float:
        """The cross-entropy of the learnt tokens in nats: prefills up to the first, then a decode for each token.

        The slots are sorted by what they have left, so that those which still run are the first ones.
        """
        spans = [np.flatnonzero(one.is_learnt)[[0, -1]] for one in sequences]
        order = sorted(range(len(sequences)), key=lambda index: spans[index][0] - spans[index][1])
        sequences, spans = [sequences[index] for index in order], [spans[index] for index in order]
        total = 0.0
        for slot, (one, (first, _)) in enumerate(zip(sequences, spans, strict=True)):
            total += float(_cross_entropy(self._prefill(slot, one.ids[:first])[None], one.ids[first : first + 1])[0])
        for step in range(int(spans[0][1] - spans[0][0])):
            running = [index for index, (first, last) in enumerate(spans) if first + step < last]
            positions = np.array([spans[index][0] + step for index in running], np.int64)
            rows = list(zip((sequences[index] for index in running), positions, strict=True))
            logits = self._runner.decode(np.array([one.ids[at] for one, at in rows], np.int64), positions)
            found = _cross_entropy(logits, np.array([one.ids[at + 1] for one, at in rows], np.int64))
            total += float(found[[bool(one.is_learnt[at + 1]) for one, at in rows]].sum())
        return total

    def _answer(self, check: Check) -> str:
        ids = prompt_of(check, self._tokenizer, self._runner.max_seq_len)
        room = self._runner.max_seq_len - len(ids)
        return self._tokenizer.decode(self._generate(ids, min(check.max_tokens, room), self._manifest.end_ids))

    def _generate(self, prompt: Ids, num_tokens: int, ends: Sequence[int]) -> list[int]:
        """The likeliest tokens, up to one of `ends`, which is left out."""
        logits, found = self._prefill(0, prompt), list[int]()
        while True:
            token = int(np.argmax(logits))
            if token in ends:
                return found
            found.append(token)
            if len(found) == num_tokens:
                return found
            position = np.array([len(prompt) + len(found) - 1])
            logits = self._runner.decode(np.array([token]), position)[0]

    def _prefill(self, slot: int, ids: Ids) -> Logits:
        for start in range(0, len(ids), self._chunk_len):
            logits = self._runner.prefill(slot, ids[start : start + self._chunk_len], start)
        return logits

    def _give_blocks(self, runner: PagedRunner) -> None:
        """Each slot gets blocks for a whole sequence; there are as many slots as the blocks suffice for."""
        length = -(-self._runner.max_seq_len // runner.block_size)
        self._num_slots = min(self._num_slots, runner.num_blocks // length)
        for slot in range(self._num_slots):
            runner.set_blocks(slot, 0, range(1 + slot * length, 1 + (slot + 1) * length))


def highest_memory() -> int:
    """Bytes: this process's highest resident memory, and what torch took of the GPU if it computes there."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    own = next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM:"))
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        own += int(torch.cuda.max_memory_reserved())
    return own


def _cross_entropy(logits: Logits, wanted: Ids) -> NDArray[np.float64]:
    """logits: [n, vocab_size], wanted: [n]; nats of each [n]."""
    values = logits.astype(np.float64)
    values -= values.max(axis=-1, keepdims=True)
    nats: NDArray[np.float64] = np.log(np.exp(values).sum(axis=-1)) - values[np.arange(len(wanted)), wanted]
    return nats
