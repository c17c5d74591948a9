"""The preflight pod's program: exit code, termination message and log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from finetune_api.digest import digest
from finetune_api.failures import TABLE
from finetune_api.runfile import PreflightFile
from finetune_api.status import DataFacts, Finding, ModelFacts, Preflight
from finetune_trainer.preflight import encode_preflight, exit_code
from tests.train.preflight.conftest import ROWS, Bucket
from tests.train.preflight.local import LABELLED, TAGGED, Folder
from tests.train.sources.hub_server import HubServer, Repository
from tests.train.sources.making import adapter_files, model_files

MakeFile = Callable[..., PreflightFile]
# What the trainer image has and the light image has not.
LIGHT = (
    "import runpy, sys\n"
    "for name in ('torch', 'transformers', 'numpy', 'safetensors', 'psutil', 'rich', 'prometheus_client', 'kopf'):\n"
    "    sys.modules[name] = None\n"
    "runpy.run_module('finetune_trainer.preflight', run_name='__main__', alter_sys=True)\n"
)


def run(tmp_path: Path, document: str, env: dict[str, str]) -> tuple[int, Preflight, list[dict[str, object]]]:
    (tmp_path / "preflight.json").write_text(document)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            LIGHT,
            "--file",
            str(tmp_path / "preflight.json"),
            "--termination-log",
            str(tmp_path / "termination"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]} | env,
    )
    data = (tmp_path / "termination").read_bytes()
    assert len(data) <= 4096
    return done.returncode, Preflight.model_validate_json(data), [json.loads(line) for line in done.stderr.splitlines()]


def test_a_good_job_exits_zero_with_its_facts_in_the_light_image(
    make_file: MakeFile, bucket: Bucket, tmp_path: Path
) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "more.parquet")
    more = bucket.put("more.parquet", (tmp_path / "more.parquet").read_bytes())
    with HubServer() as hub:
        hub.repositories["team/model"] = Repository(model_files())
        file = make_file(model="hf://team/model", sources=[bucket.uri("train.jsonl"), more])
        env = bucket.env | {"HF_ENDPOINT": hub.endpoint}
        code, result, log = run(tmp_path, file.model_dump_json(by_alias=True), env)
    assert code == 0 and result.ok and result.data is not None and result.data.rows == 80
    assert log[-1]["event"] == "preflight" and log[-1]["exit_code"] == 0


def test_a_faulty_job_exits_with_the_code_of_its_first_finding(
    make_file: MakeFile, bucket: Bucket, tmp_path: Path
) -> None:
    rows = b'{"question": "q", "answer": "a"}\n' + b'{"question": "q"}\n' * 500
    file = make_file(sources=[bucket.put("bad.jsonl", rows)])
    code, result, log = run(tmp_path, file.model_dump_json(by_alias=True), bucket.env)
    assert code == TABLE["DataInvalid"].exit_code == 65
    assert result.data is not None and (result.data.rows, result.data.bad_rows) == (1, 500)
    assert "500 of 501 records" in result.findings[0].message
    assert next(line["failure_class"] for line in log if line["event"] == "finding") == "DataInvalid"
    assert bucket.env["FINETUNE_CRED_TEAM_AWS_SECRET_ACCESS_KEY"] not in json.dumps(log)


def test_a_preflight_file_with_an_unknown_field_is_refused_by_its_name(tmp_path: Path) -> None:
    code, result, _ = run(tmp_path, '{"version": 1, "extra": 1}', {})
    assert code == 64 and not result.ok
    assert result.findings[0].failure_class == "InvalidSpec" and "job: Field required" in result.findings[0].message


def test_the_termination_message_keeps_the_first_findings_and_counts_all() -> None:
    findings = [Finding(failure_class="DataInvalid", message=f"{k}: " + "ä" * 2500, field="f") for k in range(40)]
    result = Preflight(ok=False, spec_digest="d", findings=findings)
    data = encode_preflight(result)
    assert len(data) <= 4096
    short = Preflight.model_validate_json(data)
    assert short.findings_total == 40 and short.findings[0].message.startswith("0: ") and len(short.findings) >= 5
    whole = Preflight(ok=True, spec_digest="d", findings=findings[:1])
    assert Preflight.model_validate_json(encode_preflight(whole, 1 << 20)).findings == findings[:1]


def test_the_facts_of_the_largest_job_fit_beside_its_findings() -> None:
    places = [f"objective.grpo.rewards[{k}].model.uri" for k in range(8)]
    places += ["model.adapter.uri", "objective.distillation.teacher.uri"]
    model = ModelFacts(
        model_type="switch_transformers",
        architecture="A" * 80,
        parameters=10**12,
        weight_bytes=10**13,
        hidden_size=10**5,
        layers=1000,
        vocabulary_size=10**6,
        max_positions=10**7,
        quantization="q" * 80,
        digest=digest("model"),
    )
    data = DataFacts(
        rows=10**9,
        format="PromptCompletion",
        format_reason="ä" * 300,
        tokens=10**12,
        longest_tokens=10**6,
        p95_tokens=10**6,
        bytes=10**12,
        digest=digest("data"),
    )
    result = Preflight(
        ok=False,
        spec_digest=digest("spec"),
        model=model,
        data=data,
        digests={place: digest(place) for place in places},
        further_weight_bytes={place: 10**13 for place in places},
        findings=[Finding(failure_class="DataInvalid", message="ä" * 3000, field="f") for _ in range(20)],
    )
    encoded = encode_preflight(result)
    short = Preflight.model_validate_json(encoded)
    assert len(encoded) <= 4096 and short.findings_total == 20 and short.findings
    assert (short.digests, short.model, short.data) == (result.digests, model, data)


def test_every_objective_is_checked_in_the_light_image(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    bert = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    folder.put_model("bert", model_files(config=bert))
    folder.put_model("teacher", model_files())
    folder.put_model("adapter", adapter_files(r=16, lora_alpha=32))
    folder.put("labels", LABELLED)
    folder.put("tags", TAGGED)
    folder.put("pairs", [{"prompt": f"Q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(30)])
    own = {"uri": folder.uri("bert"), "access": {}}

    def of(name: str) -> list[dict[str, object]]:
        return [{"uri": folder.uri(name), "access": {}}]

    files = [
        folder.file({"model.adapter.uri": "Adapter adapter"}),
        folder.file({"objective.distillation.teacher.uri": "Model teacher"}, objective="Distillation"),
        folder.file(sources=of("labels"), model=own, task="SequenceClassification"),
        folder.file(sources=of("tags"), model=own, task="TokenClassification"),
        *(folder.file(sources=of("pairs"), objective=name) for name in ("DPO", "KTO", "ORPO")),
        folder.file(sources=of("pairs"), objective="Reward", task="SequenceClassification"),
        folder.file(objective="GRPO", newTokens=8),
    ]
    program = LIGHT.rpartition("runpy.run_module")[0] + (
        "from finetune_api.runfile import PreflightFile\n"
        "from finetune_trainer.preflight import run_preflight\n"
        "for line in sys.stdin:\n"
        "    found = run_preflight(PreflightFile.model_validate_json(line), {})\n"
        "    print([item.message for item in found.findings if item.failure_class != 'Info'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input="".join(file.model_dump_json(by_alias=True) + "\n" for file in files),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]},
    )
    assert done.stdout.splitlines() == ["[]"] * len(files), done.stdout + done.stderr


def test_every_class_gives_an_exit_code() -> None:
    for name, row in TABLE.items():
        code = exit_code(Preflight(ok=False, spec_digest="", findings=[Finding(failure_class=name, message="m")]))
        assert code == (row.exit_code or 101)
