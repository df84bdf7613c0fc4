"""The chart renders to what Kubernetes accepts, and to options that the service and the job have."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from sidecast.commands.__main__ import build_parser
from sidecast.trainer.hook.config import NowcasterConfig
from sidecast.trainer.job.config import load_config, parse_override

REPOSITORY = Path(__file__).resolve().parents[3]
CHART = REPOSITORY / "deploy" / "helm" / "sidecast"
KUBERNETES = ("1.27.0", "1.37.0")
# Resources of operators, of which Kubernetes has no schema.
OPERATORS = ("RayCluster", "ServiceMonitor")
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "defaults": (),
    "statefulset": ("kind=statefulset", "history.storageClassName=fast"),
    "raycluster": ("kind=raycluster", "secrets.ray=ray-token"),
    "tenants": ("secrets.tenants=tenants", "serviceMonitor.enabled=true", "serviceMonitor.tokenSecret=operator"),
    "client-certificates": ("secrets.clientCa=authority", "secrets.probe=probe"),
    "everything": (
        "serviceMonitor.enabled=true",
        "serviceMonitor.labels.release=prometheus",
        "service.historyGibPerRun=4",
        "service.device=cuda",
        "service.engines=2",
        "service.extraArgs={--weights=/weights/nino.safetensors}",
        "resources.limits.nvidia\\.com/gpu=2",
        "networkPolicy.clients[0].namespaceSelector.matchLabels.team=red",
        "networkPolicy.scrapers[0].namespaceSelector.matchLabels.name=monitoring",
        "nodeSelector.disk=nvme",
        "podAnnotations.note=text",
        "imagePullSecrets[0].name=registry",
        "trainer.enabled=true",
        "trainer.settings={nowcaster.predictor=linear}",
    ),
}


@pytest.fixture(scope="module")
def helm(find_tool: Callable[[str], str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([find_tool("helm"), *words], capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="module")
def rendered(helm: Callable[..., subprocess.CompletedProcess[str]]) -> dict[str, dict[str, Any]]:
    """The resources of every variant by their kinds and names."""
    found = {}
    for variant, settings in VARIANTS.items():
        options = [word for setting in settings for word in ("--set", setting)]
        result = helm("template", "nowcasts", str(CHART), "--namespace", "training", *options)
        assert result.returncode == 0, f"{variant}: {result.stderr}"
        resources = [each for each in yaml.safe_load_all(result.stdout) if each is not None]
        found[variant] = {f"{each['kind']}/{each['metadata']['name']}": each for each in resources}
    return found


def pod_of(resources: dict[str, Any], kind: str) -> dict[str, Any]:
    (resource,) = [each for name, each in resources.items() if name.startswith(f"{kind}/")]
    spec = resource["spec"]["headGroupSpec"] if kind == "RayCluster" else resource["spec"]
    pod: dict[str, Any] = spec["template"]["spec"]
    return pod


def workload_of(variant: str) -> str:
    return {"statefulset": "StatefulSet", "raycluster": "RayCluster"}.get(variant, "Deployment")


def test_helm_lints_it(helm: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = helm("lint", "--strict", str(CHART))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("variant", VARIANTS)
def test_kubernetes_has_all_that_is_rendered(variant: str, rendered: dict[str, dict[str, Any]]) -> None:
    resources = rendered[variant].values()
    assert len(resources) >= 4
    for resource in resources:
        if resource["kind"] not in OPERATORS:
            for version in KUBERNETES:
                kubernetes_validate.validate(resource, version, strict=True)
    for kind in {"Job", "Deployment", "StatefulSet", "RayCluster"} & {each["kind"] for each in resources}:
        # A pod inside an operator's resource is Kubernetes' own.
        pod = pod_of(rendered[variant], kind)
        stand_in = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "stand-in"}, "spec": pod}
        kubernetes_validate.validate(stand_in, KUBERNETES[-1], strict=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_services_options_are_its_commands(variant: str, rendered: dict[str, dict[str, Any]]) -> None:
    pod = pod_of(rendered[variant], workload_of(variant))
    service = pod["containers"][-1]
    serve = build_parser().parse_args(service["args"])
    assert (serve.host, serve.port, serve.metrics_port) == ("0.0.0.0", 50051, 9464)
    assert (serve.token_file is None) == (variant == "tenants")
    assert (serve.tenants_file is None) == (variant != "tenants")
    assert serve.ray_address == ("127.0.0.1:6379" if variant == "raycluster" else None)
    if variant == "everything":
        assert (serve.device, serve.engines, str(serve.weights)) == ("cuda", 2, "/weights/nino.safetensors")
    mounted = {mount["mountPath"] for mount in service["volumeMounts"]}
    files = (serve.tls_cert, serve.tls_key, serve.token_file, serve.tenants_file, serve.tls_client_ca)
    assert {str(path.parent) for path in files if path is not None} <= mounted
    assert str(serve.history_dir.parent) in mounted


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_mount_has_its_volume_and_pods_are_locked_down(variant: str, rendered: dict[str, dict[str, Any]]) -> None:
    kinds = [workload_of(variant)] + (["Job"] if variant == "everything" else [])
    for kind in kinds:
        pod = pod_of(rendered[variant], kind)
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        claimed = {"history"} if variant == "statefulset" else set()
        for container in pod["containers"]:
            names = {mount["name"] for mount in container["volumeMounts"]}
            assert names == set(volumes) | claimed
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_probe_has_the_files_that_it_reads(variant: str, rendered: dict[str, dict[str, Any]]) -> None:
    service = pod_of(rendered[variant], workload_of(variant))["containers"][-1]
    mounted = {mount["mountPath"] for mount in service["volumeMounts"]}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        _, script, address, host, *files = service[name]["exec"]["command"]
        assert (address, host) == ("127.0.0.1:50051", "nowcasts-sidecast.training.svc")
        assert len(files) == (3 if variant == "client-certificates" else 1)
        assert {str(Path(path).parent) for path in (script, *files)} <= mounted
    script = rendered[variant]["ConfigMap/nowcasts-sidecast-probe"]["data"]["probe.py"]
    assert script.strip() == (CHART / "files" / "probe.py").read_text().strip()


def test_services_and_policies_select_the_pods(rendered: dict[str, dict[str, Any]]) -> None:
    resources = rendered["everything"]
    labels = resources["Deployment/nowcasts-sidecast"]["spec"]["template"]["metadata"]["labels"]
    trainer = resources["Job/nowcasts-sidecast-trainer"]["spec"]["template"]["metadata"]["labels"]
    policy = resources["NetworkPolicy/nowcasts-sidecast"]["spec"]
    monitor = resources["ServiceMonitor/nowcasts-sidecast"]
    service = resources["Service/nowcasts-sidecast"]
    for selector in (service["spec"]["selector"], policy["podSelector"]["matchLabels"]):
        assert selector.items() <= labels.items()
        assert not selector.items() <= trainer.items()
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    client, scraper = policy["ingress"]
    assert client["from"][0]["podSelector"]["matchLabels"].items() <= trainer.items()
    assert [len(client["from"]), len(scraper["from"])] == [2, 1]


def test_the_trainers_settings_are_the_jobs(rendered: dict[str, dict[str, Any]]) -> None:
    resources = rendered["everything"]
    command = pod_of(resources, "Job")["containers"][0]["command"]
    assert "--master-addr=nowcasts-sidecast-trainer-0.nowcasts-sidecast-trainer" in command
    assert resources["Service/nowcasts-sidecast-trainer"]["spec"]["clusterIP"] == "None"
    job = command[command.index("sidecast.trainer.main") + 1 :]
    name = next(word.partition("=")[2] for word in job if word.startswith("--config="))
    overrides = [parse_override(word.removeprefix("--set=")) for word in job if word.startswith("--set=")]
    section = load_config(name, overrides).deepspeed["nowcaster"]
    assert set(section) <= {field.name for field in fields(NowcasterConfig)}
    assert section["endpoint"] == "nowcasts-sidecast.training.svc:50051"
    assert (section["enabled"], section["run_name"], section["predictor"]) == (True, "example", "linear")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("kind=daemonset", "kind"),
        ("service.engines=0", "engines"),
        ("service.engine=2", "engine"),
        ("history.size=lots", "size"),
        ("secrets.client=", "client"),
        ("ports.grpc=80", "grpc"),
        ("trainer.settings={lr}", "settings"),
        ("kind=raycluster", "secrets.ray is empty"),
        ("secrets.clientCa=authority", "secrets.probe is empty"),
    ],
)
def test_what_cannot_work_is_refused(
    setting: str, words: str, helm: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    result = helm("template", "nowcasts", str(CHART), "--set", setting)
    assert result.returncode != 0
    assert words in result.stderr


def test_every_value_has_a_schema_and_the_versions_are_the_projects() -> None:
    def check(values: Mapping[str, Any], schema: Mapping[str, Any], where: str) -> None:
        for key, value in values.items():
            assert key in schema["properties"], f"{where}{key}"
            below = schema["properties"][key]
            if isinstance(value, dict) and "properties" in below:
                check(value, below, f"{where}{key}.")

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    check(values, json.loads((CHART / "values.schema.json").read_text()), "")
    pinned = (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert f"ray=={values['rayCluster']['version']}" in pinned
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert f'version = "{version}"' in (REPOSITORY / "pyproject.toml").read_text()
