"""Picks the cluster for this machine: kind where a Docker engine answers, host processes where none does."""

from __future__ import annotations

from typing import Literal

from tests.cluster import images, tools
from tests.cluster.kind import KindCluster
from tests.cluster.local import ClusterError, LocalCluster, Profile

Wanted = Literal["auto", "kind", "local"]
Cluster = LocalCluster | KindCluster


def choose(wanted: Wanted = "auto", profile: Profile = "full") -> Cluster:
    """The cluster to use, not started yet; says on stderr which and why. Raises ClusterError for an impossible wish."""
    if profile == "control-plane":
        if wanted == "kind":
            raise ClusterError("the control-plane profile always runs as host processes; use local")
        return LocalCluster("control-plane")
    engine = images.docker_answers()
    if wanted == "kind" and not engine:
        raise ClusterError("CLUSTER=kind needs a Docker engine and `docker info` does not answer; use local or auto")
    if wanted == "kind" or (wanted == "auto" and engine):
        tools.say("cluster: kind, " + ("as asked" if wanted == "kind" else "because a Docker engine answers"))
        return KindCluster()
    why = "as asked" if wanted == "local" else "because no Docker engine answers"
    tools.say(f"cluster: local (host processes), {why}")
    return LocalCluster("full")
