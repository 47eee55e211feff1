"""The way to Triton."""
