"""Write a scoring model's profile, after trying it with the model's tokenizer, and make its configurations."""

from __future__ import annotations

from pathlib import Path

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository import pbtxt
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.scoring.options import ScoringOptions
from deepseek_triton.builders.targets import target_named


def scoring_configs(options: BuildOptions, hidden_size: int) -> tuple[pbtxt.ModelConfig, ...]:
    """Every config.pbtxt of the scoring model `options.name`."""
    batching = options.scoring.batching
    target = target_named(options.target)
    if target.scores_with_plan:
        engine = pbtxt.score_plan_config(options.name, hidden_size, batching)
    else:
        parameters = target.scoring_parameters(options.settings, options.scoring.max_pass_tokens)
        engine = pbtxt.score_engine_config(options.name, hidden_size, batching, parameters)
    return (
        pbtxt.score_tokenizer_config(options.name),
        pbtxt.scorer_config(options.name, hidden_size),
        engine,
        pbtxt.score_ensemble_config(options.name, hidden_size, batching, embeds=options.scoring.embeddings),
    )


def write_profile(
    scoring: ScoringOptions, max_seq_len: int, *, is_plan: bool, tokenizer: Path, scorer: Path
) -> list[int]:
    """Write scoring.json beside the tokenizer and the scorer, after making a prompt with it.

    Returns:
        The token ids that the prompts of all texts begin with.

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
    except ValueError as error:  # ScoringProfileError or TextError, one line each
        raise BuildError(f"the scoring prompt can't be made: {error}") from error
    for directory in (tokenizer, scorer):
        profile.save(directory)
    return prefix_ids
