"""Places and credentials: turns the spec's URIs into references that the trainer can use.

Credentials become named profiles. Pods find the keys of a profile in environment variables that the kubelet fills
from the secret; the operator never reads a secret.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from finetune_api import naming
from finetune_api.digest import digest
from finetune_api.failures import FinetuneError
from finetune_api.job import (
    FROZEN_FIELDS,
    Credentials,
    FineTuneJobSpec,
    HeldOut,
    Model,
    Publish,
    Source,
    Storage,
)
from finetune_api.model import FurtherModel
from finetune_api.runfile import Reference, StorageAccess
from finetune_api.uri import parse_uri


@dataclass
class References:
    """Every place that a run touches.

    rewards: one for each term of the reward; None for a built-in function.
    profiles: credentials profile -> name of its secret, for the pods' environment.
    schemes: credentials profile -> URI schemes that it serves, which tells the keys that must exist.
    config_maps: CA ConfigMaps to mount below naming.CA_PATH.
    claims: PersistentVolumeClaims to mount below naming.CLAIMS_PATH; True where the run writes to it.
    service_account: the pods' service account, if the credentials name one.
    """

    model: Reference
    sources: list[Reference]
    validation: Reference | None
    output: Reference
    adapter: Reference | None = None
    teacher: Reference | None = None
    rewards: list[Reference | None] = field(default_factory=list)
    test: Reference | None = None
    retention: Reference | None = None
    benchmarks: list[Reference] = field(default_factory=list)
    publish: Reference | None = None
    profiles: dict[str, str] = field(default_factory=dict)
    schemes: dict[str, set[str]] = field(default_factory=dict)
    config_maps: set[str] = field(default_factory=set)
    claims: dict[str, bool] = field(default_factory=dict)
    service_account: str | None = None


def spec_digest(spec: FineTuneJobSpec) -> str:
    """Digest of the part of the spec that defines the run."""
    document = spec.to_json()
    return digest({name: document[name] for name in FROZEN_FIELDS if name in document})


def build_references(spec: FineTuneJobSpec, defaults: Storage | None = None, *, local: bool = False) -> References:
    """The references of a spec. `local` takes credentials from the environment and allows file://.

    Raises FinetuneError(InvalidSpec) for a malformed URI, a file:// URI in a cluster, or two service accounts.
    """
    builder = _Builder(spec, defaults or Storage(), local)
    evaluation = spec.evaluation
    references = References(
        model=builder.model("model", spec.model),
        sources=[builder.source(f"dataset.sources[{i}]", s) for i, s in enumerate(spec.dataset.sources)],
        validation=builder.held_out("dataset.validation", spec.dataset.validation),
        output=builder.reference("output", spec.output.uri, spec.output.credentials, spec.output.storage, writes=True),
        adapter=builder.adapter(spec.model),
        test=builder.held_out("dataset.test", spec.dataset.test),
        publish=builder.publish(spec.output.publish),
    )
    if spec.objective is not None and spec.objective.distillation is not None:
        references.teacher = builder.model("objective.distillation.teacher", spec.objective.distillation.teacher)
    references.rewards = builder.rewards()
    if evaluation is not None and evaluation.retention is not None:
        references.retention = builder.source("evaluation.retention", evaluation.retention)
    for number, benchmark in enumerate((evaluation and evaluation.benchmarks) or []):
        references.benchmarks.append(builder.source(f"evaluation.benchmarks[{number}].source", benchmark.source))
    return builder.finish(references)


class _Builder:
    def __init__(self, spec: FineTuneJobSpec, defaults: Storage, local: bool) -> None:
        self.spec = spec
        self.defaults = defaults
        self.local = local
        self.secrets: dict[str, str] = {}  # secret name -> profile
        self.schemes: dict[str, set[str]] = {}
        self.config_maps: set[str] = set()
        self.claims: dict[str, bool] = {}
        self.service_accounts: dict[str, str] = {}  # name -> field

    def source(self, path: str, source: Source) -> Reference:
        reference = self.reference(path, source.uri, source.credentials, source.storage, revision=source.revision)
        return reference.model_copy(update={"config": source.config, "split": source.split, "weight": source.weight})

    def model(self, path: str, model: FurtherModel) -> Reference:
        if model.uri is None:
            what = (
                f"{path}.fromJob is resolved in a cluster only; write the artifact's {path}.uri"
                if model.from_job is not None and self.local
                else f"{path}.uri is missing"
            )
            raise FinetuneError(what, failure_class="InvalidSpec", field=f"spec.{path}.uri")
        return self.reference(path, model.uri, model.credentials, model.storage, revision=model.revision)

    def adapter(self, model: Model) -> Reference | None:
        """An adapter without keys of its own uses those of a model that lies in storage of the same kind."""
        adapter = model.adapter
        if adapter is None:
            return None
        same = adapter.uri.split(":")[0] == (model.uri or "").split(":")[0]
        return self.reference(
            "model.adapter",
            adapter.uri,
            adapter.credentials or (model.credentials if same else None),
            adapter.storage or (model.storage if same else None),
            revision=adapter.revision,
        )

    def held_out(self, path: str, held_out: HeldOut | None) -> Reference | None:
        if held_out is None or held_out.source is None:
            return None
        return self.source(f"{path}.source", held_out.source)

    def rewards(self) -> list[Reference | None]:
        objective = self.spec.objective
        settings = objective and (objective.ppo or objective.grpo)
        path = f"objective.{self.spec.objective_type.lower()}.rewards"
        return [
            self.model(f"{path}[{number}].model", term.model) if term.model is not None else None
            for number, term in enumerate(settings.rewards if settings else [])
        ]

    def publish(self, publish: Publish | None) -> Reference | None:
        if publish is None:
            return None
        return self.reference("output.publish", publish.uri, publish.credentials, None)

    def reference(
        self,
        path: str,
        uri: str,
        credentials: Credentials | None,
        storage: Storage | None,
        *,
        revision: str | None = None,
        writes: bool = False,
    ) -> Reference:
        parsed = parse_uri(uri, field=f"{path}.uri")
        if parsed.scheme == "file" and not self.local:
            raise FinetuneError(
                f"{path}.uri is {uri!r}; file:// is for `finetune run` on one machine. In a cluster use s3:// or pvc://",
                failure_class="InvalidSpec",
                field=f"spec.{path}.uri",
            )
        if parsed.scheme == "pvc":
            self.claims[parsed.container] = self.claims.get(parsed.container, False) or writes
        return Reference(
            uri=str(parsed), revision=revision, access=self._access(path, parsed.scheme, credentials, storage)
        )

    def _access(
        self, path: str, scheme: str, credentials: Credentials | None, storage: Storage | None
    ) -> StorageAccess:
        profile = self._profile(path, scheme, credentials or self.spec.credentials)
        if scheme != "s3":
            return StorageAccess(profile=profile if scheme == "hf" else None)
        layers = [layer for layer in (storage, self.spec.storage, self.defaults) if layer is not None]

        def first(name: str) -> object:
            return next((value for layer in layers if (value := getattr(layer, name)) is not None), None)

        config_map = first("ca_config_map_name")
        ca_file = None
        if config_map is not None and not self.local:
            self.config_maps.add(str(config_map))
            ca_file = f"{naming.CA_PATH}/{config_map}/ca.crt"
        return StorageAccess.model_validate(
            {
                "endpoint": first("endpoint"),
                "region": first("region"),
                "path_style": first("path_style"),
                "ca_file": ca_file,
                "profile": profile,
            }
        )

    def _profile(self, path: str, scheme: str, credentials: Credentials | None) -> str | None:
        if credentials is None or self.local or scheme not in ("s3", "hf"):
            return None
        if credentials.service_account_name is not None:
            self.service_accounts.setdefault(credentials.service_account_name, path)
            return None
        secret = credentials.secret_name or ""
        profile = self.secrets.setdefault(secret, f"p{len(self.secrets)}")
        self.schemes.setdefault(profile, set()).add(scheme)
        return profile

    def finish(self, references: References) -> References:
        if len(self.service_accounts) > 1:
            names = ", ".join(sorted(self.service_accounts))
            raise FinetuneError(
                f"the job names several service accounts ({names}); a pod runs as one. Use one service "
                "account, or secrets",
                failure_class="InvalidSpec",
                field="spec.credentials",
            )
        references.profiles = {profile: secret for secret, profile in self.secrets.items()}
        references.schemes = self.schemes
        references.config_maps = self.config_maps
        references.claims = self.claims
        references.service_account = next(iter(self.service_accounts), None)
        return references
