"""Rendered children: as the golden files say, and within the rules that hold for every pod."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api import failures, naming
from finetune_api.planner import build_references
from finetune_operator.render import preflight_job
from tests.render.cases import CASES, CONFIG, FOLDER, path, render
from tests.unit.operator.builders import UID, a_job, a_spec

JOBS = [name for name in CASES if name != "plan"]


def pod_of(name: str) -> dict[str, Any]:
    """The pod template's spec of the case's Job."""
    spec: dict[str, Any] = CASES[name]()[0]["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize("name", CASES)
def test_children_look_as_the_golden_file_says(name: str) -> None:
    assert render(name) == path(name).read_text(), "if this is meant: PYTHONPATH=api:operator:. python -m tests.render"


def test_there_is_no_golden_file_without_a_case() -> None:
    assert {file.stem for file in FOLDER.glob("*.yaml")} == set(CASES)


@pytest.mark.parametrize("name", JOBS)
def test_every_pod_passes_pod_security_restricted(name: str) -> None:
    pod = pod_of(name)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert {next(iter(set(volume) - {"name"})) for volume in pod["volumes"]} <= {
        "configMap",
        "emptyDir",
        "persistentVolumeClaim",
    }
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("name", JOBS)
def test_no_pod_holds_a_token_and_secrets_are_read_by_fixed_keys_only(name: str) -> None:
    pod = pod_of(name)
    assert pod["automountServiceAccountToken"] is False
    for container in pod["containers"]:
        assert "envFrom" not in container
        for variable in container["env"]:
            source = variable.get("valueFrom", {})
            assert set(source) <= {"secretKeyRef"}
            if source:
                assert source["secretKeyRef"]["key"] in naming.SECRET_KEYS


def test_keys_that_s3_needs_must_exist_and_the_others_need_not() -> None:
    [container] = pod_of("preflight")["containers"]
    optional = {
        variable["valueFrom"]["secretKeyRef"]["key"]: variable["valueFrom"]["secretKeyRef"].get("optional", False)
        for variable in container["env"]
        if "valueFrom" in variable
    }
    assert optional == {
        "AWS_ACCESS_KEY_ID": False,
        "AWS_SECRET_ACCESS_KEY": False,
        "AWS_SESSION_TOKEN": True,
        "HF_TOKEN": True,
    }


@pytest.mark.parametrize("name", JOBS)
def test_every_exit_code_of_the_table_ends_the_job_with_its_evidence(name: str) -> None:
    rules = CASES[name]()[0]["spec"]["podFailurePolicy"]["rules"]
    assert rules[0]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert rules[1]["onExitCodes"]["values"] == list(failures.exit_codes())
    [container] = pod_of(name)["containers"]
    assert rules[1]["onExitCodes"]["containerName"] == container["name"]


@pytest.mark.parametrize("name", [name for name in JOBS if not name.startswith("preflight")])
def test_an_attempt_gets_what_it_asks_for_and_no_more(name: str) -> None:
    [container] = pod_of(name)["containers"]
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    assert limits == {name: amount for name, amount in requests.items() if name != "cpu"}


def test_the_gang_of_two_nodes_meets_at_the_first_pods_name() -> None:
    job, _, service, _ = CASES["lora-two-nodes-a100-80-with-efa"]()
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (2, 2)
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    [container] = job["spec"]["template"]["spec"]["containers"]
    environment = {v["name"]: v.get("value") for v in container["env"]}
    assert environment[naming.ENV_MASTER] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert container["resources"]["limits"]["vpc.amazonaws.com/efa"] == "4"
    assert container["resources"]["requests"]["cpu"] == "48000m"


def test_a_cpu_pool_asks_for_no_device() -> None:
    [container] = pod_of("cpu-two-processes-claims")["containers"]
    assert container["resources"]["requests"] == {"cpu": "1000m", "memory": "3072Mi", "ephemeral-storage": "8192Mi"}


def test_only_the_claim_of_the_output_is_mounted_for_writing() -> None:
    def writable(name: str) -> dict[str, bool]:
        return {
            volume["persistentVolumeClaim"]["claimName"]: not volume["persistentVolumeClaim"]["readOnly"]
            for volume in pod_of(name)["volumes"]
            if "persistentVolumeClaim" in volume
        }

    assert writable("preflight-claims-ca-and-service-account") == {"models": False, "results": True}
    assert writable("cpu-two-processes-claims") == {"models": False, "results": True}


def test_the_longest_name_stays_within_a_hostname() -> None:
    name = "a" * 47
    pod_name = f"{naming.attempt_name(name, UID, 9999)}-255"
    assert len(pod_name) <= 63
    job = preflight_job(a_job(name=name, generation=9999), a_spec(), build_references(a_spec()), CONFIG)
    assert len(f"{job['metadata']['name']}-0") <= 63
