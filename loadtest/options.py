"""The options of `python -m deepseek_triton.loadtest.run`, and what is refused of them before anything starts."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from deepseek_triton.clients.address import MAX_PORT
from deepseek_triton.clients.nearest import name_hint
from deepseek_triton.command_parser import CommandParser
from deepseek_triton.loadtest import profile
from deepseek_triton.loadtest.profile import LoadProfileError
from deepseek_triton.loadtest.status import help_text

GATEWAY_PORT = 9000  # its default


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = CommandParser(
        prog="python -m deepseek_triton.loadtest.run",
        description="Load a served model with a profile, and report on it.",
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("profile", help=f"{', '.join(profile.names())}, or a .toml file")
    parser.add_argument("--model", default="smollm2", help="name of the served model (default: %(default)s)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiply the profile's rates or users (default: %(default)g)"
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="RESULT.json",
        help="judge speed by this run of the same profile on this machine (default: by the profile's levels, if they "
        "were measured on a machine like this one)",
    )
    parser.add_argument("--output", type=Path, help="directory (default: build/loadtest/PROFILE-TIME)")
    parser.add_argument(
        "--page", type=int, metavar="PORT", help="open Locust's own page here instead; 8089 is its usual"
    )
    parser.add_argument(
        "--shared-machine",
        action="store_true",
        help="CPU that other programs take is shown, and doesn't make the run invalid",
    )
    server = parser.add_argument_group("server (default: serve the repository, and stop afterwards)")
    server.add_argument("--repository", type=Path, default=Path("model_repository"), help="default: %(default)s")
    server.add_argument("--host", type=host_name, help="of a running tritonserver: nothing is started")
    server.add_argument(
        "--gateway",
        metavar="URL",
        help=f"of the gateway before it, for protocols openai and openai-stream (default: port {GATEWAY_PORT} of "
        "--host); its API key is read from OPENAI_API_KEY",
    )
    for protocol, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        server.add_argument(f"--{protocol}-port", type=port_of, default=port, help="of --host (default: %(default)s)")
    return parser


def host_name(text: str) -> str:
    """A host's name or address alone; an IPv6 address gets the brackets that a URL needs."""
    bare = text.removeprefix("[").removesuffix("]")
    if re.fullmatch(r"[0-9a-fA-F:.]*:[0-9a-fA-F:.]*:[0-9a-fA-F:.]*", bare):
        return f"[{bare}]"
    if not re.fullmatch(r"[^\s/:@?#\[\]]+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a host's name or address alone; ports have options of their own, as --http-port 8000"
        )
    return text


def port_of(text: str) -> int:
    """A port's number."""
    if not (text.isdecimal() and 0 < int(text) <= MAX_PORT):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: a whole number from 1 to {MAX_PORT}")
    return int(text)


def check_model(repository: Path, name: str) -> None:
    """Raise LoadProfileError unless the repository has the model: a server would be started in vain."""
    if not repository.is_dir():
        raise LoadProfileError(f"{repository} is not a directory; build a model first, or name another --repository")
    names = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
    if name not in names:
        raise LoadProfileError(f"{repository} has no model {name!r}{name_hint(name, names)}")
