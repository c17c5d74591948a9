"""`python -m finetune_trainer.agent`: one attempt on this node."""

from __future__ import annotations

import os
import sys

from finetune_trainer.agent.stopping import StopSignal


def main(stop: StopSignal) -> int:
    """The exit code of the attempt."""
    from finetune_trainer.agent.attempt import Attempt
    from finetune_trainer.agent.log import open_log
    from finetune_trainer.agent.redaction import Redactor
    from finetune_trainer.agent.settings import parse

    settings = parse(sys.argv[1:], os.environ)
    redactor = Redactor(settings.environment)
    log = open_log(settings.log_format, redactor, attempt=settings.attempt, node=settings.node_rank)
    return Attempt(settings, stop, redactor, log).run()


if __name__ == "__main__":
    # Before the slow imports: the kernel drops a signal to PID 1 that has no handler.
    asked = StopSignal()
    asked.install()
    code = main(asked)
    sys.stdout.flush()
    sys.stderr.flush()
    # A transfer that was left behind may still run in a thread, and an orderly exit would wait for it.
    os._exit(code)
