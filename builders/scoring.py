"""The parts of a scoring model that are data: its profile, tried with its own tokenizer, and its configurations."""

from __future__ import annotations

from pathlib import Path

from builders import pbtxt
from builders.errors import BuildError
from builders.options import BuildOptions
from builders.scoring_options import ScoringOptions
from ensemble.pipelines import SCORE_PIPELINE
from ensemble.scoring.settings import ScoringSettings
from ensemble.settings import EngineSettings


def scoring_configs(options: BuildOptions, hidden_size: int) -> tuple[pbtxt.ModelConfig, ...]:
    """Every config.pbtxt of the scoring model `options.name`."""
    batching = options.scoring.batching
    if options.target == "onnx":
        settings = ScoringSettings(EngineSettings(**options.settings).num_threads, options.scoring.max_pass_tokens)
        engine = pbtxt.score_engine_config(options.name, hidden_size, batching, settings.to_parameters())
    else:
        engine = pbtxt.score_plan_config(options.name, hidden_size, batching)
    return (
        pbtxt.score_tokenizer_config(options.name),
        pbtxt.scorer_config(options.name, hidden_size),
        engine,
        pbtxt.ensemble_config(options.name, SCORE_PIPELINE, min(batching.max_batch_size, pbtxt.TEXT_MAX_BATCH_SIZE)),
    )


def write_profile(scoring: ScoringOptions, max_seq_len: int, *, is_plan: bool, tokenizer: Path, scorer: Path) -> None:
    """Write scoring.json beside the tokenizer and the scorer, after a first prompt has been made with it.

    Raises:
        BuildError: the template or the labels are at fault, or leave no room for a text.
    """
    from ensemble.scoring.prompts import Prompter
    from ensemble.text import Tokenizer

    profile = scoring.profile(max_seq_len, is_plan=is_plan)
    try:
        prompter = Prompter(profile, Tokenizer.from_directory(tokenizer))
        prompter.row("x", None, profile.labels or ("a", "b"))
    except ValueError as error:  # ProfileError, TextError: one line each
        raise BuildError(f"the scoring prompt can't be made: {error}") from error
    for directory in (tokenizer, scorer):
        profile.save(directory)
