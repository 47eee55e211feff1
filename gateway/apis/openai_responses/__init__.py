"""OpenAI's `/v1/responses`: items in, items out; kept for later turns, and computed in the background if asked."""
