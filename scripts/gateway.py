"""`make gateway`: build the demo model if need be, serve it, and open the gateway in front of it. Ctrl-C stops both."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

from deepseek_triton.clients import ClientError
from deepseek_triton.ensemble.server.tritonserver import ServerError, TritonServer
from deepseek_triton.gateway.cli import main as deepseek_gateway
from deepseek_triton.interrupts import interrupts_arrive
from scripts.demo import NAME, REPOSITORY, build


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@interrupts_arrive()
def main(options: list[str]) -> int:
    """Serve until interrupted. options: of `deepseek-gateway serve`."""
    signal.signal(signal.SIGTERM, _interrupt)  # until the gateway has handlers of its own
    try:
        build()
        print("[2/3] starting tritonserver", flush=True)
        with TritonServer(REPOSITORY, http_port=0, grpc_port=0, metrics_port=0) as server:
            print("[3/3] the gateway listens; Ctrl-C stops both", flush=True)
            return deepseek_gateway(["serve", "--backend-url", server.grpc_url, "--model", NAME, *options])
    except (ClientError, FileNotFoundError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
