"""Who has which part of a runner's KV cache: whole slots, or blocks that sequences share. Nothing is computed here."""
