"""One run of bench_train: python -m hack.bench_train_run ours|ours-packed|trl|trl-packed SETTING MODEL WORK."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hack.bench_train import Clock, Setting, conversations

LORA = {"rank": 16, "alpha": 32.0, "dropout": 0.0}


class _Steps(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.step_ended()


def ours(setting: Setting, model: Path, work: Path, clock: Clock, *, packed: bool) -> None:
    """Our engine on the same rows, with the worker's own data path."""
    from finetune_api.runfile import RunFile
    from finetune_trainer.agent.workdir import WorkDir
    from finetune_trainer.data import load_dataset
    from finetune_trainer.worker.heartbeat import Heartbeat
    from finetune_trainer.worker.packing import arrange_packing
    from finetune_trainer.worker.ranks import Ranks
    from finetune_trainer.worker.tokenizers import prepare_tokenizer
    from finetune_trainer.worker.train import build_engine, supervise
    from tests.train.methods.case import merged
    from tests.train.worker.runs import run_document

    changes = {
        "dataset": {"format": "Messages", "validationFraction": None, "truncation": "Tail"},
        "tuning": {"lora": LORA},
        "hyperparameters": {
            "totalSteps": setting.steps,
            "learningRate": setting.learning_rate,
            "microBatchSize": setting.micro,
            "gradientAccumulation": setting.accumulation,
            "maxSequenceLength": setting.length,
            "packing": packed,
        },
    }
    run = RunFile.from_json(merged(run_document(), changes))
    shutil.copytree(model, work / "inputs/model")
    (work / "inputs/data/0").mkdir(parents=True)
    lines = (json.dumps({"messages": row["prompt"] + row["completion"]}) + "\n" for row in conversations(setting.words))
    (work / "inputs/data/0/rows.jsonl").write_text("".join(lines))
    folder = WorkDir(work)
    folder.state.mkdir(parents=True, exist_ok=True)
    ranks = Ranks.from_environment()
    supervision = supervise(run, folder, ranks, Heartbeat(folder.heartbeat(0)))
    tokenizer = prepare_tokenizer(run, folder)
    data = arrange_packing(run, load_dataset(run, folder.inputs, tokenizer), folder.inputs, ranks)
    engine = build_engine(run, supervision, data, tokenizer)
    engine.add_callback(_Steps(clock))
    step = engine.training_step

    def counted(model: Any, inputs: Any, items: Any = None) -> Any:
        clock.count(engine.objective.tokens(inputs))
        return step(model, inputs, items)

    engine.training_step = counted  # type: ignore[method-assign]
    engine.train()


def trl(setting: Setting, model: Path, work: Path, clock: Clock, *, packed: bool) -> None:
    """TRL's trainer with the same batch, adapter, precision and length."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(work / "out"),
        max_steps=setting.steps,
        learning_rate=setting.learning_rate,
        per_device_train_batch_size=setting.micro,
        gradient_accumulation_steps=setting.accumulation,
        max_length=setting.length,
        packing=packed,
        gradient_checkpointing=False,
        lr_scheduler_type="linear",
        use_cpu=True,
        bf16=False,
        seed=7,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(conversations(setting.words)),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"
        ),
        callbacks=[_Steps(clock)],
    )
    step = trainer.training_step

    def counted(model: Any, inputs: Any, items: Any = None) -> Any:
        mask = inputs.get("attention_mask")
        clock.count(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
        return step(model, inputs, items)

    trainer.training_step = counted
    trainer.train()


if __name__ == "__main__":
    kind, setting, model, work = sys.argv[1], Setting(**json.loads(sys.argv[2])), Path(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(2)
    clock = Clock()
    run = ours if kind.startswith("ours") else trl
    packed = kind.endswith("packed")
    run(setting.packed() if packed else setting, model, work, clock, packed=packed)
    print(clock.result())
