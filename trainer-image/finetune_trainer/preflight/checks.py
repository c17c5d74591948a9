"""The checks of the model, the output and the place to publish. Each adds to an Outcome as it goes."""

from __future__ import annotations

import secrets

from finetune_api.failures import FinetuneError
from finetune_api.job import ObjectiveType, OnExisting, PretrainTokenizer, Task
from finetune_api.runfile import InputKind, PreflightFile, RunPublish
from finetune_trainer.data.tokenizer import TextTokenizer
from finetune_trainer.preflight.document import remark
from finetune_trainer.preflight.further import has_trained_head
from finetune_trainer.preflight.labels import labelled
from finetune_trainer.preflight.names import check_names
from finetune_trainer.preflight.outcome import Outcome
from finetune_trainer.sources.architectures import labels_of
from finetune_trainer.sources.inspect import Use, inspect_model, read_json, read_tokenizer
from finetune_trainer.sources.place import Purpose, Reach
from finetune_trainer.sources.places import open_output, open_source, with_field
from finetune_trainer.sources.select import CONFIG
from finetune_trainer.store.claims import current_claim
from finetune_trainer.store.errors import ConditionalWriteUnsupported, StoreError
from finetune_trainer.store.objects import join_key


def check_model(file: PreflightFile, reach: Reach, outcome: Outcome) -> None:
    """Reads config, weight headers and tokenizer files of the model. Raises FinetuneError for the first fault."""
    fresh = file.objective is ObjectiveType.PRETRAIN
    purpose = Purpose.CONFIG if fresh else Purpose.MODEL
    place = open_source(file.model, purpose=purpose, field="model.uri", reach=reach)
    learns = file.pretrain_tokenizer not in (None, PretrainTokenizer.MODEL)
    outcome.model = inspect_model(place, Use(file.task, file.objective, file.tuning, learns))
    if not fresh:
        check_names(file, place, outcome.model.model_type)
    config = read_json(place, CONFIG, field="model.uri")
    if labelled(file):
        outcome.heads["model.uri"] = labels_of(config) if has_trained_head(config, file.task) else ()
    adapted = any(item.kind is InputKind.ADAPTER for item in file.further)
    if file.objective is ObjectiveType.EVALUATION and not adapted and not has_trained_head(config, file.task):
        raise FinetuneError(
            f"{file.model.uri} is {outcome.model.architecture or 'of no named class'}: it has no trained head for "
            f"{file.task.value}, so there is nothing to evaluate. Choose a model that was tuned for the task, or name its "
            "adapter in model.adapter.",
            failure_class="ModelUnsupported",
            field="spec.model.uri",
        )
    tokenizer = read_tokenizer(place)
    if learns or tokenizer.tokenizer_json is None:
        return
    text = TextTokenizer.from_files(tokenizer)
    if file.task is Task.MASKED_LM and not text.variables.get("mask_token"):
        raise FinetuneError(
            "The base model's tokenizer has no mask token, so MaskedLM cannot hide anything. Choose a masked model such "
            "as BERT, or task CausalLM.",
            failure_class="ModelUnsupported",
            field="spec.model.task",
        )


def check_output(file: PreflightFile, reach: Reach, outcome: Outcome) -> None:
    """Reads who owns the output; writes and deletes a small object there. Raises FinetuneError for the first fault."""
    store, prefix = open_output(file.output, field="output.uri", reach=reach)
    probe = join_key(prefix, f".preflight-{file.job.uid}-{secrets.token_hex(4)}")
    try:
        outcome.claim = current_claim(store, prefix)
        try:
            first = store.put_if_absent(probe, b"written by preflight to see whether it can\n")
            if first and store.put_if_absent(probe, b"a second time\n"):
                raise ConditionalWriteUnsupported(
                    f"the storage of {store.uri(prefix)} ignores If-None-Match, without which two jobs could overwrite "
                    "one another. Use a server with conditional writes."
                )
        finally:
            store.delete(probe)
    except StoreError as error:
        raise with_field(error, "output.uri") from None
    reach.beat()


def check_target(publish: RunPublish, reach: Reach, outcome: Outcome) -> None:
    """Asks the hub whether it would take the artifact. Raises FinetuneError for the first fault."""
    from finetune_trainer.sources.hub_account import check_publish  # huggingface_hub takes half a second to import

    if check_publish(publish, reach):
        outcome.findings.append(
            remark(f"{publish.target.uri} exists; the artifact becomes its newest commit.", "spec.output.publish.uri")
        )


def check_claim(file: PreflightFile, outcome: Outcome) -> None:
    """Raises FinetuneError(OutputInUse) if the output belongs to a job whose run this one cannot continue."""
    claim = outcome.claim
    if claim is None or claim.job_uid == file.job.uid:
        return
    owner = f"{file.output.uri} belongs to the job {claim.namespace}/{claim.name}"
    if file.on_existing is OnExisting.FAIL:
        raise FinetuneError(
            f"{owner}. Choose another output.uri, or set output.onExisting: Resume to continue the same run.",
            failure_class="OutputInUse",
            field="spec.output.uri",
        )
    pairs = (("model", claim.model_digest, outcome.model), ("data", claim.data_digest, outcome.data))
    differs = [word for word, digest, facts in pairs if facts is not None and facts.digest != digest]
    if differs:
        raise FinetuneError(
            f"{owner} and was made with another {' and another '.join(differs)}, so it cannot be continued. "
            "Choose another output.uri.",
            failure_class="OutputInUse",
            field="spec.output.uri",
        )
