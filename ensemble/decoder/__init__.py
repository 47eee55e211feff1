"""A decoder's structure, told once: dimensions, the parts of its layers, and the table of architectures.

Everything else derives from it: which tensors a checkpoint holds, what the graph computes, which linear layers are
quantised together, how the weights lie on the disk, and how they are sharded over GPUs. It needs the standard library
alone, and imports nothing else of the project.
"""
