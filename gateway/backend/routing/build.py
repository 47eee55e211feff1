"""routed: the backends that stand between the APIs and the servers, one inside the other."""

from __future__ import annotations

from collections.abc import Mapping

from deepseek_triton.gateway.backend import addresses
from deepseek_triton.gateway.backend.base import Backend
from deepseek_triton.gateway.backend.roster import Discovery
from deepseek_triton.gateway.backend.routing.canary import CanaryBackend
from deepseek_triton.gateway.backend.routing.degrade import DegradingBackend
from deepseek_triton.gateway.backend.routing.member import Server
from deepseek_triton.gateway.backend.routing.pool import Pool
from deepseek_triton.gateway.backend.routing.pressure import Pressure
from deepseek_triton.gateway.backend.routing.shares import RouteFile
from deepseek_triton.gateway.backend.triton import TritonBackend
from deepseek_triton.gateway.observe.routing_metrics import RoutingMetrics
from deepseek_triton.gateway.settings import GatewaySettings


def routed(
    backend: Backend | None, servers: Mapping[str, Server] | None, settings: GatewaySettings, metrics: RoutingMetrics
) -> Backend:
    """What answers requests as the settings say: by `backend`, or by servers, those of the settings unless given."""
    if backend is not None:
        pressure = Pressure(settings, lambda model: 1, metrics)
        return _around(backend, pressure, settings, metrics)
    discovery = None
    if servers is None:

        def make(url: str) -> Server:
            return TritonBackend(url, settings.models, settings.request_timeout_s)

        urls = dict.fromkeys(settings.backend_urls)
        servers = {url: make(url) for url in urls if not url.startswith(addresses.DNS)}
        if len(servers) < len(urls):
            discovery = Discovery(lambda: addresses.addresses_of(urls, addresses.resolve), make)
    pool = Pool(servers, settings, metrics, discovery)
    return _around(pool, Pressure(settings, pool.num_available, metrics), settings, metrics)


def _around(backend: Backend, pressure: Pressure, settings: GatewaySettings, metrics: RoutingMetrics) -> Backend:
    """Shares choose the model; only then does it fall back."""
    return CanaryBackend(DegradingBackend(backend, settings, pressure, metrics), RouteFile(settings.routes), metrics)
