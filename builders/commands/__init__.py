"""One module for each command of `deepseek-triton`: `add_arguments(parser)` and `run(arguments)`, the exit status.

With builders/cli.py these are the only modules of builders/ that start servers and clients.
"""
