"""What a model needs of GPUs before any is bought: bytes, a split, times, tokens/s and their price."""
