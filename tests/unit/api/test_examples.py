"""The examples: valid, and planned as their files say on the pools that the chart ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.job import FineTuneJobSpec
from finetune_api.planner import Planned, Pool, build_references, make_plan
from finetune_api.planner.ledger import SET_BY_JOB
from finetune_api.pool import GPUPoolSpec
from hack import check_examples
from tests.unit.api import figures, values

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"


def chart_pools() -> list[Pool]:
    """The pools of the chart's values, made as its template makes them: the defaults with the pool's own on top."""
    chart = yaml.safe_load((ROOT / "charts/finetune-operator/values.yaml").read_text())
    return [Pool(name, GPUPoolSpec.from_json({**chart["poolDefaults"], **own})) for name, own in chart["pools"].items()]


def job(name: str) -> FineTuneJobSpec:
    return check_examples.resolved(FineTuneJobSpec.from_json(yaml.safe_load((EXAMPLES / name).read_text())["spec"]))


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """The values that a file sets, by spec path; a list is one value."""
    if not isinstance(value, dict):
        return {path: value}
    return {key: v for name, child in value.items() for key, v in leaves(child, f"{path}.{name}".lstrip(".")).items()}


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_every_example_is_valid(path: Path) -> None:
    assert list(check_examples.faults(path)) == []


def format_of(spec: FineTuneJobSpec) -> str:
    """As which preflight reads the records of an example: those that have limits of their own have two parts."""
    limited = spec.dataset.max_source_tokens or spec.dataset.max_target_tokens
    return spec.dataset.format or ("PromptCompletion" if limited else "Text")


JOBS = [path for path in sorted(EXAMPLES.rglob("*.yaml")) if path.name != "gpupool.yaml"]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_every_example_can_be_planned(path: Path) -> None:
    """On the chart's pools with one of CPUs, for a small model that has what the example asks for."""
    spec = job(str(path.relative_to(EXAMPLES)))
    pools = (values.cpu_pool(16), *chart_pools())
    model = values.small_model(max_positions=8192, **values.mixture(spec))
    data = values.data_facts(200, format=format_of(spec))
    references = build_references(spec, local=True)
    run = make_plan(spec, values.JOB, values.preflight(spec, model, data), references, pools, "image").run
    assert run.objective.type == spec.objective_type
    # Only what is off or left to the library has no record of its own.
    recorded = {item["name"] for item in run.settings}
    given = {name for name in leaves(spec.to_json()) if name.startswith(("hyperparameters.", "tuning.lora."))}
    assert given <= recorded


FOR_A_POOL = sorted(path for folder in ("methods", "recipes") for path in (EXAMPLES / folder).glob("*.yaml"))


@pytest.mark.parametrize("path", FOR_A_POOL, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_every_example_for_a_pool_fits_with_the_model_that_it_names(path: Path) -> None:
    """On the chart's pools, for 2,000 records of up to 1,000 tokens or of what the example cuts them to."""
    spec = job(str(path.relative_to(EXAMPLES)))
    planned = planned_for_real(spec)
    pool = next(pool for pool in pools_for(spec) if pool.name == planned.plan.pool)
    assert planned.plan.memory.total_gib <= 0.92 * pool.spec.gpu_memory_gib
    asked = spec.hyperparameters and spec.hyperparameters.global_batch_size
    assert planned.run.global_batch_size == asked or asked is None


def pools_for(spec: FineTuneJobSpec) -> list[Pool]:
    """Those of the chart; the one without GPUs only for a job that pins it, as it has to be switched on."""
    pinned = spec.resources is not None and spec.resources.pool == "cpu"
    return [values.cpu_pool(16)] if pinned else chart_pools()


def planned_for_real(spec: FineTuneJobSpec) -> Planned:
    # Preflight reports what the limits leave: of a Seq2Seq model two sequences, else one with its first and last token.
    source, target = spec.dataset.max_source_tokens, spec.dataset.max_target_tokens
    longest = 1000
    if source and target:
        longest = max(source, target) if spec.task == "Seq2Seq" else source + target + 2
    data = values.data_facts(2000, format=format_of(spec), longest_tokens=longest)
    found = values.preflight(spec, figures.real_model(str(spec.model.uri)), data)
    found = found.model_copy(update={"further_weight_bytes": figures.further_weights(spec)})
    return make_plan(spec, values.JOB, found, build_references(spec), pools_for(spec), "image")


def test_the_full_advertisement_recipe_runs_on_four_a100_without_accumulation() -> None:
    spec = job("recipes/advertisements-full.yaml")
    plan = planned_for_real(spec).plan
    assert (plan.pool, plan.nodes * plan.gpus_per_node) == ("a100-80", 4)
    assert (plan.micro_batch_size, plan.gradient_accumulation, plan.zero_stage) == (4, 1, 2)


def test_the_main_example_is_short_and_easy_to_count() -> None:
    text = (EXAMPLES / "finetunejob.yaml").read_text()
    assert check_examples.lines_below_spec(text) <= 12
    assert "#" not in text, "nothing hides in comments"


BROKEN: dict[str, tuple[str, str, str]] = {
    "unknown field": ("maxSteps: 40", "maxStep: 40", "maxStep"),
    "null": ("tuning: {type: LoRA}", "tuning: {type: LoRA, lora: }", "tuning.lora"),
    "wrong type": ("maxSteps: 40", "maxSteps: many", "maxSteps"),
    "out of bounds": ("fraction: 0.2", "fraction: 1.0", "fraction"),
    "rule": ("maxSteps: 40", "maxSteps: 40, epochs: 1", "set epochs or maxSteps, not both"),
    "unsupported": ("tuning: {type: LoRA}", "tuning: {type: LoRA}\n  queueName: a", "queueName is not supported yet"),
    "local file": ("uri: s3://team-a/data", "uri: file:///data", "file:// is for `finetune run`"),
    "name": ("debian-faq}\nspec", "Debian.FAQ}\nspec", "metadata.name"),
    "missing field": ("  output: {uri: s3://team-a/", "  outputs: {uri: s3://team-a/", "output"),
    "no tuning": ("  tuning: {type: LoRA}\n", "", "tuning: is missing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_example_is_found(case: str, tmp_path: Path) -> None:
    old, new, words = BROKEN[case]
    text = (EXAMPLES / "finetunejob.yaml").read_text()
    assert old in text
    broken = tmp_path / "finetunejob.yaml"
    broken.write_text(text.replace(old, new))
    assert any(words in fault for fault in check_examples.faults(broken))


def test_a_main_example_that_grows_is_found(tmp_path: Path) -> None:
    text = (EXAMPLES / "finetunejob.yaml").read_text()
    example = tmp_path / "finetunejob.yaml"
    example.write_text(text + "  retry:\n    maxFailures: 1\n  # a comment\n\n")
    assert list(check_examples.faults(example)) == []
    example.write_text(text + "  retry:\n    maxFailures: 1\n  checkpoint:\n    everySteps: 10\n    keepLast: 1\n")
    assert list(check_examples.faults(example)) == ["has 13 lines below spec; at most 12 are promised"]


def test_an_example_that_reads_what_no_example_makes_is_found(tmp_path: Path) -> None:
    """A reward model that is not merged, a teacher without a job, a job that is not there or that made an adapter only."""
    for name, old, new, words in (
        ("ppo", "tuned/reward/merged", "tuned/reward/model", "s3://team-a/tuned/reward/model: no example makes it"),
        ("evaluation", "tuned/lora/adapter", "tuned/lora-2/adapter", "tuned/lora-2/adapter: no example makes it"),
        ("continue-job", "fromJob: lora", "fromJob: lore", "model.fromJob: there is no FineTuneJob lore"),
        ("continue-job", "fromJob: lora", "fromJob: evaluation", "FineTuneJob evaluation made no model"),
        (
            "reward",
            "uri: hf://meta-llama/Llama-3.1-8B-Instruct, revision: main",
            "fromJob: dora",
            "made an adapter only",
        ),
    ):
        text = (EXAMPLES / "methods" / f"{name}.yaml").read_text()
        assert old in text
        broken = tmp_path / f"{name}.yaml"
        broken.write_text(text.replace(old, new))
        assert [fault for fault in check_examples.faults(broken) if words in fault], (name, new)


def test_no_two_examples_write_to_one_output() -> None:
    """The second one would be refused: the output belongs to the first."""
    for local in (False, True):
        found = [spec.output.uri for spec in check_examples.jobs(local=local).values()]
        assert len(found) == len(set(found)) > 40


def test_the_character_recipe_ships_its_config() -> None:
    uri = job("recipes/character-model-novel.yaml").model.uri
    config = json.loads((EXAMPLES / "configs" / str(uri).rpartition("/")[2] / "config.json").read_text())
    assert (config["n_embd"], config["n_head"], config["n_layer"], config["n_positions"]) == (384, 6, 6, 256)
    assert {config[name] for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")} == {0.2}


def test_the_falcon_recipe_runs_on_one_l4_with_exactly_its_settings() -> None:
    spec = job("recipes/shop-faq-qlora-falcon-7b.yaml")
    planned = values.plan(spec, *chart_pools(), model=values.model_facts(), data=values.data_facts(rows=200))
    assert (planned.plan.pool, planned.plan.nodes, planned.plan.gpus_per_node) == ("l4", 1, 1)
    recorded = {item.name: item for item in planned.plan.settings}
    for path, value in leaves(spec.to_json()).items():
        if path.startswith(("tuning.lora", "tuning.quantization", "hyperparameters", "evaluation")):
            assert (recorded[path].value, recorded[path].reason) == (value, SET_BY_JOB), path
    run = planned.run
    assert (run.hyperparameters.micro_batch_size, run.hyperparameters.gradient_accumulation) == (1, 4)
    assert run.tuning.lora is not None and run.tuning.quantization is not None
    assert (run.tuning.lora.rank, run.tuning.lora.alpha, run.tuning.lora.dropout) == (8, 32, 0.05)
    assert run.tuning.lora.target_modules == ["query_key_value"]
    assert (run.hyperparameters.learning_rate, run.hyperparameters.warmup_ratio) == (2e-4, 0.05)
    assert run.hyperparameters.total_steps == 80


def test_the_pythia_recipe_runs_on_a_cpu_pool() -> None:
    pythia = values.model_facts(
        70_426_624, model_type="gpt_neox", hidden_size=512, layers=6, vocabulary_size=50304, max_positions=2048
    )
    planned = values.plan(
        job("recipes/company-qa-pythia-70m.yaml"),
        values.cpu_pool(4),
        *chart_pools(),
        model=pythia,
        data=values.data_facts(1260),
    )
    assert (planned.plan.pool, planned.run.hyperparameters.precision) == ("cpu", "FP32")
    assert (planned.run.tuning.type, planned.plan.total_steps) == ("Full", 3)
    assert planned.run.evaluation.generation.max_new_tokens == 100


def test_the_demo_and_the_local_example_are_the_same_run() -> None:
    demo, local = job("finetunejob.yaml").to_json(), job("local.yaml").to_json()
    for name in ("tuning", "hyperparameters"):
        assert demo[name] == local[name]
    assert demo["dataset"]["validation"] == local["dataset"]["validation"]
    assert local.keys() == demo.keys() - {"credentials"}


def test_the_demo_fits_a_small_cpu_pool() -> None:
    planned = values.plan(
        job("finetunejob.yaml"), values.cpu_pool(4), model=values.small_model(), data=values.data_facts(119)
    )
    assert planned.plan.pool == "cpu"
    assert planned.run.global_batch_size == 4
    assert planned.plan.memory.total_gib < 4 * 0.92


def test_the_example_pool_is_used_by_those_who_allow_spot() -> None:
    document = yaml.safe_load((EXAMPLES / "gpupool.yaml").read_text())
    pool = Pool(document["metadata"]["name"], GPUPoolSpec.from_json(document["spec"]))
    assert values.plan(values.spec(resources={"spot": True}), pool, *chart_pools()).plan.pool == "l4-spot"
    assert values.plan(values.spec(), pool, *chart_pools()).plan.pool == "l4"
