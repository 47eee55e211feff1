"""`helm upgrade` and `helm rollback` of the chart: what a cluster would refuse, and which pods start anew.

No cluster is here: what one compares is compared, the manifests that Helm's own library renders before and after.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import helm_python
import pytest

from tests.deploy.test_chart import CHART, CLAIM, VARIANTS, Manifest, render, rendered

# Kubernetes refuses a change of anything but these in a StatefulSet's specification.
CHANGEABLE = {"replicas", "ordinals", "template", "updateStrategy", "revisionHistoryLimit", "minReadySeconds",
              "persistentVolumeClaimRetentionPolicy"}  # fmt: skip


def by_name(manifests: Sequence[Manifest]) -> dict[tuple[str, str], Manifest]:
    return {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}


def immutable(manifest: Manifest) -> Any:
    """The part of a manifest that `kubectl apply` may not change."""
    spec = manifest.get("spec", {})
    if manifest["kind"] == "StatefulSet":
        return {name: value for name, value in spec.items() if name not in CHANGEABLE}
    if manifest["kind"] == "Deployment":
        return spec["selector"]
    return spec.get("clusterIP") if manifest["kind"] == "Service" else None


def restarted(before: Sequence[Manifest], after: Sequence[Manifest]) -> set[str]:
    """The workloads whose pods are replaced."""
    old, new = by_name(before), by_name(after)
    templates = {
        key: manifest["spec"]["template"] for key, manifest in old.items() if "template" in manifest.get("spec", {})
    }
    return {name for (kind, name), template in templates.items() if template != new[kind, name]["spec"]["template"]}


@pytest.fixture(scope="module")
def next_chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chart as a later release has it."""
    copy = tmp_path_factory.mktemp("next") / "deepseek-triton"
    shutil.copytree(CHART, copy)
    about = copy / "Chart.yaml"
    text = about.read_text(encoding="utf-8").replace("version: 0.1.0", "version: 0.2.0")
    about.write_text(text.replace('appVersion: "0.1.0"', 'appVersion: "0.2.0"'), encoding="utf-8")
    return copy


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_later_release_changes_nothing_that_is_fixed(variant: str, next_chart: Path) -> None:
    with helm_python.Chart.load(next_chart) as chart:
        assert chart.version == "0.2.0"
    before, after = by_name(rendered(variant)), by_name(render(VARIANTS[variant], next_chart))
    assert set(before) == set(after), "nothing is removed and made anew"
    for key, manifest in before.items():
        assert immutable(manifest) == immutable(after[key]), key


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_rollback_gives_back_what_was(variant: str) -> None:
    assert render(VARIANTS[variant]) == list(rendered(variant))


@pytest.mark.parametrize(
    ("changes", "replaced"),
    [
        ({"triton": {"image": {"tag": "26.12"}}}, {"r1-triton"}),
        ({"repository": {"claim": "models-2"}}, {"r1-triton"}),
        ({"gateway": {"image": {"tag": "0.2.0"}}}, {"r1-gateway"}),
        ({"gateway": {"settings": {"DEEPSEEK_GATEWAY_LOG_LEVEL": "warning"}}}, {"r1-gateway"}),
        ({"redis": {"image": {"tag": "8.2"}}}, {"r1-redis"}),
        ({"triton": {"replicas": 5}}, set()),
        ({"gateway": {"replicas": 5}}, set()),
        ({"autoscaling": {"kind": "keda"}}, set()),
        ({"monitoring": {"enabled": True, "limits": {"backlog": 3}}}, set()),
        ({"gatewayApi": {"enabled": True, "parent": {"name": "public"}}}, set()),
    ],
)
def test_a_change_replaces_the_pods_that_it_concerns_alone(changes: dict[str, Any], replaced: set[str]) -> None:
    after = render({**CLAIM, **changes})
    assert restarted(rendered("a claim"), after) == replaced
    before, now = by_name(rendered("a claim")), by_name(after)
    assert set(before) <= set(now)
    assert all(immutable(manifest) == immutable(now[key]) for key, manifest in before.items())
