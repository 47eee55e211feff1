"""The command `data`: exports and deletes what a gateway has collected. It may run beside the gateway."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from datetime import datetime, timedelta, timezone
from pathlib import Path

from deepseek_triton.gateway.collection.export import Selection, exported
from deepseek_triton.gateway.collection.files import KINDS, CollectionFiles
from deepseek_triton.gateway.collection.lines import AnswerId, encode
from deepseek_triton.gateway.collection.pseudonyms import Pseudonyms
from deepseek_triton.gateway.protection.keys.api_key import id_of
from deepseek_triton.gateway.settings import SETTINGS

SETTING = next(setting for setting in SETTINGS if setting.field == "collect")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands below `data`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    export = commands.add_parser("export", help="write the answers to a file for `deepseek-triton learn --data`")
    export.add_argument("file", type=Path, help="the file; one that exists is replaced")
    export.add_argument("--liked", action="store_true", help="only answers that were called good, or corrected")
    export.add_argument("--whole", action="store_true", help="only answers that ended by themselves")
    export.add_argument("--model", default="", help="only answers of this model")
    delete = commands.add_parser("delete", help="remove answers, and what was said of them")
    whose = delete.add_mutually_exclusive_group(required=True)
    whose.add_argument("--key", help="of this key: its id, as `keys list` shows it, or the key itself")
    whose.add_argument("--user", help="of this user, as requests name it")
    whose.add_argument("--request", help="of this request id, whatever key it came with")
    whose.add_argument("--older-than", type=int, metavar="DAYS", help="older than this many days")
    status = commands.add_parser("status", help="tell what is kept, without any text of it")
    for command, run in ((export, _export), (delete, _delete), (status, _status)):
        command.add_argument(
            SETTING.option, dest="place", default=os.environ.get(SETTING.variable, ""), help="the directory"
        )
        command.set_defaults(run=_with_files, use=run)


def _with_files(arguments: argparse.Namespace) -> int:
    if not arguments.place:
        raise ValueError(f"say where answers are collected: {SETTING.option}, or {SETTING.variable}")
    directory = Path(arguments.place).expanduser()
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory of collected answers")
    arguments.use(CollectionFiles(directory), arguments)
    return 0


def _export(files: CollectionFiles, arguments: argparse.Namespace) -> None:
    """Write the file as a whole, for its user alone to read."""
    path: Path = arguments.file
    labels: Counter[str] = Counter()
    descriptor, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            for line in exported(files, Selection(arguments.liked, arguments.whole, arguments.model)):
                labels[line["label"] or "no label"] += 1
                file.write(encode(line))
        if not labels:
            raise ValueError("no answer that was collected is such a one; no file was written")
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    told = ", ".join(f"{count} {label}" for label, count in sorted(labels.items()))
    print(f"{path}: {labels.total()} answers ({told})")


def _delete(files: CollectionFiles, arguments: argparse.Namespace) -> None:
    """Remove answers that are wanted, then what was said of them."""
    names = Pseudonyms(files.directory)
    member, value = "id", arguments.request or ""
    if arguments.key is not None:
        member, value = "owner", names.owner(id_of(arguments.key) or arguments.key)
    elif arguments.user is not None:
        member, value = "user", names.user(arguments.user)
    before = ""
    if arguments.older_than is not None:
        before = (datetime.now(timezone.utc) - timedelta(days=arguments.older_than)).isoformat(timespec="milliseconds")
    gone: set[AnswerId] = set()

    def is_wanted(line: dict[str, object]) -> bool:
        found = str(line["time"]) < before if before else line.get(member) == value
        if found:
            gone.add(AnswerId.of(line))
        return found

    answers = files.delete("answers", is_wanted)
    feedback = files.delete("feedback", lambda line: is_wanted(line) or AnswerId.of(line) in gone)
    print(f"deleted {answers} answers and {feedback} lines of feedback")


def _status(files: CollectionFiles, arguments: argparse.Namespace) -> None:
    for kind in KINDS:
        times = [line["time"] for line in files.read(kind)]
        print(f"{kind}: {len(times)}" + (f", from {min(times)} to {max(times)}" if times else ""))
    print(f"bytes: {files.num_bytes()}")
