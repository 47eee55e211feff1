# Two images on NVIDIA's Triton: `builder` makes model repositories, `serve`, the last and so the default, runs one.
#
#   docker build --target builder -t deepseek-triton-builder .
#   docker run --rm -v "$PWD:/data" deepseek-triton-builder CHECKPOINT --name NAME
#
#   docker build -t deepseek-triton .
#   docker run --rm --gpus all -p 8000:8000 -p 8001:8001 -v "$PWD/model_repository:/models:ro" deepseek-triton
#
# Without a GPU, `docker build --build-arg RUNNERS=serve` leaves torch out, and `docker run` has no --gpus.
# Both run as uid 1000: it must be able to write the directory that is mounted as /data, and to read /models.

# Triton before 26.07 has known holes. One tag for both: what is built fits the server's Python and libraries.
ARG TRITON_TAG=26.07-py3

FROM nvcr.io/nvidia/tritonserver:${TRITON_TAG} AS triton
# A directory of our own: the system's packages stay as they are. A .pth file puts it first on every Python's path, the
# embedded one of Triton's Python stubs among them, which doesn't always read PYTHONPATH.
ENV PACKAGES=/opt/deepseek-triton
RUN python3 -c "import os, site; open(site.getsitepackages()[0] + '/deepseek-triton.pth', 'w').write(f'import sys; sys.path.insert(0, {os.environ[\"PACKAGES\"]!r})\n')"
WORKDIR /src

# checkpoint → /data/model_repository
FROM triton AS builder
COPY pyproject.toml README.md LICENSE ./
COPY deepseek_triton deepseek_triton
COPY ensemble ensemble
COPY clients clients
COPY builders builders
# `serve` too: the graph is made for the ONNX Runtime that will run it.
RUN python3 -m pip install --no-cache-dir --target="$PACKAGES" '.[build,serve]'
RUN rm -r /src
ENV PATH=/opt/deepseek-triton/bin:$PATH
USER 1000:1000
WORKDIR /data
ENTRYPOINT ["deepseek-triton", "build"]
CMD ["--help"]

# /models → tokens
FROM triton AS serve
# `serve` runs onnx and plans, `cuda` the cuda runner.
ARG RUNNERS=serve,cuda
COPY pyproject.toml README.md LICENSE ./
COPY deepseek_triton deepseek_triton
COPY ensemble ensemble
RUN python3 -m pip install --no-cache-dir --target="$PACKAGES" ".[$RUNNERS]"
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
SHELL ["/bin/sh", "-c"]
CMD restricted="shared-memory,model-config,model-repository,statistics,trace,logging"; \
    key="x-triton-admin=${TRITON_ADMIN_KEY:-$(cat /proc/sys/kernel/random/uuid)}"; \
    exec tritonserver --model-repository=/models --disable-auto-complete-config --exit-timeout-secs=10 \
    --grpc-keepalive-time=1000 --grpc-keepalive-timeout=1000 --grpc-http2-max-pings-without-data=0 \
    --http-restricted-api="$restricted:$key" --grpc-restricted-protocol="$restricted:$key"
