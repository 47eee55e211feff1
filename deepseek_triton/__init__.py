"""DeepSeek-family checkpoints served by NVIDIA Triton: builders, what runs inside Triton, clients, a
gateway, load tests.

The folders are links to those at the top of the repository.
"""
