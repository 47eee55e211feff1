"""Which model and which server answer a request: shares of canaries, fallbacks, and several servers with breakers."""
