"""The manifests, the alert rules and the board of deploy/, as far as no cluster is needed.

What only a cluster can say (admission, scheduling, the custom resources of operators) is not checked.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from salver.server.config import parse_config
from salver.server.metrics import Metrics
from salver.server.rpc.server import SERVICES, STATUS_CODES, all_methods

REPOSITORY = Path(__file__).resolve().parents[2]
KUBERNETES = REPOSITORY / "deploy" / "kubernetes"
CONTAINERFILE = REPOSITORY / "deploy" / "Containerfile"
MONITORING = KUBERNETES / "components" / "monitoring"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
VERSION = "1.34"
# Of operators and of the Gateway API: no schema of theirs is at hand.
CUSTOM = ("monitoring.coreos.com/", "keda.sh/", "gateway.networking.k8s.io/")

pytestmark = pytest.mark.tool("kubectl")


def build(kubectl: str, overlay: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [kubectl, "kustomize", str(KUBERNETES / "overlays" / overlay)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = (item for item in objects if item["kind"] == kind)
    return found


def main_container(objects: list[dict[str, Any]]) -> dict[str, Any]:
    (container,) = of_kind(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def arguments(container: dict[str, Any], objects: list[dict[str, Any]], directory: Path) -> list[str]:
    """What the container's process is told, its mounted config file in `directory`."""
    file = directory / "salver.toml"
    config = next(o for o in objects if o["metadata"]["name"].startswith("salver-config"))
    file.write_text(config["data"]["salver.toml"])
    return [str(file) if word == "/etc/salver/salver.toml" else word for word in container["args"]]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay(overlay: str, tool: str, tmp_path: Path) -> None:
    """It builds, keeps to the schemas, and says one thing in all its places."""
    objects = build(tool, overlay)
    for item in objects:
        assert item["kind"] == "Namespace" or item["metadata"]["namespace"] == "salver"
        if not item["apiVersion"].startswith(CUSTOM):
            kubernetes_validate.validate(item, VERSION, strict=True)

    deployment = of_kind(objects, "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,), (fetch,) = pod["containers"], pod["initContainers"]
    config = parse_config(arguments(container, objects, tmp_path)[1:], {})
    assert parse_config(arguments(fetch, objects, tmp_path)[1:], {}).model == config.model
    assert (container["args"][0], fetch["args"][0]) == ("serve", "pull")

    # The grace holds the pause before SIGTERM, the drain, and a moment to end.
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= pause + config.drain_period + 5

    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["grpc"] == config.port and ports["metrics"] == config.metrics_port
    assert ports.get("health") == config.health_port and len({*ports.values()}) == len(ports)
    plaintext = config.health_port if config.tls_cert else config.port
    probes = [container[f"{name}Probe"]["grpc"] for name in ("startup", "readiness", "liveness")]
    assert [p["port"] for p in probes] == [plaintext] * 3
    assert [p["service"] for p in probes] == ["readiness", "readiness", "liveness"]

    # Each flag that names a file has it mounted, and what is written has a volume.
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    for file in (
        config.tls_cert, config.tls_key, config.tls_client_ca, config.tokens, config.admin_token_file
    ):  # fmt: skip
        assert file is None or str(file.parent) in mounts
    for root in (config.adapter_root, config.weights_root):
        assert root is None or str(root) in mounts
    assert config.admin_port == ports.get("admin") and config.admin_is_open == ("admin" in ports)
    assert {"/tmp", "/var/cache/salver", "/etc/salver"} <= mounts
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert volumes == {mount["name"] for mount in container["volumeMounts"]}

    # Restricted, by our own eyes too: the API server's are not here.
    assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for each in (container, fetch):
        security = each["securityContext"]
        assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert each["resources"]["requests"]["memory"] == each["resources"]["limits"]["memory"]
    assert int(container["resources"]["requests"]["cpu"]) == config.threads

    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    for item in objects:
        if item["kind"] in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
            selector = item["spec"].get("selector", item["spec"].get("podSelector"))
            assert selector.get("matchLabels", selector).items() <= labels, item["kind"]


def test_what_overlays_add(tool: str) -> None:
    objects = build(tool, "gpu")
    gpu, container = of_kind(objects, "Deployment")["spec"]["template"]["spec"], main_container(objects)
    assert container["image"].endswith("-cuda")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1" and gpu["tolerations"]
    for overlay, kind in (("autoscale", "HorizontalPodAutoscaler"), ("keda", "ScaledObject")):
        objects = build(tool, overlay)
        assert of_kind(objects, kind)["spec"]["scaleTargetRef"]["name"] == "salver"
        assert "replicas" not in of_kind(objects, "Deployment")["spec"]
    objects = build(tool, "admin")
    roots = [word.split("=")[0] for word in main_container(objects)["args"] if "-root=" in word]
    assert roots == ["--adapter-root", "--weights-root"]
    admin = [item["spec"] for item in objects if item["kind"] == "NetworkPolicy"]
    (rule,) = (rule for spec in admin for rule in spec["ingress"] if rule["ports"] == [{"port": "admin"}])
    assert rule["from"] == [{"podSelector": {"matchLabels": {"salver.dev/admin": "true"}}}]
    mtls = build(tool, "mtls")
    volumes = of_kind(mtls, "Deployment")["spec"]["template"]["spec"]["volumes"]
    names = {volume["secret"]["secretName"] for volume in volumes if "secret" in volume}
    assert names == {"salver-tls", "salver-tokens"}
    assert of_kind(mtls, "Service")["spec"]["clusterIP"] == "None"


def test_the_gateway_knows_every_service(tool: str) -> None:
    (rule,) = of_kind(build(tool, "gateway"), "GRPCRoute")["spec"]["rules"]
    routed = {match["method"]["service"] for match in rule["matches"]}
    assert routed == {*SERVICES, "grpc.health.v1.Health"}


def test_the_containerfile(find_tool: Any) -> None:
    """hadolint has nothing to say that is not answered there; what runs is no root and has no compiler."""
    done = subprocess.run(
        [find_tool("hadolint"), "--no-color", str(CONTAINERFILE)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    last = CONTAINERFILE.read_text().rpartition("\nFROM ")[2]
    assert "USER 65532:65532" in last and "apt-get" not in last


def test_what_stands_in_for_tritons_compiler(tmp_path: Path) -> None:
    """It hands out what was compiled with the image, and says so where there is nothing."""
    image = CONTAINERFILE.parent / "image"
    for name in ("bin", "lib"):
        (tmp_path / name).mkdir()
    shutil.copy(image / "triton_cc.sh", tmp_path / "bin" / "triton-cc")
    build = ["sh", str(image / "build_triton_driver.sh"), str(tmp_path), str(tmp_path / "lib" / "triton")]
    subprocess.run(build, check=True, timeout=60)  # the variant for CPUs: no Triton, nothing to compile
    (tmp_path / "lib" / "triton" / "cuda_utils.so").write_bytes(b"compiled")

    def compiler(name: str) -> subprocess.CompletedProcess[str]:
        words = [
            f"/somewhere/{name}.c",
            "-O3",
            "-shared",
            "-o",
            str(tmp_path / "out.so"),
            "-L/x",
            "-l:y.so.1",
        ]
        command = ["sh", str(tmp_path / "bin" / "triton-cc"), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert compiler("cuda_utils").returncode == 0
    assert (tmp_path / "out.so").read_bytes() == b"compiled"
    refused = compiler("other")
    assert refused.returncode != 0 and "no compiler in this image" in refused.stderr


def test_the_config_file_is_one() -> None:
    tomllib.loads((KUBERNETES / "base" / "salver.toml").read_text())


# ---- rules and board ----


def rules() -> dict[str, Any]:
    spec: dict[str, Any] = yaml.safe_load((MONITORING / "prometheusrule.yaml").read_text())["spec"]
    return spec


def board() -> dict[str, Any]:
    made: dict[str, Any] = json.loads((MONITORING / "board.json").read_text())
    return made


def board_queries() -> Iterator[str]:
    for panel in board()["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


def series_names() -> set[str]:
    metrics = Metrics("m", methods=all_methods(), codes=STATUS_CODES, build={"version": "1"})
    return {sample.name for family in metrics.registry.collect() for sample in family.samples}


def test_the_autoscalers_metric_is_the_adapters() -> None:
    """What hpa.yaml names is what prometheus-adapter makes of our series by the rule beside it."""
    hpa = yaml.safe_load((KUBERNETES / "components" / "hpa" / "hpa.yaml").read_text())
    (metric,) = hpa["spec"]["metrics"]
    values = yaml.safe_load((KUBERNETES / "components" / "hpa" / "prometheus-adapter.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    series = rule["seriesQuery"].partition("{")[0]
    assert re.fullmatch(rule["name"]["matches"], series) and rule["name"]["as"] == "$1"
    assert metric["pods"]["metric"]["name"] == series and series in series_names()


@pytest.mark.parametrize("queries", ["board", "rules", "autoscalers"])
def test_every_query_names_series_that_there_are(queries: str) -> None:
    if queries == "board":
        texts = [*board_queries(), *(v["query"]["query"] for v in board()["templating"]["list"][1:])]
    elif queries == "rules":
        texts = [rule["expr"] for group in rules()["groups"] for rule in group["rules"]]
    else:
        texts = [
            (KUBERNETES / "components" / "hpa" / "hpa.yaml").read_text().partition("metric:")[2],
            (KUBERNETES / "components" / "keda" / "scaledobject.yaml").read_text().partition("query:")[2],
        ]
    named = {name for text in texts for name in re.findall(r"\b(?:salver|grpc_server|process)_\w+", text)}
    assert named and named <= series_names(), named - series_names()


def test_the_alert_rules(find_tool: Any, tmp_path: Path) -> None:
    """promtool: each alert fires by its cause, and stays quiet beside it. The board's queries parse."""
    promtool = find_tool("promtool")
    spec = rules()
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    (tmp_path / "rules_test.yaml").write_text((MONITORING / "rules_test.yaml").read_text())
    tested = yaml.safe_load((MONITORING / "rules_test.yaml").read_text())["tests"]
    names = {rule["alert"] for group in spec["groups"] for rule in group["rules"]}
    cases = [
        (case["alertname"], bool(case["exp_alerts"])) for test in tested for case in test["alert_rule_test"]
    ]
    assert sorted(cases) == sorted((name, fires) for name in names for fires in (True, False))
    queries = [query.replace("$__rate_interval", "5m") for query in board_queries()]
    recorded = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "board.yaml").write_text(yaml.safe_dump({"groups": [{"name": "b", "rules": recorded}]}))
    for words in (("check", "rules", "rules.yaml", "board.yaml"), ("test", "rules", "rules_test.yaml")):
        done = subprocess.run([promtool, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_its_runbook() -> None:
    headings = re.findall(r"^### (\w+)$", (REPOSITORY / "docs" / "operations.md").read_text(), re.MULTILINE)
    for group in rules()["groups"]:
        for rule in group["rules"]:
            assert rule["alert"] in headings
            assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{rule['alert'].lower()}"
