"""The options of a scoring build on the command line."""

from __future__ import annotations

import argparse

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.scoring.options import Batching, ScoringOptions, read_template
from deepseek_triton.ensemble.scoring.profile import NORMALISATIONS, PLACE

BATCHING = {
    "max_batch_size": "texts in one batch",
    "max_queue_delay_us": "longest time that a request waits for others to share a batch, in microseconds",
    "queue_timeout_us": "time in the queue after which a request is rejected, in microseconds; 0: never",
    "max_queue_size": "requests that may wait; more are rejected; 0: no limit",
    "engine_instances": "batches computed at the same time, each with a copy of the weights; on a CPU they share its "
    "cores",
}


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
        help="for onnx: tokens computed in one pass, padding included (default: %(default)s)",
    )
    group.add_argument(
        "--preferred-batch-sizes", metavar="N,M,…", help="sizes of batches that go at once (default: full ones)"
    )
    for name, what in BATCHING.items():
        group.add_argument(
            "--" + name.replace("_", "-"),
            type=int,
            default=getattr(Batching, name),
            metavar="N",
            help=f"{what} (default: %(default)s)",
        )


def read_scoring_options(arguments: argparse.Namespace) -> ScoringOptions:
    """What was asked for.

    Raises:
        BuildError: a value is at fault.
    """
    try:
        preferred = tuple(int(size) for size in (arguments.preferred_batch_sizes or "").split(",") if size)
    except ValueError:
        text = arguments.preferred_batch_sizes
        raise BuildError(f"preferred_batch_sizes is {text!r}, must be numbers with commas between them") from None
    return ScoringOptions(
        template=read_template(arguments.template),
        is_chat=arguments.chat,
        labels=split_labels(arguments.labels),
        label_prefix=arguments.label_prefix,
        normalisation=arguments.normalisation,
        max_pass_tokens=arguments.max_pass_tokens,
        batching=Batching(preferred_batch_sizes=preferred, **{name: getattr(arguments, name) for name in BATCHING}),
    )


def split_labels(text: str | None) -> tuple[str, ...]:
    """Labels with commas between them: "a, b" → ("a", "b"); None → ()."""
    return () if text is None else tuple(label.strip() for label in text.split(","))
