"""The options of a scoring build on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Container

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.scoring.options import Batching, ScoringOptions, read_template
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from deepseek_triton.ensemble.scoring.profile import NORMALISATIONS, PLACE
from deepseek_triton.ensemble.scoring.settings import ScoringSettings

# Options that an engine which generates text has too; they are added with its settings.
SHARED_OPTIONS = frozenset(Batching.table()) & frozenset(EngineSettings.table())


def add_scoring_arguments(group: argparse._ArgumentGroup) -> None:
    """Add what `read_scoring_options` reads."""
    group.add_argument(
        "--labels", metavar="A,B,…", help="labels for requests that bring none (default: every request must)"
    )
    group.add_argument(
        "--template",
        default=ScoringOptions.template,
        metavar="TEXT",
        help=f"prompt with {PLACE} in it, or a file that holds one (default: %(default)s)",
    )
    group.add_argument("--chat", action="store_true", help="put the filled template through the chat template")
    group.add_argument(
        "--label-prefix", metavar="TEXT", help="text before each label (default: a space; with --chat nothing)"
    )
    group.add_argument(
        "--normalisation",
        default=ScoringOptions.normalisation,
        choices=NORMALISATIONS,
        help="how the log probabilities of a label's tokens become its score (default: %(default)s)",
    )
    group.add_argument(
        "--max-pass-tokens",
        type=int,
        default=ScoringOptions.max_pass_tokens,
        metavar="N",
        help=f"where the model runs on a CPU: {ScoringSettings.table()['max_pass_tokens'].help} (default: %(default)s)",
    )
    group.add_argument(
        "--preferred-batch-sizes", metavar="N,M,…", help="sizes of batches that go at once (default: full ones)"
    )
    for name, setting in Batching.table().items():
        if name not in SHARED_OPTIONS:
            group.add_argument(
                setting.option,
                type=setting.kind,
                default=setting.default,
                metavar="N",
                help=f"{setting.help} (default: %(default)s)",
            )


def read_scoring_options(arguments: argparse.Namespace, without: Container[str] = ()) -> ScoringOptions:
    """The options that were given, but for those of the queue in `without`.

    Raises:
        BuildError: a value is at fault.
    """
    try:
        preferred = tuple(int(size) for size in (arguments.preferred_batch_sizes or "").split(",") if size)
    except ValueError:
        text = arguments.preferred_batch_sizes
        raise BuildError(f"preferred_batch_sizes is {text!r}, must be numbers with commas between them") from None
    given = {name: getattr(arguments, name) for name in Batching.table() if name not in without}
    batching = {name: value for name, value in given.items() if value is not None}
    return ScoringOptions(
        template=read_template(arguments.template),
        is_chat=arguments.chat,
        labels=split_labels(arguments.labels),
        label_prefix=arguments.label_prefix,
        normalisation=arguments.normalisation,
        max_pass_tokens=arguments.max_pass_tokens,
        batching=Batching(preferred_batch_sizes=preferred, **batching),
    )


def split_labels(text: str | None) -> tuple[str, ...]:
    """Labels with commas between them: "a, b" → ("a", "b"); None → ()."""
    return () if text is None else tuple(label.strip() for label in text.split(","))
