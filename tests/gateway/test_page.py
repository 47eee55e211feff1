"""docs/gateway.md says what the gateway does."""

from __future__ import annotations

import re
from pathlib import Path

from deepseek_triton.gateway.apis.openai_chat.body import ChatBody
from deepseek_triton.gateway.app import ROUTERS
from scripts.gateway_page import PAGE, updated

TEXT = PAGE.read_text(encoding="utf-8")


def test_the_table_of_settings_is_the_gateways() -> None:
    assert updated(TEXT) == TEXT, "the page is out of date: run python -m scripts.gateway_page"


def test_every_path_is_on_the_page() -> None:
    paths = {route.path for router in ROUTERS for route in router.routes}  # type: ignore[attr-defined]
    tops = {"/".join(path.split("/")[:3]) for path in paths if path.startswith("/v1/")}
    assert {top for top in tops if f"{top}" not in TEXT} == set()


def test_every_field_of_a_chat_is_on_the_page() -> None:
    own = {
        "model",
        "messages",
        "user",
        "presence_penalty",
        "frequency_penalty",
        "prompt_cache_key",
        "safety_identifier",
    }
    words = set(re.findall(r"\w+", TEXT))
    assert {*ChatBody.model_fields} - own <= words
    # Options of the client that only tune OpenAI's own cache are too many to be told.
    assert {name for name in ChatBody.NOT_SUPPORTED if not name.startswith("prompt_cache")} <= words
    assert Path(PAGE).name in (PAGE.parent / "README.md").read_text(encoding="utf-8")
