"""How a job reaches its places: credentials and storage."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.base import Document
from finetune_api.fields import Endpoint, ObjectName


class Credentials(Document):
    """Whose keys reach the storage. Exactly one of the two."""

    secret_name: ObjectName | None = None
    """A secret in the job's namespace with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, where needed,
    AWS_SESSION_TOKEN and HF_TOKEN."""
    service_account_name: ObjectName | None = None
    """A service account in the job's namespace that carries a cloud identity."""


class Storage(Document):
    """How to reach an S3 server. The chart's values fill what is absent."""

    endpoint: Endpoint | None = None
    """URL of the S3 server; absent means AWS."""
    region: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Region of the bucket."""
    path_style: bool | None = None
    """Address buckets as endpoint/bucket rather than bucket.endpoint."""
    ca_config_map_name: ObjectName | None = None
    """A ConfigMap in the job's namespace whose key ca.crt holds the server's CA certificates in PEM."""
