"""The gateway between people's programs and Triton: OpenAI's and Anthropic's APIs in, requests over gRPC out.

It imports `deepseek_triton.clients` and nothing else of the project.
"""
