"""What the agent is told by its command line and environment, parsed once."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_api import naming

# Kubernetes' default grace period.
DEFAULT_STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Settings:
    """Everything that one attempt of this node depends on beside the run file. Times are in seconds."""

    run_file: Path
    work: Path
    termination_log: Path
    host: str
    port: int
    master: str
    master_port: int
    master_progress_port: int
    attempt: int
    node_rank: int
    stop_seconds: float
    hang_seconds: float
    start_seconds: float
    peer_seconds: float
    kill_seconds: float
    storage_seconds: float
    worker_module: str
    memory_events: Path | None
    log_format: str
    local: bool
    environment: Mapping[str, str]


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """The settings; a wrong command line ends the process with exit code 2 and the usage."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        attempt = int(environment.get(naming.ENV_ATTEMPT, "0"))
        node_rank = int(environment.get(naming.ENV_NODE_RANK, "0"))
    except ValueError as error:
        parser.error(f"{naming.ENV_ATTEMPT} and {naming.ENV_NODE_RANK} have to be whole numbers: {error}")
    return Settings(
        run_file=given.run_file,
        work=given.work.absolute(),
        termination_log=given.termination_log,
        host=given.host,
        port=given.port,
        master=environment.get(naming.ENV_MASTER, "127.0.0.1"),
        master_port=given.master_port,
        master_progress_port=given.master_progress_port,
        attempt=attempt,
        node_rank=node_rank,
        stop_seconds=given.stop_budget,
        hang_seconds=given.hang_seconds,
        start_seconds=given.start_seconds,
        peer_seconds=given.peer_seconds,
        kill_seconds=given.kill_grace,
        storage_seconds=given.storage_seconds,
        worker_module=given.worker_module,
        memory_events=given.memory_events,
        log_format=given.log_format,
        local=given.local,
        environment=dict(environment),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="finetune_trainer.agent", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--run-file", type=Path, default=Path(naming.RUN_FILE_PATH), help="what to train")
    add("--work", type=Path, default=Path(naming.SCRATCH_PATH, "work"), help="work directory")
    add("--termination-log", type=Path, default=Path(naming.TERMINATION_LOG), help="where the last message goes")
    # The operator asks on the pod's address, which the agent does not know.
    add("--host", default="0.0.0.0", help="address that the HTTP server listens on")  # noqa: S104
    add("--port", type=int, default=naming.PROGRESS_PORT, help="its port; 0 takes a free one (see WORK/state/port)")
    add("--master-port", type=int, default=naming.MASTER_PORT, help="rendezvous port; 0 takes a free one")
    add("--master-progress-port", type=int, default=naming.PROGRESS_PORT, help="HTTP port of node 0's agent")
    add("--stop-budget", type=float, default=DEFAULT_STOP_SECONDS, help="seconds from SIGTERM to the exit")
    add("--hang-seconds", type=float, default=60.0, help="shortest silence of all workers that counts as a hang")
    add("--start-seconds", type=float, default=1800.0, help="the same while loading and publishing")
    add("--peer-seconds", type=float, default=900.0, help="how long other nodes wait for node 0 to claim the output")
    add("--kill-grace", type=float, default=2.0, help="seconds between SIGTERM and SIGKILL of surviving workers")
    add("--storage-seconds", type=float, default=600.0, help="how long a run waits at its end, or where it is refused")
    add("--worker-module", default="finetune_trainer.worker", help="module that each worker runs")
    add("--memory-events", type=Path, help="the cgroup's memory.events or memory.oom_control")
    add("--log-format", choices=("json", "text"), default="json", help="json in pods, text for people")
    add("--local", action="store_true", help="allow file:// places, as `finetune run` does")
    return parser
