"""docs/answer.svg, the README's picture: `make demo`'s output, line by line as it came, as an animated SVG.

    make demo | python scripts/answer_picture.py > docs/answer.svg

Lines appear one after the other and words of the answer too, as on a terminal; viewers without animations show all.
"""

from __future__ import annotations

import sys
from html import escape

COLUMNS, LINE_HEIGHT, CHARACTER = 100, 20, 8.4
STYLE = """text { font: 14px monospace; fill: #d0d7de; white-space: pre }
.w { animation: appear 0s both } @keyframes appear { from { opacity: 0 } to { opacity: 1 } }"""


def main() -> None:
    """Standard input to standard output."""
    lines = [line for line in sys.stdin.read().splitlines() if "|" not in line]  # without progress bars
    at = 0.3
    rows = []
    for number, line in enumerate(wrapped(lines)):
        spans, column = [], 0
        is_answer = not line.startswith(
            ("[", " ", "$", "built", "it took", "serve it", "a server", "time to", "server")
        )
        for word in line.split(" ") if is_answer else [line]:
            x, y = 16 + column * CHARACTER, 28 + number * LINE_HEIGHT
            style = f"animation-delay:{at:.2f}s"
            spans.append(f'<text class="w" style="{style}" x="{x:.1f}" y="{y}">{escape(word)}</text>')
            column += len(word) + 1
            at += 0.06 if is_answer else 0.4
        rows += spans
    width, height = int(32 + COLUMNS * CHARACTER), 28 + len(wrapped(lines)) * LINE_HEIGHT
    print(f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" role="img">')
    print(f'<style>{STYLE}</style><rect width="100%" height="100%" rx="8" fill="#0d1117"/>')
    print("\n".join(rows))
    print("</svg>")


def wrapped(lines: list[str]) -> list[str]:
    """No line longer than COLUMNS."""
    found = []
    for line in lines:
        while len(line) > COLUMNS:
            cut = line.rfind(" ", 0, COLUMNS)
            found.append(line[:cut])
            line = line[cut + 1 :]
        found.append(line)
    return found


if __name__ == "__main__":
    main()
