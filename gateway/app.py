"""The app: routes, middleware and error forms, put together from the tables below."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.middleware import Middleware

from deepseek_triton.gateway.apis import embeddings, health, models, reports, score
from deepseek_triton.gateway.apis.anthropic_messages import routes as anthropic_messages
from deepseek_triton.gateway.apis.jobs import batches, files
from deepseek_triton.gateway.apis.jobs import routes as jobs
from deepseek_triton.gateway.apis.openai_chat import routes as openai_chat
from deepseek_triton.gateway.apis.openai_completions import routes as openai_completions
from deepseek_triton.gateway.apis.openai_responses import routes as openai_responses
from deepseek_triton.gateway.apis.openai_responses.store import ResponseStore
from deepseek_triton.gateway.apis.wire.context import Context
from deepseek_triton.gateway.apis.wire.errors import add_error_handlers
from deepseek_triton.gateway.backend.base import Backend
from deepseek_triton.gateway.backend.routing.build import routed
from deepseek_triton.gateway.backend.routing.member import Server
from deepseek_triton.gateway.collection import feedback
from deepseek_triton.gateway.collection.collector import make_collector
from deepseek_triton.gateway.jobs.ending import end_tasks
from deepseek_triton.gateway.jobs.service import JobService
from deepseek_triton.gateway.observe import routes as observe
from deepseek_triton.gateway.observe.backend import ObservedBackend
from deepseek_triton.gateway.observe.logs import set_up
from deepseek_triton.gateway.observe.middleware import ObserveMiddleware
from deepseek_triton.gateway.observe.observer import Observer
from deepseek_triton.gateway.observe.tracing import make_tracer
from deepseek_triton.gateway.page import routes as page
from deepseek_triton.gateway.protection.bodies import StrictBodies
from deepseek_triton.gateway.protection.bounds import Bounds
from deepseek_triton.gateway.protection.cors import Cors
from deepseek_triton.gateway.protection.endings import Endings
from deepseek_triton.gateway.protection.keys.authentication import Authentication
from deepseek_triton.gateway.protection.keys.expiry import watch_expiry
from deepseek_triton.gateway.protection.limits.middleware import CallerLimits
from deepseek_triton.gateway.settings import GatewaySettings

ROUTERS: tuple[APIRouter, ...] = (
    health.router,
    models.router,
    openai_chat.router,
    openai_completions.router,
    openai_responses.router,
    anthropic_messages.router,
    score.router,
    embeddings.router,
    reports.router,
    jobs.router,
    files.router,
    batches.router,
    feedback.router,
    observe.router,
    page.router,
)
# From outside in; each is a class `(app, settings)` with `async __call__(scope, receive, send)`.
MIDDLEWARE: tuple[Any, ...] = (Endings, Cors, Bounds, Authentication, CallerLimits, StrictBodies)

# Errors of every route, for the OpenAPI schema.
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request is wrong, not allowed, or one too many."},
    "5XX": {"description": "The model's server has no room, failed, or isn't there."},
}


def create_app(
    settings: GatewaySettings, backend: Backend | None = None, servers: Mapping[str, Server] | None = None
) -> FastAPI:
    """Make the app; `backend` or `servers`, address → server, instead of the tritonservers that the settings name."""
    responses = ResponseStore(settings.response_store_bytes, settings.response_store_s)
    observer = Observer(tracer=make_tracer(settings.trace_endpoint), logs_prompts=settings.log_prompts)
    used = ObservedBackend(routed(backend, servers, settings, observer.metrics.routing), observer)
    collector = make_collector(settings, observer.metrics) if settings.collect else None
    service: JobService | None = None

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if collector is not None:
            collector.start()
        await used.open()
        if service is not None:
            service.start()
        watching = [watch_expiry(settings.keys, observer.metrics.key_expiry)] if settings.keys else []
        tasks = [asyncio.create_task(each) for each in watching]
        yield
        await end_tasks(tasks)
        if service is not None:
            await service.close()
        await responses.close()
        await used.close()
        if collector is not None:
            await asyncio.to_thread(collector.close)
        observer.tracer.close()

    @contextlib.asynccontextmanager
    async def alone() -> AsyncIterator[None]:
        """Run the queue's jobs without a server for the APIs."""
        async with lifespan(app):
            yield

    app = FastAPI(
        title="deepseek-triton gateway",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        middleware=[
            Middleware(ObserveMiddleware, observer=observer),
            *(Middleware(kind, settings=settings) for kind in MIDDLEWARE),
        ],
        responses=ERRORS,
        redirect_slashes=False,
    )
    # What jobs ask: the same routes, without what stands between strangers and them.
    inner = FastAPI(openapi_url=None, middleware=[Middleware(StrictBodies, settings=settings)], redirect_slashes=False)
    if settings.redis_url:
        service = JobService(settings, inner, used.is_ready, observer.metrics)
    app.state.alone = alone
    for each in (app, inner):
        each.state.responses = responses
        each.state.observer = observer
        each.state.gateway = Context(settings, used, collector)
        each.state.jobs = service
        for router in ROUTERS:
            each.include_router(router)
        add_error_handlers(each)
    return app


def create_from_environment() -> FastAPI:
    """The app of a worker process, whose settings are in its environment."""
    settings = GatewaySettings.from_environment()
    set_up(settings.log_level, is_json=settings.log_json)
    app = create_app(settings)
    # What is loaded stays: else the garbage collector walks through it, 0.3 s long, in each request with a large body.
    gc.collect()
    gc.freeze()
    return app
