"""The forms of a decoder's graph: with a cache, with one node for all of attention, and one that scores."""
