"""`deepseek-triton chat`: the client's own command."""

from deepseek_triton.clients.chat_cli import add_chat_arguments as add_arguments
from deepseek_triton.clients.chat_cli import run_chat as run

__all__ = ["add_arguments", "run"]
