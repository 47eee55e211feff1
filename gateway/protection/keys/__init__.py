"""API keys: what they are, where they are kept, and the middleware that asks for them."""
