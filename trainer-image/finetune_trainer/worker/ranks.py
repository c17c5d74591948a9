"""Which process of the gang this is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """Place of this process: rank over all nodes, local_rank on its own node."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> Ranks:
        """As the agent set them; a lone process needs none of the variables."""
        world_size = int(env.get("WORLD_SIZE", "1"))
        return cls(
            rank=int(env.get("RANK", "0")),
            local_rank=int(env.get("LOCAL_RANK", "0")),
            world_size=world_size,
            local_world_size=int(env.get("LOCAL_WORLD_SIZE", str(world_size))),
        )

    @property
    def is_main(self) -> bool:
        """Whether this process writes progress, artifact and result."""
        return self.rank == 0

    @property
    def is_node_main(self) -> bool:
        """Whether this process names and marks the checkpoints of its node."""
        return self.local_rank == 0
