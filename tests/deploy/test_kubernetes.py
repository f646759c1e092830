"""Kubernetes: every object by its schema, as it is written and as kustomize makes it, and what no schema asks."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from service.app import create_app
from service.settings import Settings
from tests.deploy.files import KUBERNETES, KUSTOMIZED, manifests, pod_templates, walk
from workers.contract import JobSpec

VERSIONS = ("1.31", "1.37")
RAY = json.loads((Path(__file__).parent / "kuberay.schema.json").read_text())
OURS = manifests()
Objects = list[dict[str, Any]]


@functools.cache
def built(name: str) -> tuple[dict[str, Any], ...]:
    """What kustomize makes of a directory."""
    tool = shutil.which("kustomize")
    kubectl = shutil.which("kubectl")
    if tool is None and kubectl is None:
        pytest.skip("neither kustomize nor kubectl is here")
    command = [tool, "build"] if tool else [str(kubectl), "kustomize"]
    made = subprocess.run([*command, str(KUBERNETES / name)], capture_output=True, text=True, timeout=60, check=False)
    assert made.returncode == 0, made.stderr
    assert "Warning" not in made.stderr
    return tuple(yaml.safe_load_all(made.stdout))


def check(manifest: dict[str, Any], version: str) -> None:
    """Raise where an object is not what its schema asks; of Ray's, its pods are checked by Kubernetes' own."""
    if not manifest["apiVersion"].startswith("ray.io/"):
        kubernetes_validate.validate(manifest, version, strict=True)
        return
    jsonschema.Draft202012Validator(RAY).validate(manifest)
    for template in pod_templates(manifest):
        metadata = {"name": "pod", **template.get("metadata", {})}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        kubernetes_validate.validate(pod, version, strict=True)


def pods(objects: Objects) -> Iterator[tuple[str, dict[str, Any]]]:
    for each in objects:
        for template in pod_templates(each):
            yield f"{each['kind']}/{each['metadata']['name']}", template


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_what_its_schema_asks(version: str) -> None:
    assert len(OURS) > 20
    for path, manifest in OURS:
        try:
            check(manifest, version)
        except jsonschema.ValidationError as error:
            pytest.fail(f"{path.name}, {manifest['kind']}: {error.message} at {list(error.absolute_path)}")


@pytest.mark.parametrize("name", KUSTOMIZED)
def test_what_kustomize_makes_is_too(name: str) -> None:
    for manifest in built(name):
        check(manifest, VERSIONS[-1])
        assert manifest["metadata"].get("namespace") == "d2ft" or manifest["kind"] == "Namespace"


def test_the_schema_refuses_what_is_misspelt() -> None:
    cluster = next(each for _, each in OURS if each["kind"] == "RayCluster")
    for broken in ({"authOption": {"mode": "token"}}, {"authOptions": {"mode": "on"}}, {"rayVersion": 2.6}):
        with pytest.raises(jsonschema.ValidationError):
            check({**cluster, "spec": {**cluster["spec"], **broken}}, VERSIONS[-1])


def test_the_schema_refuses_what_the_operator_refuses() -> None:
    cluster = next(each for _, each in OURS if each["kind"] == "RayCluster")
    job = next(each for _, each in OURS if each["kind"] == "RayJob")
    head, (group, *_) = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    check({**cluster, "spec": {**cluster["spec"], "upgradeStrategy": {"type": "Recreate"}}}, VERSIONS[-1])  # RUNBOOK.md
    for owner, change in (
        (cluster, {"gcsFaultToleranceOptions": {"externalStorageNamespace": "x"}}),
        (cluster, {"authOptions": {"mode": "disabled", "enableK8sTokenAuth": True}}),
        (cluster, {"headGroupSpec": {**head, "resources": {"CPU": "1"}}}),  # num-cpus is in rayStartParams
        (cluster, {"headGroupSpec": {**head, "rayStartParams": {"labels": "a=b"}}}),
        (cluster, {"workerGroupSpecs": [{**group, "labels": {"d2ft/kind": "a b"}}]}),
        (cluster, {"workerGroupSpecs": [{name: group[name] for name in group if name != "minReplicas"}]}),
        (job, {"shutdownAfterJobFinishes": False}),  # with ttlSecondsAfterFinished
        (job, {"clusterSelector": {"ray.io/cluster": "d2ft"}}),
        (job, {"rayClusterSpec": {**job["spec"]["rayClusterSpec"], "upgradeStrategy": {"type": "Recreate"}}}),
    ):
        with pytest.raises(jsonschema.ValidationError):
            check({**owner, "spec": {**owner["spec"], **change}}, VERSIONS[-1])
    without = {name: value for name, value in cluster["spec"].items() if name != "rayVersion"}
    for broken in ({**cluster, "spec": without}, {**cluster, "metadata": {"name": "1st"}}):
        with pytest.raises(jsonschema.ValidationError):
            check(broken, VERSIONS[-1])


@pytest.mark.parametrize("name", KUSTOMIZED)
def test_pods_have_no_rights_they_do_not_need(name: str) -> None:
    for owner, template in pods(list(built(name))):
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False, owner
        assert spec["securityContext"]["runAsNonRoot"] is True, owner
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, owner
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False and context["capabilities"] == {"drop": ["ALL"]}, owner
            assert "memory" in container["resources"]["limits"] and "cpu" in container["resources"]["requests"], owner


@pytest.mark.parametrize("name", KUSTOMIZED)
def test_images_have_a_version_and_volumes_are_there(name: str) -> None:
    for owner, template in pods(list(built(name))):
        volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
        if owner.startswith("StatefulSet/"):
            volumes.add("data")
        for container in template["spec"]["containers"]:
            assert ":" in container["image"] and not container["image"].endswith(":latest"), owner
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes, owner


@pytest.mark.parametrize("name", KUSTOMIZED)
def test_ray_asks_for_its_token_and_reports_nowhere(name: str) -> None:
    for each in built(name):
        if each["apiVersion"] != "ray.io/v1":
            continue
        cluster = each["spec"].get("rayClusterSpec", each["spec"])
        assert cluster["authOptions"] == {"mode": "token"} and cluster["rayVersion"] == "2.60.0"
        for template in pod_templates(each):
            env = {one["name"]: one.get("value") for one in template["spec"]["containers"][0]["env"]}
            assert env["RAY_USAGE_STATS_ENABLED"] == "0" and "127.0.0.1" in env["RAY_USAGE_STATS_REPORT_URL"]
            assert template["spec"]["terminationGracePeriodSeconds"] >= 90


def test_every_type_of_gpu_is_a_group_with_a_label() -> None:
    cluster = next(each for each in built("overlays/gpu") if each["kind"] == "RayCluster")
    groups = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    assert groups["cpu"]["replicas"] == groups["cpu"]["maxReplicas"] == 0
    for name in ("a100", "l4"):
        assert groups[name]["labels"]["ray.io/accelerator-type"] == name.upper()
        container = groups[name]["template"]["spec"]["containers"][0]
        assert container["image"].startswith("d2ft/worker:")
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_the_state_of_gcs_is_kept_by_redis_or_by_rocksdb() -> None:
    def cluster(name: str) -> dict[str, Any]:
        found: dict[str, Any] = next(each["spec"] for each in built(name) if each["kind"] == "RayCluster")
        return found

    assert cluster("base")["gcsFaultToleranceOptions"]["redisAddress"] == "redis://d2ft-redis:6379"
    assert "gcsFaultToleranceOptions" not in cluster("overlays/production")
    head = cluster("overlays/production")["headGroupSpec"]["template"]["spec"]["containers"][0]
    env = {one["name"]: one.get("value") for one in head["env"]}
    assert env["RAY_gcs_storage"] == "rocksdb"
    assert env["RAY_gcs_storage_path"] in [mount["mountPath"] for mount in head["volumeMounts"]]
    assert not [each for each in built("overlays/production") if "redis" in each["metadata"]["name"]]


@pytest.mark.parametrize("name", [name for name in KUSTOMIZED if name != "rayjob"])
def test_nothing_speaks_to_anything_but_what_is_named(name: str) -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in built(name) if each["kind"] == "NetworkPolicy"}
    assert policies["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    labels = [template["metadata"]["labels"] for _, template in pods(list(built(name)))]
    for policy in ("ray", "api", "postgres"):
        selector = policies[policy]["podSelector"]["matchLabels"]
        assert any(selector.items() <= each.items() for each in labels), policy
    assert [name for name, spec in policies.items() if any(one == {} for one in walk(spec.get("ingress", [])))] == []


@pytest.mark.parametrize("name", [name for name in KUSTOMIZED if name != "rayjob"])
def test_names_of_services_secrets_and_claims_lead_somewhere(name: str) -> None:
    objects = built(name)
    names = {(each["kind"], each["metadata"]["name"]) for each in objects}
    for _, template in pods(list(objects)):
        for volume in template["spec"].get("volumes", []):
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names
    settings = next(each["data"] for each in objects if each["kind"] == "ConfigMap")
    for url in (settings["D2FT_PUBLIC_URL"], settings["D2FT_DATABASE_URL"]):
        host = url.rpartition("@")[2].rpartition("//")[2].partition(":")[0]
        assert ("Service", host) in names, url
    # KubeRay makes the head's Service and the Secret of the token by the cluster's name.
    assert settings["D2FT_RAY_ADDRESS"] == "http://d2ft-head-svc:8265" and ("RayCluster", "d2ft") in names


def test_probes_and_ports_are_the_applications_own(tmp_path: Path) -> None:
    api = next(each for each in built("base") if each["kind"] == "Deployment")
    settings = next(each["data"] for each in built("base") if each["kind"] == "ConfigMap")
    container = api["spec"]["template"]["spec"]["containers"][0]
    assert {port["name"]: str(port["containerPort"]) for port in container["ports"]} == {"http": settings["D2FT_PORT"]}
    routes = create_app(Settings(home=tmp_path)).openapi()["paths"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["path"] in routes and asked["port"] == "http"
        assert {"name": "Host", "value": "localhost"} in asked["httpHeaders"]  # whatever D2FT_ALLOWED_HOSTS says


def test_the_rayjobs_file_is_a_job() -> None:
    job = next(each for each in built("rayjob") if each["kind"] == "ConfigMap")
    JobSpec.model_validate_json(job["data"]["job.json"])
    entry = next(each for each in built("rayjob") if each["kind"] == "RayJob")["spec"]["entrypoint"].split()
    assert entry[:3] == ["/opt/d2ft/bin/python", "-m", "workers.loop"] and entry[4] == "/etc/d2ft/job.json"
