"""The parts of a scoring model that are data: its profile, tried with its own tokenizer, and its configurations."""

from __future__ import annotations

from pathlib import Path

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository import pbtxt
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.scoring.options import ScoringOptions
from deepseek_triton.builders.targets import target_named
from deepseek_triton.ensemble.protocol.pipelines import SCORE_PIPELINE
from deepseek_triton.ensemble.scoring.settings import ScoringSettings


def scoring_configs(options: BuildOptions, hidden_size: int) -> tuple[pbtxt.ModelConfig, ...]:
    """Every config.pbtxt of the scoring model `options.name`."""
    batching = options.scoring.batching
    if target_named(options.target).scores_with_plan:
        engine = pbtxt.score_plan_config(options.name, hidden_size, batching)
    else:
        settings = ScoringSettings(**options.settings, max_pass_tokens=options.scoring.max_pass_tokens)
        engine = pbtxt.score_engine_config(options.name, hidden_size, batching, settings.to_parameters())
    return (
        pbtxt.score_tokenizer_config(options.name),
        pbtxt.scorer_config(options.name, hidden_size),
        engine,
        pbtxt.ensemble_config(options.name, SCORE_PIPELINE, min(batching.max_batch_size, pbtxt.TEXT_MAX_BATCH_SIZE)),
    )


def write_profile(
    scoring: ScoringOptions, max_seq_len: int, *, is_plan: bool, tokenizer: Path, scorer: Path
) -> list[int]:
    """Write scoring.json beside the tokenizer and the scorer, after first prompts have been made with it.

    Returns:
        The ids that the prompts of all texts begin with.

    Raises:
        BuildError: the template or the labels are at fault, or leave no room for a text.
    """
    from deepseek_triton.ensemble.scoring.prompts import Prompter
    from deepseek_triton.ensemble.text.tokenizer import Tokenizer

    profile = scoring.profile(max_seq_len, is_plan=is_plan)
    try:
        prompter = Prompter(profile, Tokenizer.from_directory(tokenizer))
        prompter.row("x", None, profile.labels or ("a", "b"))
        prefix_ids = prompter.prefix_ids()
    except ValueError as error:  # ProfileError, TextError: one line each
        raise BuildError(f"the scoring prompt can't be made: {error}") from error
    for directory in (tokenizer, scorer):
        profile.save(directory)
    return prefix_ids
