"""The command `keys`: makes, lists, changes, renews and revokes keys. A gateway that runs sees it within a second."""

from __future__ import annotations

import argparse
import asyncio
import os
from dataclasses import replace

from deepseek_triton.gateway.protection.keys.api_key import LIMITS, MAX_DAYS, ApiKey, after_days, now
from deepseek_triton.gateway.protection.keys.store import KeyStore, KeyStoreError, open_store
from deepseek_triton.gateway.settings import SETTINGS

SETTING = next(setting for setting in SETTINGS if setting.field == "keys")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands below `keys`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = commands.add_parser("add", help="make a key, and print it: it is shown this once")
    add.add_argument("name", help="what the key is for")
    for limit in LIMITS:
        words = limit.replace("_", " ").replace("max running", "requests at one time")
        add.add_argument(
            f"--{limit.replace('_', '-')}", type=int, help=f"{words} of this key; 0: no limit (default: the gateway's)"
        )
    add.add_argument(
        "--no-collect", dest="is_collected", action="store_false", default=None,
        help="its answers are never collected, whatever the gateway's setting and its requests say",
    )  # fmt: skip
    add.add_argument(
        "--expires-days", type=float, metavar="DAYS", help="it expires after so many days (default: never)"
    )
    renew = commands.add_parser("renew", help="say anew when a key expires")
    renew.add_argument("id", help="the key's id, as `list` shows it")
    renew.add_argument("days", help=f"so many days from now, at most {MAX_DAYS}, or `never`")
    collect = commands.add_parser("collect", help="say whether a key's answers may be collected")
    collect.add_argument("id", help="the key's id, as `list` shows it")
    collect.add_argument("may", choices=("on", "off"), help="off: never, whatever the gateway's setting says")
    listing = commands.add_parser("list", help="list the keys, without what opens the door")
    revoke = commands.add_parser("revoke", help="refuse a key from now on")
    revoke.add_argument("id", help="the key's id, as `list` shows it")
    runs = {add: _add, renew: _renew, collect: _collect, listing: _list, revoke: _revoke}
    for command, run in runs.items():
        command.add_argument(
            SETTING.option, dest="place", default=os.environ.get(SETTING.variable, ""), help="the file, or redis://…"
        )
        command.set_defaults(run=_with_store, use=run)


def _with_store(arguments: argparse.Namespace) -> int:
    if not arguments.place:
        raise ValueError(f"say where the keys are kept: {SETTING.option}, or {SETTING.variable}")

    async def use() -> None:
        store = open_store(arguments.place)
        try:
            await arguments.use(store, arguments)
        except KeyStoreError as error:
            raise OSError(str(error)) from error
        finally:
            await store.close()

    asyncio.run(use())
    return 0


async def _add(store: KeyStore, arguments: argparse.Namespace) -> None:
    limits = {limit: getattr(arguments, limit) for limit in LIMITS}
    expires = None if arguments.expires_days is None else after_days(arguments.expires_days)
    key, text = ApiKey.make(arguments.name, is_collected=arguments.is_collected, expires=expires, **limits)
    await store.add(key)
    print(text)


async def _list(store: KeyStore, arguments: argparse.Namespace) -> None:
    for key in await store.all():
        limits = [f"{limit}={getattr(key, limit)}" for limit in LIMITS if getattr(key, limit) is not None]
        choices = [] if key.is_collected is not False else ["never collected"]
        print("  ".join((key.id, key.created, _state(key), key.name, *limits, *choices)))


def _state(key: ApiKey) -> str:
    if key.revoked:
        return f"revoked {key.revoked}"
    if key.expires is None:
        return "valid"
    return f"{'valid until' if key.is_valid else 'expired'} {key.expires}"


async def _renew(store: KeyStore, arguments: argparse.Namespace) -> None:
    expires = None if arguments.days == "never" else after_days(_days(arguments.days))
    await store.replace(replace(await _find(store, arguments.id), expires=expires))


def _days(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"days must be a number, at most {MAX_DAYS}, or `never`, got {text!r}") from None


async def _collect(store: KeyStore, arguments: argparse.Namespace) -> None:
    await store.replace(replace(await _find(store, arguments.id), is_collected=arguments.may == "on"))


async def _revoke(store: KeyStore, arguments: argparse.Namespace) -> None:
    found = await _find(store, arguments.id)
    if found.revoked is None:
        await store.replace(replace(found, revoked=now()))


async def _find(store: KeyStore, key_id: str) -> ApiKey:
    found = {key.id: key for key in await store.all()}.get(key_id)
    if found is None:
        raise ValueError(f"there is no key with the id {key_id!r}; `keys list` shows them")
    return found
