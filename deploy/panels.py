"""What the dashboards show: titles, units and queries, out of the list of metrics.

`$model` is what the viewer chose; `$__rate_interval` is Grafana's window for a rate.
"""

from __future__ import annotations

from dataclasses import dataclass

from deploy.recording import LIMITS

MODEL = '{model=~"$model"}'
RATE = f"{MODEL}[$__rate_interval]"


@dataclass(frozen=True)
class Shown:
    """A query, and the legend of its series."""

    query: str
    legend: str = "{{model}} {{instance}}"


@dataclass(frozen=True)
class PanelSpec:
    """A panel of lines over time; unit: as Grafana names it."""

    title: str
    unit: str
    shown: tuple[Shown, ...]
    description: str = ""


@dataclass(frozen=True)
class DashboardSpec:
    """A dashboard; uid: its address and its file's name."""

    uid: str
    title: str
    panels: tuple[PanelSpec, ...]
    has_models: bool = True


def _rate(name: str, legend: str) -> Shown:
    return Shown(f"sum by (model, instance) (rate(deepseek_{name}{RATE}))", legend)


def _quantiles(metric: str) -> tuple[Shown, ...]:
    buckets = f"sum by (model, instance, le) (rate(deepseek_{metric}_seconds_bucket{RATE}))"
    return tuple(
        Shown(f"histogram_quantile({share}, {buckets})", f"p{round(share * 100)} {{{{model}}}}")
        for share in (0.5, 0.9, 0.99)
    )


def _limit(name: str) -> Shown:
    return Shown(LIMITS[name].recorded, "limit")


def _per_request(name: str) -> Shown:
    """Mean milliseconds of one request to a part."""
    per = f"sum by (model) (rate(nv_inference_request_success{RATE}))"
    return Shown(f"sum by (model) (rate({name}{RATE})) / ({per} > 0) / 1000", "{{model}}")


def _gateway_quantiles(metric: str, label: str) -> tuple[Shown, ...]:
    buckets = f"sum by ({label}, le) (rate(gateway_{metric}_seconds_bucket[$__rate_interval]))"
    return tuple(
        Shown(f"histogram_quantile({share}, {buckets})", f"{metric} p{round(share * 100)} {{{{{label}}}}}")
        for share in (0.5, 0.99)
    )


DASHBOARDS = (
    DashboardSpec(
        "deepseek-service", "DeepSeek Triton: service level",
        (
            PanelSpec("Time to first token", "s",
                      (*_quantiles("time_to_first_token"), _limit("first_token_p99_seconds"))),
            PanelSpec("Time between tokens", "s",
                      (*_quantiles("inter_token_latency"), _limit("inter_token_p99_seconds"))),
            PanelSpec("Time in the queue", "s", (*_quantiles("queue_time"), _limit("queue_p99_seconds"))),
            PanelSpec("Requests", "reqps", (
                _rate("requests_total", "accepted {{model}}"), _rate("requests_failed_total", "failed {{model}}"),
                _rate("requests_refused_total", "refused {{model}}"),
                _rate("requests_expired_total", "expired {{model}}"),
                _rate("requests_cancelled_total", "cancelled {{model}}"),
            )),
            PanelSpec("Share of requests that fail", "percentunit", (
                Shown(f"deepseek:error_ratio:rate5m{MODEL}", "5 minutes {{model}}"),
                Shown(f"deepseek:error_ratio:rate1h{MODEL}", "an hour {{model}}"), _limit("error_budget"),
            )),
            PanelSpec("Servers that answer", "short", (Shown('sum by (instance) (up{job="triton"})', "{{instance}}"),)),
        ),
    ),
    DashboardSpec(
        "deepseek-engine", "DeepSeek Triton: engine",
        (
            PanelSpec("Tokens", "short", (
                _rate("generated_tokens_total", "generated {{model}}"),
                _rate("prompt_tokens_total", "of prompts {{model}}"),
            ), "each second"),
            PanelSpec("Sequences", "short", (
                Shown(f"sum by (model, instance) (deepseek_slots_used{MODEL})", "running {{model}}"),
                Shown(f"sum by (model, instance) (deepseek_sequences_waiting{MODEL})", "waiting {{model}}"),
                Shown(f"sum by (model, instance) (deepseek_slots{MODEL})", "slots {{model}}"), _limit("backlog"),
            )),
            PanelSpec("Share of slots, and of the cache's blocks, in use", "percentunit", (
                Shown(f"deepseek:slots_used:ratio{MODEL}", "slots {{model}} {{instance}}"),
                Shown(f"deepseek:cache_blocks_used:ratio{MODEL}", "blocks {{model}} {{instance}}"),
            )),
            PanelSpec("Blocks of the KV cache", "short", (
                Shown(f"sum by (model, instance) (deepseek_cache_blocks{MODEL})", "all {{model}}"),
                Shown(f"sum by (model, instance) (deepseek_cache_blocks_free{MODEL})", "free {{model}}"),
            ), "0 where the cache has slots"),
            PanelSpec("Sequences that gave up their memory and were resumed", "reqps",
                      (_rate("preemptions_total", "{{model}}"),)),
            PanelSpec("Share of prompts' tokens found in a cache", "percentunit",
                      (Shown(f"deepseek:prefix_hit:ratio_rate5m{MODEL}"),)),
            PanelSpec("Prompts that begin like an earlier one", "reqps", (_rate("prefix_hits_total", "{{model}}"),)),
            PanelSpec("Responses", "short", (_rate("responses_total", "{{model}}"),), "each second"),
            PanelSpec("A request's time in each part", "ms", (_per_request("nv_inference_request_duration_us"),)),
            PanelSpec("Of it in Triton's queue", "ms", (_per_request("nv_inference_queue_duration_us"),)),
            PanelSpec("Of it computing", "ms", (_per_request("nv_inference_compute_infer_duration_us"),)),
            PanelSpec("Requests that a part couldn't answer", "reqps", (
                Shown(f"sum by (model, reason) (rate(nv_inference_request_failure{RATE}))", "{{model}} {{reason}}"),
            )),
            PanelSpec("Requests in Triton's queues", "short",
                      (Shown(f"sum by (model) (nv_inference_pending_request_count{MODEL})", "{{model}}"),)),
            PanelSpec("Inferences in one execution", "short", (
                Shown(f"sum by (model) (rate(nv_inference_count{RATE})) / "
                      f"(sum by (model) (rate(nv_inference_exec_count{RATE})) > 0)", "{{model}}"),
            )),
        ),
    ),
    DashboardSpec(
        "deepseek-gateway", "DeepSeek Triton: gateway",
        (
            PanelSpec("Answers by status", "reqps", (
                Shown("sum by (status) (rate(gateway_requests_total[$__rate_interval]))", "{{status}}"),
            )),
            PanelSpec("Share of answers that are errors of the server", "percentunit", (
                Shown("deepseek:gateway_errors:ratio_rate5m", "{{instance}}"), _limit("gateway_errors"),
            )),
            PanelSpec("Clients that left", "reqps", (
                Shown("sum by (route) (rate(gateway_clients_left_total[$__rate_interval]))", "{{route}}"),
            )),
            PanelSpec("Requests that run", "short", (
                Shown("sum by (method) (gateway_live_requests)", "{{method}}"),
                Shown("sum(gateway_upstream_live)", "with the server"),
            )),
            PanelSpec("Tokens", "short", (
                Shown("sum by (model, kind) (rate(gateway_tokens_total[$__rate_interval]))", "{{kind}} {{model}}"),
            ), "each second"),
            PanelSpec("Time of a request", "s", (
                *_gateway_quantiles("request", "route"), *_gateway_quantiles("upstream", "outcome"),
            )),
            PanelSpec("Time to first token", "s", _gateway_quantiles("time_to_first_token", "model")),
            PanelSpec("Time between tokens", "s", _gateway_quantiles("inter_token", "model")),
            PanelSpec("Time before a request goes to the server", "s", _gateway_quantiles("queue", "model")),
            PanelSpec("Servers that answer the gateway", "short", (
                Shown("min by (backend) (gateway_backend_up)", "{{backend}}"),
                Shown("min by (backend) (gateway_backend_drained)", "drained {{backend}}"),
            )),
            PanelSpec("Requests that a server has", "short", (
                Shown("sum by (backend) (gateway_backend_live)", "{{backend}}"),
            )),
            PanelSpec("How requests to a server end", "reqps", (
                Shown("sum by (backend, model, outcome) (rate(gateway_backend_requests_total[$__rate_interval]))",
                      "{{outcome}} {{model}} {{backend}}"),
                Shown("sum by (backend, model) (rate(gateway_backend_retries_total[$__rate_interval]))",
                      "sent elsewhere {{model}} {{backend}}"),
            )),
            PanelSpec("Breakers that aren't closed", "short", (
                Shown("max by (backend, model) (gateway_breaker_open)", "{{model}} {{backend}}"),
                Shown("sum by (backend, model) (increase(gateway_breaker_opened_total[$__rate_interval]))",
                      "opened {{model}} {{backend}}"),
            )),
            PanelSpec("Answers that are less than was asked for", "reqps", (
                Shown("sum by (model, how) (rate(gateway_degraded_total[$__rate_interval]))", "{{how}} {{model}}"),
                Shown("sum by (model) (rate(gateway_shed_total[$__rate_interval]))", "refused {{model}}"),
            )),
            PanelSpec("Answers of a route's arms", "reqps", (
                Shown("sum by (name, model, outcome) (rate(gateway_arm_requests_total[$__rate_interval]))",
                      "{{name}} {{model}} {{outcome}}"),
            )),
            PanelSpec("Time of a route's arms", "s", (
                *_gateway_quantiles("arm", "model"), *_gateway_quantiles("arm_first_chunk", "model"),
            )),
            PanelSpec("Jobs", "short", (  # all gateways tell the same of their one queue
                Shown("max by (priority) (gateway_jobs_waiting) or vector(0)", "waiting {{priority}}"),
                Shown("max(gateway_jobs_running)", "running"), Shown("max(gateway_jobs_dead)", "dead letters"),
            )),
            PanelSpec("Age of the oldest job that waits", "s", (Shown("max(gateway_job_oldest_seconds)", "age"),)),
            PanelSpec("Jobs that were run, and webhooks", "reqps", (
                Shown("sum by (outcome) (rate(gateway_job_attempts_total[$__rate_interval])) or vector(0)",
                      "{{outcome}}"),
                Shown("sum by (outcome) (rate(gateway_webhooks_total[$__rate_interval])) or vector(0)",
                      "webhook {{outcome}}"),
            )),
            PanelSpec("Batches that haven't ended", "short", (Shown("max(gateway_batches_active)", "batches"),)),
            PanelSpec("Age of the oldest batch that hasn't ended", "s", (
                Shown("max(gateway_batch_oldest_seconds)", "age"),
            )),
            PanelSpec("Lines of batches", "reqps", (
                Shown("sum by (outcome) (rate(gateway_batch_lines_total[$__rate_interval])) or vector(0)",
                      "{{outcome}}"),
            )),
            PanelSpec("Bytes of jobs in Redis and of files", "bytes", (
                Shown("max(gateway_queue_bytes)", "jobs"), Shown("max(gateway_files_bytes)", "files"),
            )),
            PanelSpec("Time until the next API key expires", "s", (
                Shown("min by (instance) (gateway_key_expiry_timestamp_seconds) - time()", "{{instance}}"),
                _limit("key_expiry_seconds"),
            ), "infinite, and so not drawn, where no key expires"),
            PanelSpec("Answers and feedback that are collected", "reqps", (
                Shown("sum by (kind, outcome) (rate(gateway_collected_total[$__rate_interval])) or vector(0)",
                      "{{kind}} {{outcome}}"),
            )),
            PanelSpec("Bytes of what is collected", "bytes", (Shown("max(gateway_collection_bytes)", "bytes"),)),
        ),
        has_models=False,
    ),
    DashboardSpec(
        "deepseek-gpu", "DeepSeek Triton: GPU and host",
        (
            PanelSpec("GPU utilisation", "percentunit", (
                Shown("nv_gpu_utilization", "{{gpu_uuid}}"), _limit("gpu_utilization"),
            ), "the share of time in which a kernel ran"),
            PanelSpec("GPU memory", "bytes", (
                Shown("nv_gpu_memory_used_bytes", "used {{gpu_uuid}}"),
                Shown("nv_gpu_memory_total_bytes", "all {{gpu_uuid}}"),
            )),
            PanelSpec("GPU power", "watt", (
                Shown("nv_gpu_power_usage", "{{gpu_uuid}}"), Shown("nv_gpu_power_limit", "limit {{gpu_uuid}}"),
            )),
            PanelSpec("Energy of a token", "joule", (
                Shown("sum(rate(nv_energy_consumption[$__rate_interval])) / "
                      "(sum(rate(deepseek_generated_tokens_total[$__rate_interval])) > 0)", "all GPUs, all models"),
            )),
            PanelSpec("CPU utilisation", "percentunit", (Shown("nv_cpu_utilization", "{{instance}}"),)),
            PanelSpec("Host memory", "bytes", (
                Shown("nv_cpu_memory_used_bytes", "used {{instance}}"),
                Shown("nv_cpu_memory_total_bytes", "all {{instance}}"),
            )),
        ),
        has_models=False,
    ),
)  # fmt: skip
