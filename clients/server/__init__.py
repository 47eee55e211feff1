"""What a server tells of itself, and why a model can't do there what a command asks of it."""
