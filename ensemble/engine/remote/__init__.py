"""An engine whose tokens another model of the same Triton server computes: vLLM, through Triton's vLLM backend."""
