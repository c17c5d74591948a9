"""Runbooks of what the owner of the job mends: spec, data, model, credentials, quota."""

from __future__ import annotations

from finetune_api.runbooks.page import (
    ATTEMPTS,
    CLONE,
    DESCRIBE,
    DESCRIBE_PODS,
    EVENTS,
    FAILURE,
    FINDINGS,
    LOG,
    MEND,
    NOT_BY_ITSELF,
    POOLS,
    PREFLIGHT_LOG,
    SECRET_KEYS,
    Runbook,
)

RUNBOOKS = {
    "InvalidSpec": Runbook(
        symptom="The job is `Invalid` within seconds of `kubectl apply`, or after preflight; no GPU was used.",
        look=(DESCRIBE, FAILURE, FINDINGS),
        causes=(
            "A value that has the right type but contradicts another field or the data: a column that the file lacks, "
            "a template that cannot be filled, a split that leaves nothing to train on.",
            "A URI of a kind that a cluster cannot read, such as `file://`.",
            "A priority class that does not exist.",
        ),
        act=("Read the message: it names the field and what is possible there.", MEND),
        again=NOT_BY_ITSELF,
    ),
    "UnsupportedField": Runbook(
        symptom="The job is `Invalid` within seconds; the message lists each field that this release refuses.",
        look=(DESCRIBE, FAILURE),
        causes=(
            "The field is in the schema, so that files written today stay valid, but this release lacks its function.",
            "Two choices that cannot be combined, such as merging an adapter that the method does not make.",
        ),
        act=("Look the field up in [supported.md](supported.md).", MEND),
        again=NOT_BY_ITSELF,
    ),
    "DataInvalid": Runbook(
        symptom="Preflight, or the start of training, names rows of a file that cannot be used.",
        look=(FAILURE, FINDINGS, PREFLIGHT_LOG),
        causes=(
            "A line that is not JSON, a missing column, an empty prompt or completion, roles in an impossible order.",
            "The file has another format than the one that was set, or guessed from its first record.",
            "Too many records are longer than `hyperparameters.maxSequenceLength`.",
            "The file changed after preflight had read it.",
        ),
        act=(
            "Correct the rows that the message lists and all others of their kind; the count says how many there are.",
            "Set `dataset.format` where the guess was wrong.",
            "Raise `dataset.maxBadShare` or `dataset.maxCutShare` only where such rows may really be left out or cut.",
            MEND,
        ),
        again=NOT_BY_ITSELF,
    ),
    "DataNotFound": Runbook(
        symptom="The message names a URI of a dataset source below which nothing was found.",
        look=(FAILURE, FINDINGS, PREFLIGHT_LOG),
        causes=(
            "A slip in the bucket, the prefix or the file name; S3 keys distinguish upper and lower case.",
            "The upload had not finished, or went to another endpoint than `storage.endpoint`.",
            "A revision, config or split of a hub dataset that does not exist.",
        ),
        act=(
            "List the URI with the same keys and endpoint from your own machine.",
            "Upload the file or correct the URI.",
            MEND,
        ),
        again=NOT_BY_ITSELF,
    ),
    "ModelNotFound": Runbook(
        symptom="The message names the model's URI or revision, which the storage or hub does not know.",
        look=(FAILURE, FINDINGS, PREFLIGHT_LOG),
        causes=(
            "A slip in `model.uri`, or a revision that was never pushed.",
            "A gated or private model: without a token the hub says that it does not exist.",
            "The folder holds no `config.json`.",
        ),
        act=(
            "Correct `model.uri` or `model.revision`.",
            "For a gated model accept its licence on the hub and put `HF_TOKEN` into the secret.",
            MEND,
        ),
        again=NOT_BY_ITSELF,
    ),
    "ModelUnsupported": Runbook(
        symptom="The model was found, and the message says what about it cannot be tuned.",
        look=(FAILURE, FINDINGS),
        causes=(
            "An architecture that the trainer does not have, or that asks for code from the repository.",
            "No weights where `save_pretrained` puts them, or an index of the weights that is damaged.",
            "A tokenizer without what the method needs, such as a chat template.",
            "A method that the architecture cannot take, such as QLoRA on layers that cannot be quantised.",
        ),
        act=(
            "Choose a model or a method that [supported.md](supported.md) lists.",
            MEND,
        ),
        again=NOT_BY_ITSELF,
    ),
    "CredentialsRejected": Runbook(
        symptom="Storage or hub answered that the keys are wrong, expired, or not allowed to do what the run needs. A run "
        "that trains ends with it once every upload of a checkpoint has been refused for ten minutes.",
        look=(FAILURE, PREFLIGHT_LOG, SECRET_KEYS),
        causes=(
            "Keys of another account or endpoint, or with a line break at their end.",
            "A session token that has expired.",
            "Keys that may read, while the output needs writing and deleting too.",
        ),
        act=(
            "Try the same keys against the same endpoint from your own machine.",
            "Replace the secret that `credentials.secretName` names; pods read it when they start.",
            MEND,
            CLONE,
        ),
        again="No. Each attempt would be refused again; one that starts after the secret was mended works.",
    ),
    "BucketNotFound": Runbook(
        symptom="The storage answered, and it has no bucket of that name.",
        look=(FAILURE, PREFLIGHT_LOG),
        causes=(
            "A slip in the bucket's name.",
            "The request went to another server than you mean: `storage.endpoint` or the chart's default.",
            "A region other than the bucket's.",
        ),
        act=("Correct the URI, `storage.endpoint` or `storage.region`, or create the bucket.", MEND),
        again=NOT_BY_ITSELF,
    ),
    "OutputInUse": Runbook(
        symptom="`output.uri` holds the claim of another FineTuneJob, whose name and UID the message tells.",
        look=(FAILURE, "kubectl get ftj -A"),
        causes=(
            "A copied file that kept the old `output.uri`.",
            "A job that was deleted and applied again: the new one has another UID.",
            "Two jobs that were meant to write to one place.",
        ),
        act=(
            "Choose another `output.uri`.",
            "To go on with the old run, set `output.onExisting: Resume`; model, data and method must be the same.",
        ),
        again=NOT_BY_ITSELF,
    ),
    "RequirementNotMet": Runbook(
        symptom="The run trained, evaluated and published, and a metric misses the bound that the job demands.",
        look=(FAILURE, "kubectl get ftj NAME -o jsonpath='{.status.artifacts}'", LOG),
        causes=(
            "Too little or unsuitable data for the demand.",
            "Settings: too few epochs, a learning rate that is too high or too low.",
            "A bound that the untuned model's own measurement already makes implausible; the report shows both.",
        ),
        act=(
            "Read report.md at `status.artifacts.report`: it compares base and tuned model on the same records.",
            "Change data, settings or the bound. " + CLONE,
        ),
        again="No. The same run gives the same model; the artifact of this one is kept.",
    ),
    "ReferenceNotFound": Runbook(
        symptom="A pod cannot be created or started because something that the job names is not in its namespace.",
        look=(DESCRIBE, DESCRIBE_PODS, "kubectl get secrets,configmaps,serviceaccounts,persistentvolumeclaims"),
        causes=(
            "The secret of `credentials.secretName` was never created here, or lacks `AWS_ACCESS_KEY_ID` or "
            "`AWS_SECRET_ACCESS_KEY`.",
            "The config map of `storage.caConfigMapName` or the chart's default is missing.",
            "The service account of `credentials.serviceAccountName`, or the claim of a `pvc://` URI, does not exist.",
        ),
        act=(
            "Create what the message names, in the job's own namespace.",
            "Or correct the field that names it. " + MEND,
        ),
        again="Before the plan the job goes on by itself as soon as the object exists. A planned run that found it "
        "missing at the start of an attempt has ended, and has to be cloned.",
    ),
    "QuotaExceeded": Runbook(
        symptom="The attempt is `Queued` or `Starting`, and the message quotes the quota that its pods would break.",
        look=(DESCRIBE, "kubectl describe resourcequota", EVENTS),
        causes=(
            "Other jobs of the namespace hold the quota.",
            "The quota is smaller than this one job needs: then it never starts.",
            "A quota on memory, CPU or objects rather than on GPUs; the message names which.",
        ),
        act=(
            "Wait for the other jobs, or suspend one: its GPUs are free within the grace period.",
            "Ask the platform team for quota, or clone the job with fewer `resources.gpus`.",
        ),
        again="Yes, and it costs nothing: the job waits for room without using up a retry.",
    ),
    "NoPoolFits": Runbook(
        symptom="The job is `Invalid` after preflight, and the message lists each pool with what it lacks.",
        look=(FAILURE, POOLS, FINDINGS),
        causes=(
            "The model, its gradients and its optimizer are larger than any pool's GPUs together.",
            "Sequences so long that not even a micro batch of 1 fits.",
            "`resources.pool`, `resources.gpus` or `resources.nodes` ask for what the pools do not have.",
        ),
        act=(
            "Choose QLoRA or LoRA, a smaller model, or a shorter `hyperparameters.maxSequenceLength`.",
            "Leave `resources.pool` out, so that every pool is considered.",
            "Ask the platform team for a larger pool.",
            MEND,
        ),
        again="No, until the job or the pools change.",
    ),
    "DeadlineExceeded": Runbook(
        symptom="The job stopped after a checkpoint because `deadlineSeconds` had passed since its first start.",
        look=(DESCRIBE, ATTEMPTS, "kubectl get ftj NAME -o jsonpath='{.status.goodput}'"),
        causes=(
            "A deadline shorter than the training itself; the ETA and a warning SlowerThanPlanned told so before.",
            "Time lost to interruptions and retries: `status.goodput` shows where it went.",
            "A slow pool, or pods that started late.",
        ),
        act=("Raise `deadlineSeconds` or leave it out.", CLONE),
        again="No. A clone with a longer deadline that resumes loses nothing up to the last checkpoint.",
    ),
    "Cancelled": Runbook(
        symptom="Somebody set `spec.cancel: true`; the pods saved a checkpoint and went.",
        look=(DESCRIBE, "kubectl get ftj NAME -o jsonpath='{.metadata.managedFields[*].manager}'"),
        causes=(
            "The owner, or a pipeline of hers, cancelled the job.",
            "A file with `cancel: true` was applied again.",
        ),
        act=("Nothing, if this was meant.", CLONE),
        again="No. Cancel cannot be taken back; `suspend` is what can.",
    ),
}
