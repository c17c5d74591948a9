"""The progress poller: asks pod 0 of each running attempt how far it is and writes `status.progress`, nothing else.

Reading order: poller (the loop), sightings (whom to ask), schedule (when), document (how, from hostile input), text
(what people read).
"""

from finetune_operator.progress.poller import Poller
from finetune_operator.progress.schedule import ProgressSettings

__all__ = ["Poller", "ProgressSettings"]
