"""What a line of a chat means that is no message: /help, /clear, /system, /save and the words that end the chat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deepseek_triton.clients.chat_history import ChatHistory
from deepseek_triton.clients.nearest import did_you_mean

EXIT_WORDS = ("/exit", "/quit", "exit", "quit")
COMMANDS: dict[str, str] = {
    "/help": "show these commands",
    "/clear": "forget the chat so far, but for the system's message",
    "/system": "TEXT: set the system's message; without TEXT, remove it",
    "/save": "FILE: write the chat as JSON",
    "/exit": "end the chat; so do exit, quit and Ctrl-D",
}
NOTES = (
    'Pasted lines are one message; so is a block between two lines of """.\n'
    "A line that begins with a space is sent as it is, whatever it begins with then."
)


def is_exit(line: str) -> bool:
    """Whether the line ends the chat."""
    return line.strip().lower() in EXIT_WORDS


def is_command(line: str) -> bool:
    """Whether the line is for `run_command`; one of several lines, pasted say, never is."""
    return line.startswith("/") and "\n" not in line.strip()


def run_command(line: str, history: ChatHistory) -> str:
    """Do what the line says; returns what to tell the user."""
    name, _, rest = line.strip().partition(" ")
    handler = _HANDLERS.get(name)
    if handler is None:
        meant = did_you_mean(name, COMMANDS)
        return f"there is no command {name}{meant}; /help lists them, a space before the / sends the line"
    return handler(history, rest.strip())


def _help(history: ChatHistory, rest: str) -> str:
    return "\n".join([*(f"{name:8} {what}" for name, what in COMMANDS.items()), NOTES])


def _clear(history: ChatHistory, rest: str) -> str:
    history.clear()
    return "the chat begins anew"


def _system(history: ChatHistory, rest: str) -> str:
    history.system = rest or None
    return "the system's message is set" if rest else "there is no system's message now"


def _save(history: ChatHistory, rest: str) -> str:
    if not rest:
        return "name a file: /save FILE"
    try:
        history.save(Path(rest))
    except OSError as error:
        return f"{rest} can't be written: {error.strerror}"
    return f"wrote {rest}"


_HANDLERS: dict[str, Callable[[ChatHistory, str], str]] = {
    "/help": _help,
    "/clear": _clear,
    "/system": _system,
    "/save": _save,
}
