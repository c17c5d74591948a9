"""The plan: which pool, how many GPUs, which batch, and what is said when nothing fits."""

from __future__ import annotations

import math
from typing import Any

import pytest

from finetune_api.failures import FinetuneError
from finetune_api.planner import Pool, make_plan, preflight_file, spec_digest
from finetune_api.planner.settings import held_out_rows
from finetune_api.status import Preflight
from finetune_trainer.data.split import validation_rows
from tests.unit.api import values
from tests.unit.api.values import A40, A100_40, A100_80, L4, cpu_pool, plan, pool, spec

BIG = values.model_facts(70_000_000_000, hidden_size=8192, layers=80, vocabulary_size=32000)


def refusal(job: Any, *pools: Pool, **options: Any) -> FinetuneError:
    with pytest.raises(FinetuneError) as caught:
        plan(job, *pools, **options)
    return caught.value


def test_without_a_pin_the_cheapest_pool_that_fits_is_taken() -> None:
    qlora = plan(spec()).plan
    assert (qlora.pool, qlora.gpus_per_node, qlora.nodes) == ("l4", 1, 1)
    assert qlora.pool_reason == "the cheapest pool that fits"
    # The same model with 16-bit weights and long records needs more than an L4 has.
    lora = plan(spec(tuning={"type": "LoRA"}, hyperparameters={"microBatchSize": 8, "maxSequenceLength": 1024})).plan
    assert lora.pool == "a40"
    assert 24 * 0.92 < lora.memory.total_gib <= 48 * 0.92


def test_the_order_of_the_pools_and_equal_prices_do_not_matter() -> None:
    twins = (pool("b", 24, 1.0), pool("a", 24, 1.0))
    assert plan(spec(), *twins).plan.pool == plan(spec(), *reversed(twins)).plan.pool == "a"
    assert plan(spec(), A100_80, A40, L4).plan.pool == plan(spec(), L4, A40, A100_80).plan.pool == "l4"


def test_two_cheap_gpus_lose_to_one_that_costs_less_than_both() -> None:
    full = spec(tuning={"type": "Full"})
    model = values.model_facts(1_500_000_000, hidden_size=2048, layers=24, vocabulary_size=32000)
    alone = plan(full, L4, model=model).plan
    assert (alone.gpus_per_node, alone.zero_stage) == (2, 3)
    assert plan(full, L4, A40, model=model).plan.pool == "a40", "1.3 for one A40, 1.6 for two L4"
    assert plan(full, pool("l4", 24, 0.6), A40, model=model).plan.pool == "l4", "1.2 for two L4"


def test_a_pinned_pool_is_taken_whatever_it_costs_and_never_left() -> None:
    pinned = plan(spec(resources={"pool": "a100-80"})).plan
    assert (pinned.pool, pinned.pool_reason) == ("a100-80", "set by the job")
    error = refusal(spec(tuning={"type": "LoRA"}, resources={"pool": "l4", "gpus": 1}), model=BIG)
    assert (error.failure_class, error.field) == ("NoPoolFits", "spec.resources.pool")
    assert "l4: needs about" in str(error)
    assert "a100-80: not asked for (resources.pool is l4)" in str(error)


def test_a_pinned_pool_that_does_not_exist_lists_those_that_do() -> None:
    error = refusal(spec(resources={"pool": "h100"}))
    assert (error.failure_class, error.field) == ("NoPoolFits", "spec.resources.pool")
    for name in ("l4", "a40", "a100-40", "a100-80"):
        assert f"{name}: not asked for" in str(error)


def test_spot_capacity_is_used_only_when_allowed() -> None:
    spot = pool("l4-spot", 24, 0.2, spot=True)
    assert plan(spec(), L4, spot).plan.pool == "l4"
    assert plan(spec(resources={"spot": True}), L4, spot).plan.pool == "l4-spot"
    assert plan(spec(resources={"spot": False}), L4, spot).plan.pool == "l4"
    assert "l4-spot: spot capacity, and resources.spot is not true" in str(refusal(spec(), spot))


def test_a_cpu_pool_is_taken_when_pinned_or_when_there_is_nothing_else() -> None:
    small = values.small_model()
    job = spec(tuning={"type": "LoRA"})
    assert plan(job, L4, cpu_pool(), model=small).plan.pool == "l4", "a free CPU is no bargain"
    assert (
        plan(spec(tuning={"type": "LoRA"}, resources={"pool": "cpu"}), L4, cpu_pool(), model=small).plan.pool == "cpu"
    )
    alone = plan(job, cpu_pool(), model=small)
    assert (alone.plan.pool, alone.run.resources.accelerator) == ("cpu", "cpu")
    assert alone.plan.pool_reason == "there are no GPU pools and the model is small enough for a CPU"
    error = refusal(job, cpu_pool(64))
    assert "cpu: a CPU pool, and the model has more than a billion parameters" in str(error)


def test_no_fit_lists_every_pool_with_what_it_lacks() -> None:
    job = spec(tuning={"type": "Full"}, resources={"gpus": 4})
    error = refusal(
        job, L4, pool("small", 24, 1.0, gpusPerNode=2), pool("spot", 80, 1.0, spot=True), cpu_pool(), model=BIG
    )
    text = str(error)
    assert (error.failure_class, error.field) == ("NoPoolFits", "spec.resources")
    assert text.startswith("no pool fits: ")
    parts = dict(part.split(": ", 1) for part in text.removeprefix("no pool fits: ").split("; "))
    assert parts.keys() == {"l4", "small", "spot", "cpu"}
    assert parts["l4"].startswith("needs about ") and "has 24 GiB of which 92% can be used" in parts["l4"]
    assert parts["small"] == "has 2 GPUs per node, 4 are asked for"
    assert parts["spot"] == "spot capacity, and resources.spot is not true"


def test_more_nodes_than_a_pool_has_do_not_fit() -> None:
    error = refusal(spec(resources={"nodes": 5}), L4)
    assert str(error) == "no pool fits: l4: has at most 4 nodes, 5 are asked for"


def test_a_cluster_without_pools_says_so() -> None:
    job = spec()
    with pytest.raises(FinetuneError, match="the cluster has no GPUPool") as caught:
        make_plan(job, values.JOB, values.preflight(job), values.build_references(job), (), values.TRAINER_IMAGE)
    assert caught.value.failure_class == "NoPoolFits"


@pytest.mark.parametrize(
    ("gpus", "nodes", "wanted", "micro"),
    [
        (1, 1, None, None),
        (1, 1, 1, None),
        (1, 1, 4, None),
        (1, 1, 6, None),
        (1, 1, 7, None),
        (1, 1, 4, 1),
        (1, 1, None, 3),
        (1, 1, None, 32),
        (2, 1, None, None),
        (2, 1, 4, 1),
        (4, 1, 64, 2),
        (8, 1, None, None),
        (2, 2, 12, None),
        (8, 4, 32, None),
        (8, 4, None, None),
    ],
)
def test_micro_batch_times_accumulation_times_gpus_is_the_global_batch(
    gpus: int, nodes: int, wanted: int | None, micro: int | None
) -> None:
    given = {"globalBatchSize": wanted, "microBatchSize": micro}
    job = spec(
        resources={"gpus": gpus, "nodes": nodes},
        hyperparameters={key: value for key, value in given.items() if value is not None},
        tuning={"type": "LoRA"},
    )
    planned = plan(job, A100_80, model=values.small_model())
    run = planned.run
    assert run.world_size == gpus * nodes
    hp = run.hyperparameters
    assert hp.micro_batch_size * hp.gradient_accumulation * gpus * nodes == run.global_batch_size
    recorded = {item.name: item.value for item in planned.plan.settings}
    assert recorded["hyperparameters.globalBatchSize"] == run.global_batch_size
    assert recorded["hyperparameters.microBatchSize"] == hp.micro_batch_size
    if wanted is not None:
        assert run.global_batch_size == wanted
    if micro is not None:
        assert hp.micro_batch_size == micro


def test_the_batch_of_a_tiny_dataset_is_no_larger_than_the_dataset() -> None:
    run = plan(spec(), data=values.data_facts(rows=5)).run
    assert run.global_batch_size <= 5


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        (
            {"hyperparameters": {"globalBatchSize": 10}, "resources": {"gpus": 4}},
            "spec.hyperparameters.globalBatchSize",
            "must be a multiple of 4, the number of GPUs",
        ),
        (
            {"hyperparameters": {"globalBatchSize": 10, "microBatchSize": 4}},
            "spec.hyperparameters.microBatchSize",
            "must be a multiple of microBatchSize × GPUs = 4",
        ),
        (
            {"hyperparameters": {"maxSequenceLength": 4096}},
            "spec.hyperparameters.maxSequenceLength",
            "is 4096, the model was built for 2048 tokens",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_field(
    changes: dict[str, Any], field: str, words: str
) -> None:
    error = refusal(spec(**changes))
    assert (error.failure_class, error.field) == ("InvalidSpec", field)
    assert words in str(error)


@pytest.mark.parametrize(
    ("rows", "hyperparameters", "validation", "steps"),
    [
        (100, {"maxSteps": 7}, None, 7),
        (100, {"epochs": 1, "globalBatchSize": 10}, {"fraction": 0.1}, 9),
        (100, {"epochs": 2, "globalBatchSize": 4}, {"fraction": 0.5}, 25),
        (100, {"epochs": 1, "globalBatchSize": 8}, {"fraction": 0.1}, math.ceil(90 / 8)),
        (100, {"epochs": 0.01, "globalBatchSize": 8}, None, 1),
        (19, {"globalBatchSize": 1}, None, 3 * 19),
        (119, {"epochs": 1, "globalBatchSize": 1}, {"fraction": 0.2}, 119 - 24),
        (5, {"epochs": 1, "globalBatchSize": 1}, {"fraction": 0.01}, 4),
    ],
)
def test_epochs_become_steps_over_the_records_that_train(
    rows: int, hyperparameters: dict[str, Any], validation: dict[str, Any] | None, steps: int
) -> None:
    job = spec(hyperparameters=hyperparameters, dataset={"validation": validation} if validation else {})
    planned = plan(job, data=values.data_facts(rows=rows))
    assert planned.run.hyperparameters.total_steps == planned.plan.total_steps == steps


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.2, 0.25, 0.5, 0.9, 0.999])
def test_the_planner_counts_held_out_records_as_the_trainer_does(fraction: float) -> None:
    rows = range(2, 500)
    assert [held_out_rows(n, fraction) for n in rows] == [validation_rows(n, fraction) for n in rows]


def test_a_given_zero_stage_is_used_and_sharding_is_chosen_where_one_gpu_cannot_hold_the_state() -> None:
    assert plan(spec(hyperparameters={"zeroStage": 2}, tuning={"type": "LoRA"}), A40).plan.zero_stage == 2
    model = values.model_facts(6_740_000_000, hidden_size=4096, layers=32, vocabulary_size=32000)
    sharded = plan(spec(tuning={"type": "Full"}), A100_80, model=model).plan
    assert (sharded.zero_stage, sharded.gpus_per_node) == (3, 2)
    assert sharded.memory.total_gib <= 80 * 0.92


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_an_earlier_adapter_that_is_the_reference_is_not_sharded(kind: str) -> None:
    job = {"objective": {"type": kind}, "tuning": {"type": "LoRA"}}
    anew = plan(spec(**job), A100_80, model=BIG).plan
    assert anew.zero_stage == 3 and anew.gpus_per_node > 1
    assert plan(spec(**job, resources={"gpus": 8}), A100_80, model=BIG).plan.zero_stage == 3
    earlier = {**job, "model": {"adapter": {"uri": "s3://b/adapter"}}}
    assert refusal(spec(**earlier), A100_80, model=BIG).failure_class == "NoPoolFits"
    small = plan(spec(**earlier, resources={"gpus": 8}), A100_80, model=values.small_model()).plan
    assert small.zero_stage == 0


def test_a_sharded_run_takes_an_optimizer_that_can_be_sharded() -> None:
    qlora = plan(spec(hyperparameters={"zeroStage": 2}), A40).run.hyperparameters
    assert (qlora.zero_stage, qlora.optimizer) == (2, "AdamW")
    # Adafactor cannot be sharded, so one GPU has to hold the run, or it does not fit.
    model = values.model_facts(6_740_000_000, hidden_size=4096, layers=32, vocabulary_size=32000)
    job = spec(tuning={"type": "Full"}, hyperparameters={"optimizer": "Adafactor"})
    assert refusal(job, A100_40, model=model).failure_class == "NoPoolFits"
    assert plan(job, pool("h200", 141, 9.0), model=model).plan.zero_stage == 0


@pytest.mark.parametrize("stage", [0, 2])
def test_half_precision_needs_a_gpu(stage: int) -> None:
    job = spec(
        tuning={"type": "LoRA"}, hyperparameters={"zeroStage": stage, "precision": "FP16"}, resources={"pool": "cpu"}
    )
    error = refusal(job, cpu_pool(), model=values.small_model())
    assert (error.failure_class, error.field) == ("InvalidSpec", "spec.hyperparameters.precision")


def test_the_plan_and_the_run_file_agree() -> None:
    job = spec()
    planned = plan(job, A100_40)
    assert planned.plan.run_digest == planned.run.digest()
    assert planned.plan.spec_digest == spec_digest(job)
    assert planned.plan.trainer_image == values.TRAINER_IMAGE
    assert (planned.run.resources.pool, planned.run.resources.nodes) == (planned.plan.pool, planned.plan.nodes)
    assert planned.run.settings == [item.to_json() for item in planned.plan.settings]
    assert planned.run.job == values.JOB


@pytest.mark.parametrize(
    ("kind", "member", "given"),
    [
        ("LoRA", "lora", {"targetModules": ["q_proj"]}),
        ("IA3", "ia3", {"targetModules": ["q_proj"]}),
        ("Full", "full", {"freeze": ["*.mlp.*"], "firstLayers": 2}),
    ],
)
def test_preflight_looks_up_the_names_that_a_tuning_uses(kind: str, member: str, given: dict[str, Any]) -> None:
    job = spec(tuning={"type": kind, member: given})
    assert preflight_file(job, values.JOB, values.build_references(job)).to_json()[member] == given


def test_the_same_input_gives_the_same_plan() -> None:
    assert plan(spec()).plan == plan(spec()).plan


def test_a_preflight_without_facts_cannot_be_planned() -> None:
    job = spec()
    with pytest.raises(FinetuneError, match="preflight did not describe model and data"):
        make_plan(
            job,
            values.JOB,
            Preflight(ok=True, spec_digest=spec_digest(job)),
            values.build_references(job),
            values.GPU_POOLS,
            values.TRAINER_IMAGE,
        )
