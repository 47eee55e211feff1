"""Batches: files of requests, whose lines become jobs of the queue and whose results become files."""
