"""`/v1/jobs`: requests that are answered later."""
