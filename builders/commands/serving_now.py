"""Which versions of a model a running server has loaded, asked with the options of `clients.cli`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.clients.cli import URL_VARIABLE, add_connection_arguments

ASK_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Serving:
    """What the server that was asked has under a model's name.

    loaded: the versions, ascending; () for none, None if no server answers. is_other: they are of another repository's
    model.
    """

    loaded: tuple[int, ...] | None
    is_other: bool = False

    @property
    def versions(self) -> tuple[int, ...] | None:
        """The versions that are this repository's."""
        return () if self.is_other else self.loaded


def where(arguments: argparse.Namespace) -> str:
    """The address that is asked."""
    from deepseek_triton.clients.address import read_address

    return read_address(arguments.url, arguments.protocol)[1]


def describe_server(arguments: argparse.Namespace, served: Mapping[str, Serving]) -> str:
    """One line: what the server that was asked answers with, by the models' names."""
    from deepseek_triton.clients.address import read_address
    from deepseek_triton.clients.server.listener import explain_address

    protocol, address = read_address(arguments.url, arguments.protocol)
    if all(one.loaded is None for one in served.values()):
        reason = explain_address(protocol, address) if served else None
        return reason or f"no server answers at {address}; name another with --url or {URL_VARIABLE}"
    loaded = [f"{name} version {', '.join(map(str, one.versions))}" for name, one in served.items() if one.versions]
    others = [name for name, one in served.items() if one.is_other]
    line = f"the server at {address} serves {'; '.join(loaded) or 'none of these models'}"
    return f"{line}; its {', '.join(others)} isn't this repository's" if others else line


def served_at_default(repository: Path, model: str) -> tuple[str, int] | None:
    """The address that the environment or tritonserver's default names, and the version of `model` that answers there.

    None if nothing answers, or nothing that has this repository's model.
    """
    parser = argparse.ArgumentParser()
    add_connection_arguments(parser)
    arguments = parser.parse_args([])
    try:
        versions = serving(arguments, repository, model).versions
    except (BuildError, ModuleNotFoundError):  # a malformed address, or no client is installed
        return None
    return (where(arguments), versions[-1]) if versions else None


def serving_all(arguments: argparse.Namespace, repository: Path, models: Sequence[str]) -> dict[str, Serving]:
    """`serving` of each model; a server that doesn't answer for one is not asked for the next."""
    found: dict[str, Serving] = {}
    for model in models:
        is_silent = any(one.loaded is None for one in found.values())
        found[model] = Serving(None) if is_silent else serving(arguments, repository, model)
    return found


def serving(arguments: argparse.Namespace, repository: Path, model: str) -> Serving:
    """What the server has under the model's name, and whether that is a build of this repository."""
    loaded = versions_served(arguments, model)
    return Serving(loaded, is_other=bool(loaded) and not _is_of(arguments, repository, model, loaded or ()))


def versions_served(arguments: argparse.Namespace, model: str) -> tuple[int, ...] | None:
    """The versions of `model` that answer, ascending; () if the server hasn't the model, None if no server answers."""
    from deepseek_triton.clients.address import read_address
    from deepseek_triton.clients.server.metadata import loaded_versions

    if not 0 < arguments.timeout < math.inf:
        raise BuildError(f"timeout is {arguments.timeout:g}, must be finite and above 0")
    try:
        protocol, url = read_address(arguments.url, arguments.protocol)
    except ValueError as error:
        raise BuildError(str(error)) from error
    return loaded_versions(protocol, url, model, min(arguments.timeout, ASK_TIMEOUT_S))


def _is_of(arguments: argparse.Namespace, repository: Path, model: str, loaded: tuple[int, ...]) -> bool:
    """Whether what is loaded lies in the repository: by the build's identity, where the server tells it."""
    from deepseek_triton.ensemble.artefacts.manifest import Manifest, ManifestError
    from deepseek_triton.ensemble.protocol.pipelines import ENGINE_SUFFIX, model_name

    engine = repository / model_name(model, ENGINE_SUFFIX)
    identities = {}
    for path in engine.glob("[0-9]*"):
        try:
            identities[path.name] = Manifest.load(path).identity
        except ManifestError:  # a damaged version may be what is loaded
            identities[path.name] = ""
    told = _told_identity(arguments, model)
    if told and "" not in identities.values():
        return told in identities.values()
    return {str(version) for version in loaded} <= set(identities)


def _told_identity(arguments: argparse.Namespace, model: str) -> str:
    """The identity that the server tells; empty if it doesn't, as one of an earlier version."""
    from deepseek_triton.clients.address import read_address
    from deepseek_triton.clients.connect import connect
    from deepseek_triton.clients.errors import ClientError

    protocol, url = read_address(arguments.url, arguments.protocol)
    try:
        with connect(protocol, model, url, min(arguments.timeout, ASK_TIMEOUT_S)) as client:
            return client.build_identity()
    except ClientError:
        return ""
