"""Linear layers whose weights are integers in small blocks, each with a scale of its own."""
