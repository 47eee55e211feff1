"""Image → ResNet → text → report as one Triton ensemble, on synthetic tiles. It is no medical device."""
