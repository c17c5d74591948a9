"""Binaries are built once per pin, from the standard library alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import tools
from tests.cluster.paths import REPO, TOOL_MODULES, cache_root
from tests.cluster.tools import ToolError


def test_a_tier_asks_only_for_what_it_needs() -> None:
    assert tools.expand(["train"]) == ["versitygw"]
    assert "kubelet" not in tools.expand(["api"])
    assert set(tools.expand(["api", "helm"])) - set(tools.expand(["api"])) == {"helm"}


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ToolError, match=r"unknown tool or tier 'kubeadm'; known are: .*kube-apiserver"):
        tools.expand(["kubeadm"])


def test_every_tool_is_pinned_by_its_module() -> None:
    assert tools.module_version(tools.TOOLS["kube-apiserver"]) == "v1.36.3"
    for tool in tools.TOOLS.values():
        assert tools.module_version(tool).startswith("v")
        assert tool.package in (TOOL_MODULES / tool.module / "go.mod").read_text()


def test_a_changed_pin_is_another_binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tools.binary_path("versitygw")
    copy = tmp_path / "tools"
    shutil.copytree(TOOL_MODULES / "versitygw", copy / "versitygw")
    with (copy / "versitygw" / "go.sum").open("a") as sums:
        sums.write("\n")
    monkeypatch.setattr(tools, "TOOL_MODULES", copy)
    assert tools.binary_path("versitygw") != before


def test_a_second_start_builds_nothing_and_needs_neither_go_nor_packages() -> None:
    built = tools.ensure(["versitygw"])["versitygw"]
    # -S leaves out site-packages; this PATH holds no Go.
    command = [sys.executable, "-S", "-m", "tests.cluster", "tools", "versitygw"]
    environment = {"PATH": "/nonexistent", "FINETUNE_CACHE": str(cache_root())}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(built)
    assert done.stderr == ""


def test_without_go_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ToolError, match=r"run: hack/bootstrap\.sh"):
        tools.ensure(["versitygw"])
