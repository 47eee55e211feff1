"""The page at `/`: models, health, live load, and a chat."""
