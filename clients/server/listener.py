"""What answers at an address: Triton's HTTP, gRPC or metrics, or something else; and what to write instead.

It is asked only where a request has failed: a wrong port or path is the commonest reason.
"""

from __future__ import annotations

from typing import Literal

from deepseek_triton.clients.connect import DEFAULT_URLS, ProtocolName
from deepseek_triton.clients.server.metadata import read_host

Listener = Literal["http", "grpc", "metrics", "other", "nothing"]
PROBE_TIMEOUT_S = 2.0


def explain_address(protocol: ProtocolName, url: str) -> str | None:
    """Why no Triton answers at `url` as `protocol` has it, in one line; None if one does, or nothing answers at all."""
    host, port, path = read_host(url)
    address = host if port is None else f"{host}:{port}"
    found = what_listens(address, is_secure=url.startswith("https://"))
    ports = ", ".join(f"{name} {address.rpartition(':')[2]}" for name, address in DEFAULT_URLS.items())
    if found == "metrics":
        return f"{url} is the port of Triton's metrics; requests go to another one (by default {ports})"
    if found == "other":
        return f"what answers at {url} is no Triton; check --url (Triton's ports are by default {ports})"
    if found == "http" and protocol == "grpc":
        return f"{url} is Triton's HTTP port, and gRPC was asked for; use --url http://{address}"
    if found == "grpc" and protocol == "http":
        return f"{url} is Triton's gRPC port, and HTTP was asked for; use --url grpc://{address}"
    if found == "http" and path.strip("/"):
        return f"Triton answers at {url.split('//')[0]}//{address}, but not below {path}; leave the path out of --url"
    return None


def what_listens(address: str, *, is_secure: bool = False) -> Listener:
    """What listens at `address`, host:port."""
    import httpx

    base = f"{'https' if is_secure else 'http'}://{address}"
    with httpx.Client(transport=httpx.HTTPTransport(), timeout=PROBE_TIMEOUT_S) as client:
        try:
            if _is_triton(client.get(f"{base}/v2")):
                return "http"
            return "metrics" if "# TYPE nv_" in client.get(f"{base}/metrics").text else "other"
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.InvalidURL):
            return "nothing"
        except httpx.HTTPError:  # something answers, which isn't HTTP
            return "grpc" if _is_triton_grpc(address) else "other"


def _is_triton(response: object) -> bool:
    try:
        fields = response.json()  # type: ignore[attr-defined]
    except ValueError:
        return False
    return isinstance(fields, dict) and "extensions" in fields


def _is_triton_grpc(address: str) -> bool:
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=PROBE_TIMEOUT_S)
        except grpc.RpcError:
            return False
    return True
