"""Data larger than memory: a process never holds it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.data.making import run_file

ROWS = 24_000
_CODE = """
import json, sys
from pathlib import Path
from finetune_api.runfile import RunFile
from finetune_trainer.data import load_dataset
from tests.train.data.making import make_tokenizer

def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024

inputs = Path(sys.argv[1])
run = RunFile.from_json(json.loads(sys.argv[2]))
tokenizer = make_tokenizer()
small = load_dataset(run, inputs / "small", tokenizer, cache=inputs / "cache")  # warms everything up
before = anonymous()
peak = 0
def beat():
    global peak
    peak = max(peak, anonymous())
encoded = load_dataset(run, inputs / "large", tokenizer, cache=inputs / "cache", beat=beat)
total = sum(len(encoded.train[k].input_ids) for k in range(0, len(encoded.train), 7))
beat()
print(json.dumps([before, peak, len(encoded.train), len(encoded.validation), encoded.stats.train_tokens, total]))
"""


@pytest.mark.parametrize("suffix", ["jsonl", pytest.param("csv", marks=pytest.mark.slow)])
def test_memory_stays_far_below_the_size_of_the_data(tmp_path: Path, suffix: str) -> None:
    sentence = "What is the capital of France The capital of France is Paris " * 16
    for name, rows in (("small", 1000), ("large", ROWS)):
        folder = tmp_path / name / "data" / "0"
        folder.mkdir(parents=True)
        with (folder / f"train.{suffix}").open("w") as file:
            if suffix == "csv":
                file.write("prompt,completion\n")
            for k in range(rows):
                row = {"prompt": f"{sentence} {k}", "completion": f"Paris {k}"}
                file.write(",".join(row.values()) + "\n" if suffix == "csv" else json.dumps(row) + "\n")
    run = json.dumps(run_file(validationFraction=0.05).to_json())
    done = subprocess.run(
        [sys.executable, "-c", _CODE, str(tmp_path), run],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    before, peak, train, validation, tokens, seventh = json.loads(done.stdout.splitlines()[-1])
    data = (tmp_path / "large" / "data" / "0" / f"train.{suffix}").stat().st_size
    on_disk = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    held_out = ROWS // 20
    assert (train, validation) == (ROWS - held_out, held_out)
    assert data > 20e6 and on_disk > 30e6 and seventh == pytest.approx(tokens / 7, rel=0.01)
    # 8 bytes of each record, one batch, and what the tokenizer keeps of words that it has seen.
    print(f"memory grew by {peak - before} bytes on {data} bytes of data")
    assert peak - before < 0.5 * data
