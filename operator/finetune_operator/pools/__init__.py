"""Status of the GPUPools: which nodes they have, and how many GPUs jobs hold and wait for.

Reading order: reporter (the loop), summary (what a pool's status is).
"""

from finetune_operator.pools.reporter import PoolReporter

__all__ = ["PoolReporter"]
