"""Finding the configuration of a built model that serves most within a latency limit."""
