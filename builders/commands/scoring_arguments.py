"""The options of a scoring build on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Container

from deepseek_triton.builders.repository.setting_options import add_setting_argument, given_values
from deepseek_triton.builders.scoring.options import Batching, ScoringOptions, read_template
from deepseek_triton.builders.targets import all_targets
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
        "--embeddings", action="store_true", help="answers also hold the hidden state at each prompt's end"
    )
    group.add_argument(
        "--max-pass-tokens",
        type=int,
        metavar="N",
        help=f"where no plan scores: {ScoringSettings.table()['max_pass_tokens'].help} (default: {_pass_tokens()})",
    )
    for name, setting in Batching.table().items():
        if name not in SHARED_OPTIONS:
            add_setting_argument(group, setting)


def read_scoring_options(arguments: argparse.Namespace, without: Container[str] = ()) -> ScoringOptions:
    """The options that were given, but for those of the queue in `without`.

    Raises:
        BuildError: a value is at fault.
    """
    batching = given_values(arguments, [one for name, one in Batching.table().items() if name not in without])
    own = given_values(arguments, [ScoringSettings.table()["max_pass_tokens"]])
    return ScoringOptions(
        template=read_template(arguments.template),
        is_chat=arguments.chat,
        labels=split_labels(arguments.labels),
        label_prefix=arguments.label_prefix,
        normalisation=arguments.normalisation,
        embeddings=arguments.embeddings,
        batching=Batching(**batching),
        given=frozenset(batching) | frozenset(own),
        **own,
    )


def _pass_tokens() -> str:
    """The default of --max-pass-tokens of each target that has it: "512; cuda: 4096"."""
    name, common = "max_pass_tokens", ScoringSettings.max_pass_tokens
    own = {target.name: target.own_settings.scoring_table()[name].default for target in all_targets()}
    return "; ".join([str(common), *(f"{target}: {value}" for target, value in own.items() if value != common)])


def split_labels(text: str | None) -> tuple[str, ...]:
    """Labels with commas between them: "a, b" → ("a", "b"); None → ()."""
    return () if text is None else tuple(label.strip() for label in text.split(","))
