"""`make example-image`: build the models of examples/image_report, serve them, and report on an image.

Without an image it makes a synthetic tile, whose truths it knows. With --page it then opens the gateway's page.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from deepseek_triton.clients.errors import ClientError
from deepseek_triton.command_parser import CommandParser
from deepseek_triton.ensemble.server.tritonserver import ServerError, TritonServer
from deepseek_triton.examples.image_report.client import ReportClient
from deepseek_triton.examples.image_report.findings import FINDINGS
from deepseek_triton.examples.image_report.report import NOTICE, read_report
from deepseek_triton.examples.image_report.repository import add_report_models
from deepseek_triton.examples.image_report.tiles import make_tile
from deepseek_triton.gateway.cli import main as deepseek_gateway
from scripts import demo

NAME = f"{demo.NAME}-report"
REPOSITORY = Path("build/image_report/models")
TILE = Path("build/image_report/tile.png")
TILES = Path("build/image_report/tiles")  # for examples/image_report/load.toml
NUM_TILES = 8


def build() -> None:
    """Build the text model unless it is there, and write the example's own models, and tiles for a load test."""
    demo.build(REPOSITORY)
    add_report_models(REPOSITORY, demo.NAME)
    TILES.mkdir(parents=True, exist_ok=True)
    for seed in range(NUM_TILES):
        make_tile(seed).image.save(TILES / f"{seed}.png")


def image_bytes(path: Path | None, seed: int) -> bytes:
    """The user's image, or a synthetic tile, which is kept to be looked at."""
    if path is not None:
        return path.read_bytes()
    tile = make_tile(seed)
    buffer = io.BytesIO()
    tile.image.save(buffer, "PNG")
    TILE.parent.mkdir(parents=True, exist_ok=True)
    TILE.write_bytes(buffer.getvalue())
    truths = [name for name, is_there in zip(FINDINGS, tile.truths, strict=True) if is_there]
    print(f"      {TILE}: a synthetic tile with {', '.join(truths) or 'no finding'}", flush=True)
    return buffer.getvalue()


def ask(url: str, image: bytes) -> None:
    """Stream one report, and print what it says."""
    begin, first, text = time.perf_counter(), 0.0, ""
    with ReportClient(url, demo.NAME) as client:
        for piece in client.stream(image):
            first = first or time.perf_counter()
            text += piece
            print(piece, end="", flush=True)
    end = time.perf_counter()
    print(f"\n\nfirst text after {first - begin:.1f} s, whole report after {end - begin:.1f} s")
    for finding in read_report(text).findings:
        print(f"      {finding.name:18} {finding.status:10} probability {finding.probability:.2f}")


def main(argv: Sequence[str]) -> int:
    """Build, serve, ask, stop. Returns the exit status."""
    parser = CommandParser(prog="example_image", description=f"{__doc__} {NOTICE}")
    parser.add_argument("image", type=Path, nargs="?", help="a JPEG or PNG file (default: a synthetic tile)")
    parser.add_argument("--seed", type=int, default=7, help="of the synthetic tile (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="then serve the page at http://127.0.0.1:9000/report")
    options = parser.parse_args(argv)
    try:
        build()
        print("[2/3] starting tritonserver", flush=True)
        with TritonServer(REPOSITORY, http_port=0, grpc_port=0, metrics_port=0) as server:
            print(f"[3/3] a report. {NOTICE}", flush=True)
            ask(server.grpc_url, image_bytes(options.image, options.seed))
            if options.page:
                print("the page is at http://127.0.0.1:9000/report; Ctrl-C stops everything", flush=True)
                served = ("--model", NAME, "--model", demo.NAME)
                return deepseek_gateway(["serve", "--backend-url", server.grpc_url, *served])
    except (ClientError, OSError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
