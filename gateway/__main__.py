"""`python -m deepseek_triton.gateway`: the command `deepseek-gateway`."""

from deepseek_triton.extras import exit_with
from deepseek_triton.gateway.cli import main

exit_with(main)
