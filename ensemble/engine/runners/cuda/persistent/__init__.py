"""Batch 1 in a single persistent kernel (kernels/persistent/): a family of decoders is a module here and its source.

It needs bulk copies to shared memory (Hopper and later). Where it can't run, kernels of many launches compute the same.
"""
