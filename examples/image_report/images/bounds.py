"""How large an image may be. Everything is checked before a pixel is decoded."""

MAX_BYTES = 8 * 2**20  # of the file
MAX_PIXELS = 24_000_000
MIN_SIDE, MAX_SIDE = 16, 16_384  # pixels
MAX_SCANS = 32  # of a progressive JPEG: each of them costs a pass over all pixels
MAX_PARTS = 4096  # segments of a JPEG, chunks of a PNG
