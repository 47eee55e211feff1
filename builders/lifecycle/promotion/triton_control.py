"""Triton's repository API: load and unload a model with its parts on a running server (docs/lifecycle-learn.md).

The server must run with explicit model control, as `serve --explicit` starts it.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import Any

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.ensemble.protocol.pipelines import PART_SUFFIXES, model_name
from deepseek_triton.ensemble.server.options import ADMIN_HEADER, ADMIN_KEY

LOAD_TIMEOUT_S = 600.0
POLL_S = 0.2


class TritonControl:
    """One server. url: http://HOST:PORT. key: the administrator's, or empty for a server that restricts nothing."""

    def __init__(self, url: str, key: str) -> None:
        self.url, self._headers = url.rstrip("/"), {ADMIN_HEADER: key} if key else {}

    def states(self) -> dict[str, str]:
        """Model → READY, UNAVAILABLE and so on; "" for one that was never loaded."""
        return {one["name"]: one.get("state", "") for one in self._post("/v2/repository/index", {})}

    def load(self, model: str) -> None:
        """Load the model and the parts that it calls, and wait until they are ready; no other model is touched.

        Raises:
            BuildError: it can't be loaded.
        """
        if self.states().get(model) != "READY":
            self._post(f"/v2/repository/models/{model}/load", {})

    def unload(self, model: str, timeout_s: float) -> None:
        """Unload it, and wait until it is gone: what runs on it ends first, then its memory is the system's.

        Raises:
            BuildError: it isn't gone after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        # The model before its parts, which its last requests still call; those loaded by name don't go with it.
        for name in (model, *(model_name(model, suffix) for suffix in PART_SUFFIXES)):
            if self.states().get(name) == "READY":
                self._post(f"/v2/repository/models/{name}/unload", {})
            while self.states().get(name) not in ("UNAVAILABLE", "", None):
                if time.monotonic() > deadline:
                    raise BuildError(f"{name} is still loaded after {timeout_s:g} s")
                time.sleep(POLL_S)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json", **self._headers}
        )
        try:
            with urllib.request.urlopen(request, timeout=LOAD_TIMEOUT_S) as response:
                answer = response.read()
        except urllib.error.HTTPError as error:
            reason = error.read().decode("utf-8", "replace")[:300]
            advice = f"; set {ADMIN_KEY} to the server's" if error.code in (401, 403) else ""
            if "explicit" in reason:
                advice = "; start the server with `deepseek-triton serve --explicit`"
            raise BuildError(f"{self.url}{path} answers {error.code}: {reason}{advice}") from error
        except (OSError, ValueError) as error:
            raise BuildError(f"{self.url}{path}: {error}; is the server running?") from error
        return json.loads(answer) if answer else None
