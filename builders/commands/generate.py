"""`deepseek-triton generate`: the client's own command."""

from deepseek_triton.clients.cli import add_generate_arguments as add_arguments
from deepseek_triton.clients.cli import run_generate as run

__all__ = ["add_arguments", "run"]
