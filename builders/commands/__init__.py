"""The command line's longer commands: with builders/cli.py the one place that starts servers and clients."""
