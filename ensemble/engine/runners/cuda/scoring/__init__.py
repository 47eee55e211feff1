"""Scoring on one GPU: rows become sequences that share blocks of the cache, and a pass computes many of them."""
