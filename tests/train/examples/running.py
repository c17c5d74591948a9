"""An example's way from its file to its artifact on this machine: preflight, plan, inputs, workers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from finetune_trainer.agent.inputs import fetch_inputs
from finetune_trainer.agent.workdir import WorkDir
from finetune_trainer.cli.jobfile import read_job_file
from finetune_trainer.cli.preparing import check, localise, plan
from finetune_trainer.sources import Reach
from hack import check_examples
from hack.tiny_examples import EXAMPLES, FOLDER
from tests.train.worker.runs import Work

NAMES = sorted(path.stem for path in EXAMPLES.glob("*.yaml"))


class Examples:
    """Runs examples with their files below root in place of /tmp/finetune-tiny; each at most once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.done: dict[str, Work] = {}

    def run(self, name: str) -> Work:
        """The finished work directory of an example; what it needs is run first."""
        if name not in self.done:
            jobs = check_examples.jobs(local=True)
            for uri in check_examples.results_read(jobs[name]):
                self.run(str(check_examples.maker(uri, jobs)))
            self.done[name] = self._run(name)
        return self.done[name]

    def _run(self, name: str) -> Work:
        file = self.root / "jobs" / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text((EXAMPLES / f"{name}.yaml").read_text().replace(str(FOLDER), str(self.root)))
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.root)}
        local = localise(read_job_file(file), None, environment)
        preflight = check(local, environment)
        assert preflight.ok, preflight.findings
        run = plan(local, preflight).run
        work = WorkDir(self.root / "work" / name)
        work.root.mkdir(parents=True)
        fetch_inputs(run, work, Reach(env=environment, allow_file=True))
        found = Work(work.root, run)
        codes = found.train()
        assert codes == [0] * run.world_size, found.logged()
        shutil.copytree(work.artifact, self.root / "tuned" / name)
        return found
