# Two images on NVIDIA's Triton: `builder` makes model repositories, `serve`, the last and so the default, runs one; and
# `gateway` on a slim Python, which speaks OpenAI's and Anthropic's APIs.
#
#   docker build --target builder -t deepseek-triton-builder .
#   docker run --rm -v "$PWD:/data" deepseek-triton-builder CHECKPOINT --name NAME --repository models
#
#   docker build -t deepseek-triton .
#   docker run --rm --gpus all --shm-size 1g -p 8000:8000 -p 8001:8001 -v "$PWD/models:/models:ro" deepseek-triton
#
# Without a GPU, `docker build --build-arg RUNNERS=serve` leaves torch out, and `docker run` has no --gpus.
# All run as uid 1000: it must be able to write the directory that is mounted as /data, and to read /models. `serve` and
# `gateway` write nothing but /tmp, /dev/shm and, for batches, the gateway's /files: `docker run --read-only --tmpfs /tmp`
# will do. deploy/compose.yaml has all.

# Before 26.11 Triton cancels gRPC streams in silence under backpressure, and uses freed memory in its batcher. One tag for both: what is built fits the server's Python and libraries.
ARG TRITON_TAG=26.11-py3

FROM nvcr.io/nvidia/tritonserver:${TRITON_TAG} AS triton
# A directory of our own: the system's packages stay as they are. A .pth file puts it first on every Python's path, the
# embedded one of Triton's Python stubs among them, which doesn't always read PYTHONPATH.
ENV PACKAGES=/opt/deepseek-triton
RUN python3 -c "import os, site; open(site.getsitepackages()[0] + '/deepseek-triton.pth', 'w').write(f'import sys; sys.path.insert(0, {os.environ[\"PACKAGES\"]!r})\n')"
WORKDIR /src

# The compiled operators of target onnx: what builds and serves has no compiler.
FROM triton AS kernels
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY ensemble/engine/runners/onnx/kernels .
# On other processors than x86-64 the folder stays empty: ONNX Runtime computes there.
RUN mkdir /compiled && if [ "$(uname -m)" = x86_64 ]; then \
    gcc -std=gnu11 -O2 -fvisibility=hidden -shared -fPIC ./*.c -o /compiled/_blocks.abi3.so -lm; fi

# checkpoint → a repository below /data
FROM triton AS builder
COPY pyproject.toml README.md LICENSE ./
COPY deepseek_triton deepseek_triton
COPY ensemble ensemble
COPY clients clients
COPY builders builders
# `serve` too: the graph is made for the ONNX Runtime that will run it.
RUN python3 -m pip install --no-cache-dir --target="$PACKAGES" '.[build,serve]'
COPY --from=kernels /compiled/ $PACKAGES/deepseek_triton/ensemble/engine/runners/onnx/kernels/
RUN rm -r /src
ENV PATH=/opt/deepseek-triton/bin:$PATH
USER 1000:1000
WORKDIR /data
ENTRYPOINT ["deepseek-triton", "build"]
CMD ["--help"]

# A client's HTTP → Triton's gRPC
FROM python:3.12-slim AS gateway
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY deepseek_triton deepseek_triton
COPY ensemble ensemble
COPY clients clients
COPY gateway gateway
RUN python3 -m pip install --no-cache-dir '.[gateway]'
RUN rm -r /src && install -d -m 0700 -o 1000 -g 1000 /files
USER 1000:1000
WORKDIR /
ENV DEEPSEEK_GATEWAY_HOST=0.0.0.0 DEEPSEEK_GATEWAY_FILES_DIR=/files
EXPOSE 9000
HEALTHCHECK --start-period=1m --interval=15s --timeout=5s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9000/health/live', timeout=4)"]
ENTRYPOINT ["deepseek-gateway"]
CMD ["serve"]

# /models → tokens
FROM triton AS serve
# `serve` runs onnx and plans, `cuda` the cuda runner.
ARG RUNNERS=serve,cuda
COPY pyproject.toml README.md LICENSE ./
COPY deepseek_triton deepseek_triton
COPY ensemble ensemble
RUN python3 -m pip install --no-cache-dir --target="$PACKAGES" ".[$RUNNERS]"
COPY --from=kernels /compiled/ $PACKAGES/deepseek_triton/ensemble/engine/runners/onnx/kernels/
# Triton imports packages; their commands are of no use here.
RUN rm -r /src /opt/deepseek-triton/bin
USER 1000:1000
WORKDIR /
VOLUME /models
EXPOSE 8000 8001 8002
# Loading a large model takes minutes.
HEALTHCHECK --start-period=10m --interval=15s --timeout=5s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]
# What inference doesn't need is for those who know $TRITON_ADMIN_KEY: as the header x-triton-admin, over gRPC as
# triton-grpc-protocol-x-triton-admin. Without a key a random one, which nobody knows, closes it.
# The module is process 1: it keeps the key off the command line, passes signals on and reaps dead processes.
SHELL ["/bin/sh", "-c"]
# hadolint ignore=DL3025
CMD exec python3 -m deepseek_triton.ensemble.server.container tritonserver \
    --model-repository=/models --disable-auto-complete-config --exit-timeout-secs=10 \
    --grpc-keepalive-time=1000 --grpc-keepalive-timeout=1000 --grpc-http2-max-pings-without-data=0 \
    --grpc-header-forward-pattern="^user-agent$"
