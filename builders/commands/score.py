"""`deepseek-triton score`: the client's own command."""

from deepseek_triton.clients.score_cli import add_score_arguments as add_arguments
from deepseek_triton.clients.score_cli import run_score as run

__all__ = ["add_arguments", "run"]
