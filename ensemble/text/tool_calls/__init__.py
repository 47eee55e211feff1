"""Tool calls in a model's text: the formats, and the parser that reads them while they stream."""
