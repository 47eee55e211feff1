"""The gateway's settings: one field each, from which the command line, the environment and docs/gateway.md derive.

A setting is given on the command line, else in its environment variable, else its default holds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast

from deepseek_triton.gateway.backend.addresses import check_backend_url

PREFIX = "DEEPSEEK_GATEWAY_"
LOG_LEVELS = ("debug", "info", "warning", "error")
TRUE, FALSE = ("1", "true", "yes"), ("0", "false", "no")

Value = str | int | float | bool | tuple[str, ...]


MAX_PORT = 65_535


def _setting(default: Any, meaning: str, at_least: float | None = None) -> Any:
    return field(default=default, metadata={"meaning": meaning, "at_least": at_least})


@dataclass(frozen=True)
class GatewaySettings:
    """Everything that the gateway can be set to. Raises `ValueError`, naming the setting and its value."""

    # Where it listens, and what is behind it
    host: str = _setting("127.0.0.1", "The address that the gateway listens on; 0.0.0.0 is every one of the machine.")
    port: int = _setting(9000, "The port that it listens on; 0: a free one.", at_least=0)
    workers: int = _setting(1, "The number of processes that serve.", at_least=1)
    backend_urls: tuple[str, ...] = _setting(
        ("localhost:8001",),
        "tritonserver's gRPC address, host:port, once for each server; dns:host:port: every address that DNS has for"
        " host, looked up again and again.",
    )
    models: tuple[str, ...] = _setting(
        (),
        "A model to serve, once for each; none: all that the server names, if its index isn't restricted, or"
        " TRITON_ADMIN_KEY has its key.",
    )
    routes: str = _setting(
        "", "A JSON file of routes: names → the models that answer them, with their shares; it may change at run time."
    )
    request_timeout_s: float = _setting(600.0, "The longest time for a whole request in seconds.", at_least=0.001)
    heartbeat_s: float = _setting(
        15.0, "Seconds of silence after which a stream gets a comment line, so that proxies keep it open.", at_least=0.1
    )
    # Responses that are kept for `previous_response_id` and GET, in the memory of one process
    response_store_bytes: int = _setting(
        64 * 2**20, "The bytes of responses that are kept for later turns; 0 keeps none.", at_least=0
    )
    response_store_s: float = _setting(3600.0, "The seconds for which a response is kept.", at_least=0)
    max_background_responses: int = _setting(
        64, "The number of responses that are computed in the background at once.", at_least=0
    )

    # Several servers, and servers that fail
    drained: str = _setting(
        "", "A file with addresses of servers that get no new requests, so that they can be ended; it may change."
    )
    max_retries: int = _setting(
        2, "Other servers that a request is sent to when one fails before a part of its answer has come.", at_least=0
    )
    probe_interval_s: float = _setting(2.0, "Seconds between two looks whether a server is there.", at_least=0.05)
    probe_timeout_s: float = _setting(2.0, "Seconds that a server has to answer such a look.", at_least=0.05)
    hang_s: float = _setting(
        15.0, "Seconds without any answer to looks after which all that runs on a server is broken off.", at_least=0.1
    )
    affinity_bytes: int = _setting(
        512, "Bytes of a conversation's beginning by which it stays on one server; 0: none does.", at_least=0
    )
    breaker_failures: int = _setting(
        5, "Failures in a row after which a server gets no requests of that model for a while.", at_least=1
    )
    breaker_open_s: float = _setting(30.0, "Seconds until it gets one again, as a trial.", at_least=0.1)
    breaker_trials: int = _setting(1, "Trials at one time.", at_least=1)

    # What it does when servers fail or have enough to do
    fallbacks: tuple[str, ...] = _setting(
        (), "MODEL=OTHER: the model that answers when MODEL's servers fail; several of one MODEL in their order."
    )
    answer_cache_bytes: int = _setting(
        0,
        "Bytes of answers kept for times when no model answers, to requests with temperature 0 or top_k 1; 0: none.",
        at_least=0,
    )
    answer_cache_s: float = _setting(3600.0, "The seconds for which such an answer is kept.", at_least=0)
    capacity: int = _setting(
        0,
        "Requests of one model for each of its servers at one time; more are refused at once; 0: no limit.",
        at_least=0,
    )
    pressure_share: float = _setting(0.8, "The share of the capacity from which there is pressure.", at_least=0)
    pressure_first_s: float = _setting(
        0.0,
        "The mean time to a first token from which there is pressure, in seconds; 0: it doesn't matter.",
        at_least=0,
    )
    pressure_max_tokens: int = _setting(
        0, "The longest answer under pressure in tokens; 0: none is shortened.", at_least=0
    )

    # What it tells of itself
    log_level: str = _setting("info", "The least important log lines that are written: debug, info, warning or error.")
    log_json: bool = _setting(True, "Log lines are JSON, one for each request among them.")
    log_prompts: bool = _setting(False, "Log lines hold what clients send to the models.")
    trace_endpoint: str = _setting(
        "", "The OTLP collector that gets OpenTelemetry's spans over HTTP, as http://localhost:4318; empty: none."
    )
    # Who may call it, and how much
    keys: str = _setting(
        "", "Where API keys are kept: a file, or redis://HOST:PORT/DB; none: who reaches the gateway may call it."
    )
    anonymous: bool = _setting(False, "Let it listen on other addresses than loopback without keys.")
    redis_url: str = _setting(
        "", "A Redis in which all workers and gateways count limits together; none: each worker counts its own."
    )
    requests_per_minute: int = _setting(0, "Requests a minute for each key; 0: no limit.", at_least=0)
    tokens_per_minute: int = _setting(
        0, "Tokens of prompts and answers a minute for each key; 0: no limit.", at_least=0
    )
    max_running_per_key: int = _setting(
        128, "Requests of one key that run at one time, streams or not; 0: no limit.", at_least=0
    )
    max_running: int = _setting(512, "Requests that run at one time in all; 0: no limit.", at_least=0)
    cors_origins: tuple[str, ...] = _setting(
        (), "An origin whose pages may call the gateway from a browser, as https://example.org; none: no other site's."
    )

    # Answers that are collected to learn from
    collect: str = _setting("", "A directory in which finished answers are collected, to learn from; none: none are.")
    collect_days: int = _setting(30, "Days after which what was collected is removed.", at_least=1)
    collect_bytes: int = _setting(
        1 << 30, "Bytes of all that is collected; beyond them the oldest is removed.", at_least=1 << 24
    )
    collect_redactor: str = _setting(
        "deepseek_triton.gateway.collection.redaction:redact",
        "MODULE:FUNCTION, which gets each text before it is written, and returns what is kept of it.",
    )
    collect_redactor_s: float = _setting(
        2.0, "Seconds that it has for one answer; what takes longer isn't kept.", at_least=0.01
    )

    # What a request may be
    max_header_bytes: int = _setting(32 << 10, "Bytes of a request's line and headers.", at_least=1024)
    max_headers: int = _setting(100, "The number of a request's headers.", at_least=8)
    max_body_bytes: int = _setting(4 << 20, "Bytes of a body.", at_least=1024)
    max_chunks: int = _setting(10_000, "The number of chunks in which a body comes.", at_least=1)
    max_json_depth: int = _setting(64, "How deep arrays and objects of a body may be nested.", at_least=8)
    max_json_members: int = _setting(50_000, "The number of a body's values, in all arrays and objects.", at_least=64)
    max_prompt_chars: int = _setting(
        1_000_000, "Characters of a prompt: messages, instructions and tools together.", at_least=1
    )
    max_schema_chars: int = _setting(65_536, "Characters of a JSON schema, of one tool or of the answer.", at_least=2)

    # Jobs, which are kept in the Redis of --redis-url
    job_concurrency: int = _setting(
        16, "Jobs that each process runs at one time; 0: only `deepseek-gateway worker` runs them.", at_least=0
    )
    job_lease_s: float = _setting(
        15.0, "Seconds after which a job whose process doesn't renew its lease is run by another.", at_least=1
    )
    job_ttl_s: float = _setting(86400.0, "Seconds in which a job must have ended; then it expires.", at_least=1)
    job_result_s: float = _setting(86400.0, "Seconds for which a job that has ended is kept.", at_least=1)
    job_attempts: int = _setting(5, "How often a job is begun before it has failed.", at_least=1)
    max_jobs_waiting: int = _setting(10_000, "Jobs that wait, of all keys; more are refused with 429.", at_least=1)
    max_queue_bytes: int = _setting(
        1 << 30, "Bytes of jobs and results that Redis keeps; more is refused with 429.", at_least=1 << 16
    )
    # Files and batches, which need the Redis of --redis-url too
    files_dir: str = _setting(
        "",
        "The directory of uploaded files and of batches' results, which all gateways of one Redis share; none:"
        " deepseek-gateway/files in $XDG_STATE_HOME or ~/.local/state.",
    )
    max_file_bytes: int = _setting(200 << 20, "Bytes of an uploaded file.", at_least=1)
    max_key_files_bytes: int = _setting(4 << 30, "Bytes of all files of one key.", at_least=1)
    max_files_bytes: int = _setting(16 << 30, "Bytes of everything in the directory of files.", at_least=1)
    file_keep_s: float = _setting(
        30 * 86400.0, "Seconds for which a file, and a batch that has ended, are kept at the longest.", at_least=1
    )
    max_batches: int = _setting(100, "Batches of one key that haven't ended; more are refused with 429.", at_least=1)
    max_batch_lines: int = _setting(50_000, "Requests of one batch.", at_least=1)
    batch_window: int = _setting(
        256, "Requests of one batch that are in the queue at one time; the rest stays in its file.", at_least=1
    )
    batch_priority: int = _setting(
        3, "The least urgent `priority` that a batch's requests have: 1 is the most urgent; 0: their own.", at_least=0
    )
    webhook_hosts: tuple[str, ...] = _setting(
        (), "A host that may be told of a job's end, as hooks.example.org; none: there are no webhooks."
    )

    # How long it waits
    header_timeout_s: float = _setting(10.0, "Seconds in which a request's headers must come.", at_least=0.1)
    body_timeout_s: float = _setting(60.0, "Seconds in which a request's body must come.", at_least=0.1)
    send_timeout_s: float = _setting(
        30.0, "Seconds for which a client may read nothing of its answer; then its connection is closed.", at_least=0.1
    )
    idle_timeout_s: float = _setting(75.0, "Seconds for which a connection without a request is kept.", at_least=1)
    max_connections: int = _setting(
        900, "Connections of one worker; more are closed at once. Keep it below `ulimit -n`.", at_least=1
    )
    drain_s: float = _setting(
        30.0, "Seconds that running requests have from SIGTERM on; new ones are refused meanwhile.", at_least=0
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.port > MAX_PORT:
            raise ValueError(f"--port must be at most {MAX_PORT}, got {self.port}")
        if self.log_level not in LOG_LEVELS:
            raise ValueError(f"--log-level must be one of {', '.join(LOG_LEVELS)}, got {self.log_level!r}")
        for setting in SETTINGS:
            setting.check(getattr(self, setting.field))
        fallback_chains(self.fallbacks)
        for url in self.backend_urls:
            check_backend_url(url)

    @classmethod
    def from_mapping(cls, given: Mapping[str, str]) -> GatewaySettings:
        """The settings that environment variables hold. Raises `ValueError` for a value or a name that is wrong."""
        known = {setting.variable: setting for setting in SETTINGS}
        for name in given:
            if name.startswith(PREFIX) and name not in known:
                raise ValueError(f"{name} is no setting of the gateway")
        values: dict[str, Any] = {row.field: row.parse(given[name]) for name, row in known.items() if name in given}
        return cls(**values)

    @classmethod
    def from_environment(cls) -> GatewaySettings:
        """`from_mapping` of this process's environment."""
        return cls.from_mapping(os.environ)

    def to_mapping(self) -> dict[str, str]:
        """The environment variables that give these settings to another process, whatever its environment held."""
        return {setting.variable: _text(getattr(self, setting.field)) for setting in SETTINGS}


@dataclass(frozen=True)
class SettingRow:
    """One row of the table.

    field: its name in `GatewaySettings`. default: also tells its type. at_least: the smallest number that is allowed.
    """

    field: str
    default: Value
    meaning: str
    at_least: float | None

    @property
    def option(self) -> str:
        """Its option on the command line; that of a list is given once for each value."""
        return "--" + (self.field.removesuffix("s") if self.is_list else self.field).replace("_", "-")

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return PREFIX + self.field.upper()

    @property
    def is_list(self) -> bool:
        """Whether it takes any number of values."""
        return isinstance(self.default, tuple)

    def parse(self, text: str) -> Value:
        """The value that `text` means; a list's values stand between commas. Raises `ValueError`."""
        try:
            return self._parse(text)
        except ValueError:
            kind = {bool: "true or false", int: "a whole number"}.get(type(self.default), "a number")
            raise ValueError(f"{self.option} must be {kind}, got {text!r}") from None

    def check(self, value: Any) -> None:
        """Raise `ValueError` for a value out of range."""
        if self.at_least is not None and not value >= self.at_least:
            raise ValueError(f"{self.option} must be at least {self.at_least:g}, got {value!r}")

    def _parse(self, text: str) -> Value:
        if isinstance(self.default, tuple):
            return tuple(part.strip() for part in text.split(",") if part.strip())
        if isinstance(self.default, bool):
            if text.lower() not in TRUE + FALSE:
                raise ValueError(text)
            return text.lower() in TRUE
        return type(self.default)(text)


def fallback_chains(fallbacks: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Each model's fallbacks, in order. Raises `ValueError` for what isn't MODEL=OTHER."""
    chains: dict[str, tuple[str, ...]] = {}
    for text in fallbacks:
        model, _, other = text.partition("=")
        if not model or not other or model == other or other in chains.get(model, ()):
            raise ValueError(f"--fallback must be MODEL=OTHER, each once, got {text!r}")
        chains[model] = (*chains.get(model, ()), other)
    return chains


def _text(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(value) if isinstance(value, tuple) else str(value)


SETTINGS: tuple[SettingRow, ...] = tuple(
    SettingRow(row.name, cast(Value, row.default), row.metadata["meaning"], row.metadata["at_least"])
    for row in fields(GatewaySettings)
)
