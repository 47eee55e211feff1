"""Parsing of tool calls in a model's streamed text, and the formats in which models write them."""
