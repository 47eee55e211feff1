"""tritonserver's options that keep some APIs for its administrator, and those that send its spans to a collector."""

from __future__ import annotations

from urllib.parse import urlsplit

# What inference doesn't need is for whoever knows the administrator's key.
RESTRICTED_APIS = "shared-memory,model-config,model-repository,statistics,trace,logging"
RESTRICTING_OPTIONS = ("http-restricted-api", "grpc-restricted-protocol")
ADMIN_HEADER = "x-triton-admin"
ADMIN_KEY = "TRITON_ADMIN_KEY"  # the environment variable that holds the administrator's key; without one it is random
TRACES_PATH = "/v1/traces"  # of OTLP over HTTP


def restricting_options(header: str, key: str) -> dict[str, str]:
    """Placeholder on the command line → the option that takes its place: it holds the key.

    Should the key not take the placeholder's place, nobody can send one with a line break.
    """
    return {
        f"--{option}={RESTRICTED_APIS}:{header}=\nhidden": f"--{option}={RESTRICTED_APIS}:{header}={key}"
        for option in RESTRICTING_OPTIONS
    }


def tracing_options(endpoint: str) -> tuple[str, ...]:
    """The options for OpenTelemetry's collector at `endpoint`, as http://localhost:4318; "": none.

    Triton joins the trace that a request's `traceparent` header names, over gRPC and HTTP; it makes a span for the
    request, for the ensemble and for each of its models (Triton 2.51).

    Raises:
        ValueError: it is no such address.
    """
    if not endpoint:
        return ()
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"trace_endpoint must be a collector's address, as http://localhost:4318, got {endpoint!r}")
    url = endpoint if parts.path.strip("/") else endpoint.rstrip("/") + TRACES_PATH
    values = ("mode=opentelemetry", "rate=1", "level=TIMESTAMPS", f"opentelemetry,url={url}")
    return tuple(f"--trace-config={value}" for value in values)
