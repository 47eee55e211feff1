"""The compose file, without a Docker engine: every source is there, and nothing but the gateway and Grafana is open."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepseek_triton.gateway.settings import PREFIX, SETTINGS
from deploy.generate import FOLDER
from tests.project.test_dockerfile import STAGES

TEXT = (FOLDER / "compose.yaml").read_text(encoding="utf-8")
FILE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = FILE["services"]


def check_schema(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_it_keeps_to_the_schema_of_compose_files(tmp_path: Path) -> None:
    done = check_schema(str(FOLDER / "compose.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(TEXT.replace("read_only:", "readonly:"), encoding="utf-8")
    assert check_schema(str(wrong)).returncode == 1, "the schema refuses what it doesn't know"


def test_it_has_what_one_machine_needs() -> None:
    assert set(SERVICES) == {"triton", "gateway", "redis", "prometheus", "grafana"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_hardened_and_joined_to_what_exists(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["logging"]["options"]["max-size"]
    assert set(service["networks"]) <= set(FILE["networks"])
    assert set(service.get("depends_on", {})) <= set(SERVICES)
    if build := service.get("build"):
        assert build["target"] in STAGES and (FOLDER / build["context"] / "Dockerfile").is_file()
    else:
        assert re.fullmatch(r"[\w/]+:v?\d[\w.]*", service["image"]), "a release, not the latest"
    for volume in service.get("volumes", []):
        source = volume.rpartition(":/")[0] if volume.count(":/") == 1 else volume.split(":")[0]
        source = source.removesuffix(":ro")
        assert source.startswith("${MODELS") or source in FILE["volumes"] or (FOLDER / source).exists(), volume


def test_only_this_machine_reaches_the_gateway_and_grafana() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert ports == {"gateway": ["127.0.0.1:9000:9000"], "grafana": ["127.0.0.1:3000:3000"]}
    assert all(FILE["networks"][name].get("internal") for name in ("models", "store", "metrics"))
    reach = {name for name, service in SERVICES.items() if "models" in service["networks"]}
    assert reach == {"triton", "gateway"}, "nothing but the gateway reaches the models"


def test_no_secret_has_a_default() -> None:
    for name in re.findall(r"\$\{(\w*PASSWORD)(?::\?)?", TEXT):
        assert f"${{{name}:?" in TEXT and f"${{{name}:-" not in TEXT


def test_the_gateways_settings_exist() -> None:
    given = {name for name in SERVICES["gateway"]["environment"] if name.startswith(PREFIX)}
    assert given <= {row.variable for row in SETTINGS}


def test_prometheus_scrapes_what_is_there() -> None:
    configuration = yaml.safe_load((FOLDER / "prometheus" / "prometheus.yaml").read_text(encoding="utf-8"))
    for scrape in configuration["scrape_configs"]:
        for target in scrape["static_configs"][0]["targets"]:
            assert target.partition(":")[0] in SERVICES
    sources = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yaml").read_text(encoding="utf-8"))
    assert sources["datasources"][0]["url"] == "http://prometheus:9090"
    boards = yaml.safe_load((FOLDER / "grafana/provisioning/dashboards/deepseek.yaml").read_text(encoding="utf-8"))
    path = boards["providers"][0]["options"]["path"]
    assert any(volume.split(":")[1] == path for volume in SERVICES["grafana"]["volumes"])
    assert Path(FOLDER / "grafana" / "dashboards").is_dir()
