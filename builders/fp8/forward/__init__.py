"""The forward pass of a decoder layer in arrays of NumPy or torch. Parts that have none run in ONNX Runtime.

`layer.py` composes the parts; each has a file of its own.
"""
