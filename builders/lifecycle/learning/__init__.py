"""New data → a checkpoint that knows it: examples, their tokens, LoRA."""
