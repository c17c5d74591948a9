"""GPUPool: a kind of node that the platform team offers."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field, StringConstraints

from finetune_api.base import Document, Tolerant
from finetune_api.fields import NonNegative, Positive, ShortText
from finetune_api.status import Condition

LabelKey = Annotated[str, StringConstraints(min_length=1, max_length=317)]
LabelValue = Annotated[str, StringConstraints(max_length=63)]


class Provisioning(StrEnum):
    """Where nodes come from."""

    STATIC = "Static"
    AUTOSCALED = "Autoscaled"


class PerGpu(Document):
    """What a pod asks for with each GPU."""

    cpu: Annotated[float, Field(gt=0, le=1024)]
    """CPU cores."""
    memory_gib: Annotated[float, Field(gt=0, le=65536, alias="memoryGiB")]
    """Host memory in GiB."""
    ephemeral_storage_gib: Annotated[float, Field(gt=0, le=65536, alias="ephemeralStorageGiB")]
    """Scratch disk in GiB."""


class Toleration(Document):
    """A toleration, as in a pod."""

    key: LabelKey | None = None
    """The taint's key; absent with operator Exists matches all."""
    operator: Annotated[str, StringConstraints(pattern="^(Exists|Equal)$", max_length=6)] | None = None
    """Exists or Equal."""
    value: LabelValue | None = None
    """The taint's value."""
    effect: (
        Annotated[str, StringConstraints(pattern="^(NoSchedule|PreferNoSchedule|NoExecute)$", max_length=16)] | None
    ) = None
    """NoSchedule, PreferNoSchedule or NoExecute."""


class ExtraResource(Document):
    """Another device that each pod asks for, such as EFA or RDMA."""

    name: LabelKey
    """Resource name."""
    count: Positive
    """Devices per pod."""


class GPUPoolSpec(Document):
    """A kind of node: what it has, what it costs, how pods get onto it."""

    accelerator: ShortText
    """l4, a40, a100-40, a100-80, h100, cpu, ..."""
    gpu_memory_gib: Annotated[float, Field(ge=0, le=4096, alias="gpuMemoryGiB")]
    """Memory of one GPU in GiB; for cpu the host memory that one process may use."""
    resource_name: LabelKey | None = None
    """The extended resource that counts GPUs, such as nvidia.com/gpu; absent on a cpu pool."""
    gpus_per_node: Annotated[int, Field(ge=1, le=64)]
    """GPUs of one node; processes per node on a cpu pool."""
    max_nodes: Annotated[int, Field(ge=1, le=10000)]
    """Nodes that the pool may have."""
    provisioning: Provisioning
    """Whether nodes exist already or come on demand."""
    start_timeout_seconds: Annotated[int, Field(ge=10, le=86400)]
    """How long a pod may take from creation to running."""
    per_gpu: Annotated[PerGpu, Field(alias="perGPU")]
    """What a pod asks for with each GPU."""
    shared_memory_gib: Annotated[float, Field(gt=0, le=4096, alias="sharedMemoryGiB")]
    """Size of /dev/shm in GiB; counts as host memory."""
    extra_resources: Annotated[list[ExtraResource], Field(min_length=1, max_length=8)] | None = None
    """Other devices that each pod asks for."""
    termination_grace_period_seconds: Annotated[int, Field(ge=1, le=3600)]
    """How long a pod may take to save and stop."""
    node_selector: Annotated[dict[LabelKey, LabelValue], Field(max_length=16)] | None = None
    """Labels of the pool's nodes."""
    tolerations: Annotated[list[Toleration], Field(min_length=1, max_length=16)] | None = None
    """Taints of the pool's nodes that pods tolerate."""
    spot: bool
    """Whether nodes may be taken away at short notice."""
    hourly_price_usd: Annotated[float, Field(ge=0, le=10000, alias="hourlyPriceUSD")]
    """Price of one GPU for one hour in US dollars."""
    peak_tflops: Annotated[float, Field(ge=0, le=100000)]
    """Peak dense BF16 throughput of one GPU in TFLOP/s."""


class GPUPoolStatus(Tolerant):
    """What the operator sees of the pool."""

    observed_generation: int = -1
    """The generation of the spec that was last acted on."""
    nodes: NonNegative | None = None
    """Nodes seen with the pool's labels."""
    capacity: NonNegative | None = None
    """GPUs of those nodes."""
    running: NonNegative | None = None
    """GPUs that running jobs hold."""
    waiting: NonNegative | None = None
    """GPUs that queued jobs ask for."""
    conditions: list[Condition] = []
    """Ready."""
