"""`/v1/models`: what is served."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request

from deepseek_triton.clients import ServedModel
from deepseek_triton.gateway.apis.wire.context import backend_of
from deepseek_triton.gateway.apis.wire.errors import ApiError

router = APIRouter(prefix="/v1/models")

_STARTED = int(time.time())  # when a model was made isn't known: the gateway's own start stands for it


@router.get("")
async def list_models(request: Request) -> dict[str, Any]:
    """The models that are ready, in OpenAI's form."""
    return {"object": "list", "data": [_describe(model) for model in await backend_of(request).models()]}


@router.get("/{name:path}")
async def read_model(request: Request, name: str) -> dict[str, Any]:
    """One model."""
    for model in await backend_of(request).models():
        if model.name == name:
            return _describe(model)
    raise ApiError(404, f"the model '{name}' does not exist", param="model", code="model_not_found")


def _describe(model: ServedModel) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": _STARTED, "owned_by": "deepseek-triton", "task": model.task}
