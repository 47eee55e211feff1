"""Triton kernels: what is computed, on whatever tensors they are given; how many and when is the decoder's business."""
