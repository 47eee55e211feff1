"""The chart, rendered by Helm's own library, against Kubernetes' schemas and what the cluster must hold."""

from __future__ import annotations

import re
import shlex
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from deepseek_triton.gateway.settings import GatewaySettings
from deploy.generate import FOLDER
from deploy.metrics import SERIES, names_in
from deploy.recording import LIMITS

CHART = FOLDER / "chart"
DOCKERFILE = FOLDER.parent / "Dockerfile"
VERSION = "1.33"  # image volumes are there
Manifest = dict[str, Any]
CLAIM = {"repository": {"claim": "models"}}
SEVERAL = {"enabled": True, "checkpoint": {"claim": "r1-weights", "path": "/weights"}}
KEDA = {**CLAIM, "autoscaling": {"kind": "keda"}}
HPA = {**CLAIM, "autoscaling": {"kind": "hpa"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "a claim": CLAIM,
    "an image volume": {"repository": {"image": "registry.example/r1:1"}},
    "an init job": {"repository": {"job": {"image": "example/m:1", "command": ["cp", "-r", "/m", "/models"]}}},
    "a CPU": {**CLAIM, "triton": {"gpus": 0, "adminKeySecret": "admin", "runtimeClassName": "nvidia",
                                  "nodeSelector": {"gpu": "h100"}}},
    "keda": KEDA,
    "hpa": HPA,
    "monitoring": {**CLAIM, "monitoring": {"enabled": True, "limits": {"backlog": 25, "error_budget": 0},
                                         "runbooks": "https://docs.example/"}},
    "no redis": {**CLAIM, "redis": {"enabled": False}, "gateway": {
        "settings": {"DEEPSEEK_GATEWAY_ANONYMOUS": True}, "allowedNamespaces": ["web"]}},
    "files": {**CLAIM, "gateway": {"filesClaim": "batch-files"}},
    "Triton alone": {**CLAIM, "redis": {"enabled": False}, "gateway": {"enabled": False}},
    "Gateway API": {**CLAIM, "gatewayApi": {
        "enabled": True, "parent": {"name": "public", "namespace": "edge"}, "hostnames": ["llm.example"],
        "inferencePool": {"enabled": True, "endpointPicker": "picker"}}},
    "several machines": {
        **CLAIM,
        "leaderWorkerSet": SEVERAL,
        "triton": {"gpus": 8},
    },
}  # fmt: skip
# Kinds whose schemas are their operators', and that kubernetes_validate lacks.
CUSTOM = {"PodMonitor", "PrometheusRule", "ScaledObject", "HTTPRoute", "InferencePool", "LeaderWorkerSet"}


def render(values: dict[str, Any], folder: Path = CHART) -> list[Manifest]:
    with helm_python.Chart.load(folder) as chart:
        texts = chart.render(values, name="r1", namespace="llm")
    manifests = [texts[name] for name in sorted(texts) if name.endswith(".yaml")]
    return [manifest for text in manifests for manifest in yaml.safe_load_all(text) if manifest]


@cache
def rendered(variant: str) -> tuple[Manifest, ...]:
    return tuple(render(VARIANTS[variant]))


def of_kind(variant: str, kind: str, part: str) -> Manifest:
    (found,) = [m for m in rendered(variant) if m["kind"] == kind and m["metadata"]["name"] == f"r1-{part}"]
    return found


def pods(variant: str) -> dict[str, Manifest]:
    """Workload → its pod's specification."""
    templates = {
        m["metadata"]["name"]: m["spec"]["template"] for m in rendered(variant) if "template" in m.get("spec", {})
    }
    for manifest in rendered(variant):
        if manifest["kind"] == "LeaderWorkerSet":
            group = manifest["spec"]["leaderWorkerTemplate"]
            templates |= {"leader": group["leaderTemplate"], "worker": group["workerTemplate"]}
    return {name: template["spec"] for name, template in templates.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_helm_finds_nothing_to_say(variant: str) -> None:
    report = helm_python.lint(CHART, VARIANTS[variant], strict=True)
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_manifests_keep_to_kubernetes_schemas(variant: str) -> None:
    manifests = rendered(variant)
    names = [(m["kind"], m["metadata"]["name"]) for m in manifests]
    assert len(set(names)) == len(names) and all(m["metadata"]["namespace"] == "llm" for m in manifests)
    for manifest in manifests:
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, VERSION, strict=True)
    for spec in pods(variant).values():  # those inside custom resources too
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec}
        kubernetes_validate.validate(pod, VERSION, strict=True)


@pytest.mark.slow
def test_every_custom_kind_is_rendered_somewhere() -> None:
    assert {m["kind"] for variant in VARIANTS for m in rendered(variant)} >= CUSTOM


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_container_is_bounded_and_has_no_rights(variant: str) -> None:
    for name, spec in pods(variant).items():
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 1000
        for container in spec["containers"] + spec.get("initContainers", []):
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"], name
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])
            assert ":" in container["image"].rpartition("/")[2] and not container["image"].endswith(":latest")


@pytest.mark.parametrize("variant", VARIANTS)
def test_selectors_find_their_pods_and_no_others(variant: str) -> None:
    workloads = [m for m in rendered(variant) if m["kind"] in ("Deployment", "StatefulSet", "LeaderWorkerSet")]
    labels = {
        m["metadata"]["name"]: (m["spec"].get("template") or m["spec"]["leaderWorkerTemplate"]["leaderTemplate"])[
            "metadata"
        ]["labels"]
        for m in workloads
    }
    for manifest in rendered(variant):
        if manifest["kind"] in ("Service", "PodDisruptionBudget"):
            selector = manifest["spec"]["selector"]
            selector = selector.get("matchLabels", selector)
            found = [name for name, given in labels.items() if selector.items() <= given.items()]
            assert found == [manifest["metadata"]["name"]]


def test_a_claim_for_files_is_where_the_gateway_keeps_them() -> None:
    spec = pods("files")["r1-gateway"]
    assert {"name": "files", "persistentVolumeClaim": {"claimName": "batch-files"}} in spec["volumes"]
    (container,) = spec["containers"]
    assert {"name": "files", "mountPath": "/files"} in container["volumeMounts"]
    assert {"name": "DEEPSEEK_GATEWAY_FILES_DIR", "value": "/files"} in container["env"]
    assert len(pods("a claim")["r1-gateway"]["volumes"]) == 1


def test_triton_has_gpus_models_shared_memory_and_time() -> None:
    spec = pods("a claim")["r1-triton"]
    (container,) = spec["containers"]
    assert (
        container["resources"]["limits"]["nvidia.com/gpu"] == container["resources"]["requests"]["nvidia.com/gpu"] == 1
    )
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts["/models"]["readOnly"] and {"/dev/shm", "/tmp", "/probe"} <= set(mounts)
    assert spec["terminationGracePeriodSeconds"] > 300
    assert container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"] == 900
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"] == "/v2/models/r1/ready"
    assert container["livenessProbe"]["exec"]["command"][2:] == ["alive", "/tmp/progress.json", "120"]
    assert container["lifecycle"]["preStop"]["exec"]["command"][2:] == ["drain", "300"]
    assert {c["topologyKey"] for c in spec["topologySpreadConstraints"]} == {
        "kubernetes.io/hostname",
        "topology.kubernetes.io/zone",
    }
    assert "nvidia.com/gpu" not in pods("a CPU")["r1-triton"]["containers"][0]["resources"]["limits"]


def test_a_group_of_machines_closes_its_server_and_reaps_its_dead() -> None:
    group = pods("several machines")
    leader, worker = (group[role]["containers"][0] for role in ("leader", "worker"))
    start = leader["command"][-1]
    assert start.startswith("ray start --head --port=6379; exec python3 -m deepseek_triton.ensemble.server.container ")
    assert find_spec("deepseek_triton.ensemble.server.container") is not None
    served = DOCKERFILE.read_text(encoding="utf-8").rpartition("CMD exec ")[2].replace("\\\n", " ").replace('"', "")
    assert shlex.split(start.partition("exec ")[2].replace("'", "")) == shlex.split(served), "as the image starts it"
    assert worker["command"][-1].endswith("exec ray start --address=$(LWS_LEADER_ADDRESS):6379 --block")
    assert group["worker"]["shareProcessNamespace"]
    for container in (leader, worker):
        assert {"name": "checkpoint", "mountPath": "/weights", "readOnly": True} in container["volumeMounts"]
        assert container["image"].startswith("deepseek-triton-vllm:")
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 8


def test_a_new_pod_is_ready_before_an_old_one_goes() -> None:
    for part in ("triton", "gateway"):
        rolling = of_kind("a claim", "Deployment", part)["spec"]["strategy"]["rollingUpdate"]
        assert rolling == {"maxSurge": 1, "maxUnavailable": 0}
        assert of_kind("a claim", "PodDisruptionBudget", part)["spec"]["maxUnavailable"] == 1


def test_the_gateway_alone_reaches_triton() -> None:
    ingress = of_kind("a claim", "NetworkPolicy", "triton")["spec"]["ingress"]
    allowed = {port["port"]: rule["from"] for rule in ingress for port in rule["ports"]}
    assert set(allowed) == {8000, 8001, 8002}
    for port in (8000, 8001):
        (source,) = allowed[port]
        assert source["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "gateway"
        assert set(source) == {"podSelector"}
    assert allowed[8002] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    for part in ("triton", "gateway", "redis"):
        assert of_kind("a claim", "NetworkPolicy", part)["spec"]["policyTypes"] == ["Ingress", "Egress"]
    (redis,) = of_kind("a claim", "NetworkPolicy", "redis")["spec"]["ingress"]
    assert redis["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "gateway"


@pytest.mark.parametrize("variant", ["keda", "hpa"])
def test_replicas_follow_queue_time_and_slots_and_never_cpu(variant: str) -> None:
    kind = {"keda": "ScaledObject", "hpa": "HorizontalPodAutoscaler"}[variant]
    text = yaml.safe_dump(of_kind(variant, kind, "triton"))
    assert all(word in text for word in ("queue", "slots_used", "cache_blocks")) and "cpu" not in text.lower()
    assert "replicas" not in of_kind(variant, "Deployment", "triton")["spec"], "an upgrade must not undo the scaling"
    if variant == "keda":
        queries = [trigger["metadata"]["query"] for trigger in of_kind(variant, kind, "triton")["spec"]["triggers"]]
    else:
        rules = yaml.safe_load(of_kind(variant, "ConfigMap", "adapter-rules")["data"]["rules.yaml"])["rules"]
        queries = [rule["metricsQuery"] for rule in rules]
        metrics = of_kind(variant, kind, "triton")["spec"]["metrics"]
        assert {rule["name"]["as"] for rule in rules} == {metric["pods"]["metric"]["name"] for metric in metrics}
    assert all(names_in(query) and names_in(query) <= set(SERIES) for query in queries)


def test_the_rules_are_prometheus_own_with_the_limits_given() -> None:
    groups = of_kind("monitoring", "PrometheusRule", "rules")["spec"]["groups"]
    written = yaml.safe_load((FOLDER / "prometheus" / "rules.yaml").read_text(encoding="utf-8"))["groups"]
    for rule in written[-1]["rules"]:
        rule["annotations"]["runbook_url"] = f"https://docs.example/{rule['annotations']['runbook_url']}"
    assert groups[1:] == written[1:]
    values = {rule["record"]: rule["expr"] for rule in groups[0]["rules"]}
    assert values[LIMITS["backlog"].recorded] == "vector(25)" and values[LIMITS["error_budget"].recorded] == "vector(0)"
    assert values[LIMITS["queue_p99_seconds"].recorded] == "vector(1)"
    (gateway,) = of_kind("monitoring", "PodMonitor", "gateway")["spec"]["podMetricsEndpoints"]
    assert gateway["authorization"]["credentials"] == {"name": "deepseek-metrics", "key": "key"}
    (endpoint,) = of_kind("monitoring", "PodMonitor", "triton")["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics" and endpoint["relabelings"] == [
        {"targetLabel": "job", "replacement": "triton"}
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of claim, image and job.image"),
        ({**CLAIM, "leaderWorkerSet": {"enabled": True}}, "leaderWorkerSet.checkpoint.claim"),
        ({"repository": {"claim": "a", "image": "b:1"}}, "exactly one of claim, image and job.image"),
        ({**CLAIM, "triton": {"replica": 3}}, "replica"),
        ({**CLAIM, "autoscaling": {"kind": "cpu"}}, "kind"),
        ({**CLAIM, "monitoring": {"limits": {"backlogs": 3}}}, "backlogs"),
        ({**CLAIM, "monitoring": {"runbooks": "https://docs.example"}}, "runbooks"),
        ({**CLAIM, "autoscaling": {"kind": "hpa"}, "leaderWorkerSet": SEVERAL}, "must be none"),
        ({**CLAIM, "redis": {"enabled": False}}, "without redis give DEEPSEEK_GATEWAY_KEYS"),
        ({**CLAIM, "gatewayApi": {"enabled": True}}, "parent.name"),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with helm_python.Chart.load(CHART) as chart, pytest.raises(helm_python.HelmError, match=message):
        chart.validate_schema(values)
        chart.render(values, name="r1", namespace="llm")


def test_the_schema_knows_every_limit() -> None:
    with helm_python.Chart.load(CHART) as chart:
        schema = chart.schema
    assert schema is not None
    assert set(schema["properties"]["monitoring"]["properties"]["limits"]["properties"]) == set(LIMITS)


def test_every_value_is_documented() -> None:
    """A comment stands above, or the name says it all; the schema knows each."""
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    with helm_python.Chart.load(CHART) as chart:
        schema = chart.schema
    assert schema is not None and set(values) == set(schema["properties"]) - {"global"}
    for name, part in values.items():
        if isinstance(part, dict):
            assert set(part) == set(schema["properties"][name]["properties"]), name
    assert len(re.findall(r"^\s*#", text, re.MULTILINE)) >= 25


def test_the_gateway_gets_settings_that_it_has() -> None:
    for variant in ("a claim", "no redis"):
        (container,) = pods(variant)["r1-gateway"]["containers"]
        given = {variable["name"]: variable.get("value", "") for variable in container["env"]}
        settings = GatewaySettings.from_mapping(given)
        assert (settings.host, settings.models, settings.drain_s) == ("0.0.0.0", ("r1",), 300)
        assert pods(variant)["r1-gateway"]["terminationGracePeriodSeconds"] > settings.drain_s
        assert settings.backend_urls == ("dns:r1-triton:8001",) and (settings.anonymous or settings.keys)
        assert pods(variant)["r1-gateway"]["enableServiceLinks"] is False


def test_the_folder_has_no_other_templates_than_these() -> None:
    names = {path.name for path in (CHART / "templates").iterdir() if path.suffix == ".yaml"}
    rendered_by = {m["kind"] for variant in VARIANTS for m in rendered(variant)}
    assert len(names) == 8 and {"Deployment", "StatefulSet", "HorizontalPodAutoscaler"} <= rendered_by
    assert Path(CHART / "Chart.yaml").is_file()
