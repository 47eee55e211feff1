"""The chart's custom resources against their operators' own schemas, which this project doesn't carry.

CRDS=FOLDER pytest tests/deploy/test_custom_resources.py, with the CustomResourceDefinitions of KEDA, the Prometheus
operator, LeaderWorkerSet, Gateway API and its inference extension in FOLDER, as their repositories have them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.deploy.test_chart import CUSTOM, VARIANTS, Manifest, rendered

FOLDER = os.environ.get("CRDS", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="CRDS names no folder of CustomResourceDefinitions")
RESOURCES = [
    pytest.param(manifest, id=f"{variant}-{manifest['kind']}-{manifest['metadata']['name']}")
    for variant in VARIANTS
    for manifest in (rendered(variant) if FOLDER else ())
    if manifest["kind"] in CUSTOM
]


def strict(schema: Any) -> Any:
    """Refuse unknown fields, as `kubectl apply --validate=strict` does; Kubernetes' own keywords are resolved."""
    if not isinstance(schema, dict):
        return schema
    made = {
        name: strict(value) if name in ("items", "additionalProperties") else value for name, value in schema.items()
    }
    if "properties" in schema:
        made["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return made


@cache
def schemas() -> dict[tuple[str, str], Any]:
    """(kind, apiVersion) → schema."""
    found = {}
    for path in Path(FOLDER).glob("*.yaml"):
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))["spec"]
        for version in spec["versions"]:
            schema = strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            found[spec["names"]["kind"], f"{spec['group']}/{version['name']}"] = schema
    return found


def errors(manifest: Manifest) -> Iterator[str]:
    schema = schemas()[manifest["kind"], manifest["apiVersion"]]
    for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest):
        yield f"{list(error.absolute_path)}: {error.message[:300]}"


@pytest.mark.parametrize("manifest", RESOURCES)
def test_a_custom_resource_keeps_to_its_schema(manifest: Manifest) -> None:
    assert list(errors(manifest)) == []
    wrong = copy.deepcopy(manifest)
    wrong["spec"]["misspelt"] = 1
    assert any("misspelt" in text for text in errors(wrong))


def test_every_custom_kind_was_looked_at() -> None:
    assert {kind for kind, _ in schemas()} >= CUSTOM
