"""The queue of jobs in Redis, what runs them, and the webhooks that tell of their end."""
