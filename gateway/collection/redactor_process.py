"""The process that redacts: lists of texts come over a socket, redacted ones go back.

    python -m deepseek_triton.gateway.collection.redactor_process MODULE:FUNCTION SECONDS SOCKET

A function that takes longer than SECONDS ends this process, by a signal that no code of its own can hold up. So does
the gateway's end, whose side of the socket closes.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from deepseek_triton.gateway.collection.frames import receive, send


def load(name: str) -> Callable[[str], Any]:
    """The function called MODULE:FUNCTION. Raises `ValueError` if there is none."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"a redactor is MODULE:FUNCTION, got {name!r}")
    try:
        found = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the module does when it is imported
        raise ValueError(f"the redactor {name} can't be loaded: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"the redactor {name} is no function")
    return found


def redacted(function: Callable[[str], Any], texts: list[str]) -> list[str] | None:
    """Every text redacted; None: the function wants one not to be kept. Raises `TypeError` for another answer."""
    found = []
    for text in texts:
        one = function(text) if text else text
        if one is None:
            return None
        if not isinstance(one, str):
            raise TypeError(f"the redactor returned {type(one).__name__}, must be str or None")
        found.append(one)
    return found


def main() -> None:
    """Serve until the gateway's side closes. The first message tells whether the function was loaded."""
    name, seconds, descriptor = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the gateway's affair
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with socket.socket(fileno=descriptor) as connection:
        try:
            function = load(name)
        except ValueError as error:
            send(connection, json.dumps({"error": str(error)}).encode())
            return
        send(connection, b"{}")
        while (message := receive(connection)) is not None:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                answer: dict[str, Any] = {"texts": redacted(function, json.loads(message))}
            except Exception as error:  # the gateway drops the record, and counts it
                answer = {"error": f"{type(error).__name__}: {error}"}
            signal.setitimer(signal.ITIMER_REAL, 0)
            send(connection, json.dumps(answer).encode())


if __name__ == "__main__":
    main()
