"""The forward pass of each part of a decoder layer: one file a part, composed by decoder.py.

A file holds the part's weights, as they are stored (`ensemble/decoder/` declares them), and one class for each way to
run it: prefill and decode of many rows add to a `Residual`; decode of one row, by matrix-vector kernels, adds to the
residual stream itself. An object of such a class lives for one forward pass over all layers, and owns its scratch
memory.
"""
