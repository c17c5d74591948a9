"""What PPO and GRPO share: the policy writes completions, they are judged, and some steps train on them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune_api.failures import FinetuneError
from finetune_api.runfile import RunReinforcement
from finetune_trainer.data.kinds import EncodedPrompt
from finetune_trainer.worker.evaluate.generation import pad_prompts
from finetune_trainer.worker.loss import IGNORED
from finetune_trainer.worker.objectives.base import Batch, Objective, Sums
from finetune_trainer.worker.objectives.policy import ReferencePolicy, as_bits, from_bits, put_off_dropout
from finetune_trainer.worker.objectives.rewards import Answer, Rewards
from finetune_trainer.worker.objectives.sampling import Drawn, Sampler, seed_of
from finetune_trainer.worker.padding import pad_arrays
from finetune_trainer.worker.resume import processes_of

_EVALUATION = 0
_TRAINING = 1


class Online(Objective):
    """Batches of the loader hold prompts; batches that are trained on hold prompts with completions.

    Trained on: input_ids, attention_mask, labels [rows, longest], padded on the right, the labels being the completion;
    real [rows], 0 for padding; score [rows] and further figures of the objective as bits of fp32.
    Completions are drawn with a seed of (run's seed, step, rank, micro batch): a resumed run draws the same ones, and
    the global random state has no part in it. `iterations` steps train on each set; a checkpoint between them holds it.
    """

    engine: Any
    sampler: Sampler
    rewards: Rewards
    reference: ReferencePolicy | None
    window: list[Batch]

    @property
    def settings(self) -> RunReinforcement:
        """The reinforcement settings of the run."""
        assert self.run.objective.reinforcement is not None  # the planner fills it for these objectives
        return self.run.objective.reinforcement

    @property
    def repeats(self) -> int:
        """Optimizer steps for each set of completions."""
        return self.settings.iterations

    # ---- data

    def length(self, item: EncodedPrompt) -> int:
        """Tokens of the prompt."""
        return len(item.input_ids)

    def collate(self, items: Sequence[EncodedPrompt]) -> Batch:
        """input_ids, attention_mask [prompts, longest], padded on the left; reference [prompts, bytes] with its length
        in reference_bytes; real [prompts], 0 for padding."""
        ids, mask = pad_prompts([item.input_ids for item in items], 0, left=True)
        references, known = pad_arrays([item.reference for item in items], 0)
        real = torch.full((len(ids),), int(bool(items)))
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "reference": references,
            "reference_bytes": known.sum(-1) * real,
            "real": real,
        }

    # ---- before a step

    def attach(self, engine: Any) -> None:
        """Keep the reference, before any checkpoint is loaded, and load the reward models."""
        self.engine = engine
        self.window = []
        settings = self.settings
        put_off_dropout(engine.model)
        self.sampler = Sampler(self.tokenizer, temperature=settings.temperature, new_tokens=settings.max_new_tokens)
        self.rewards = Rewards(self.run, engine)
        self.reference = ReferencePolicy(engine) if settings.beta > 0 else None

    def roll_out(self, engine: Any, batches: list[Batch]) -> list[Batch]:
        """New completions at the first of `iterations` steps; the same ones at the others.

        New ones too where a resumed run cuts its steps into other micro batches than the set that it finds.
        """
        step = engine.state.global_step
        if step % self.repeats == 0 or len(self.window) != len(batches):
            with engine.supervision.heartbeat.long_phase():
                window = []
                for number, batch in enumerate(batches):
                    engine.look_for_stop()
                    window.append(self._written(batch, step, number))
                self.window = self.finished(window)
        return self.window

    def _written(self, prompts: Batch, step: int, number: int) -> Batch:
        """A batch to train on, on the host."""
        rank = self.engine.supervision.ranks.rank
        seed = seed_of(self.run.hyperparameters.seed, _TRAINING, step, rank, number)
        answers = self.answers(prompts, self.settings.generations, seed)
        batch = _texts(answers)
        scores = torch.tensor(self.rewards.scores(answers) if answers else [0.0], dtype=torch.float64)
        batch["score"] = as_bits(scores)
        with torch.no_grad():
            return {name: value.cpu() for name, value in self.judged(batch, scores).items()}

    def answers(self, prompts: Batch, count: int, seed: int) -> list[Answer]:
        """count completions of each prompt, side by side; none for a batch without prompts."""
        real = bool(prompts["real"].any())
        if not real and self.engine.supervision.zero_stage != 3:
            return []
        ids, mask = (prompts[name].repeat_interleave(count, 0) for name in ("input_ids", "attention_mask"))
        drawn = self.sampler.draw(self.engine, ids, mask, seed)
        if not real:
            return []
        references = [
            bytes(row[:length].tolist()).decode()
            for row, length in zip(prompts["reference"], prompts["reference_bytes"].tolist(), strict=True)
        ]
        return [
            Answer(ids[k, mask[k] > 0].cpu(), one, self._text(one), references[k // count])
            for k, one in enumerate(drawn)
        ]

    def _text(self, drawn: Drawn) -> str:
        return self.tokenizer.decode(drawn.ids.tolist(), skip_special_tokens=True)

    def on_device(self, batch: Batch) -> Batch:
        """batch where the model is."""
        return {name: value.to(self.engine.args.device) for name, value in batch.items()}

    @abstractmethod
    def judged(self, batch: Batch, scores: Tensor) -> Batch:
        """The batch with what its loss needs of the policy before the update. scores: fp64 [rows], on the host."""

    def finished(self, window: list[Batch]) -> list[Batch]:
        """The whole set of this rank, once every batch of it is judged."""
        return window

    # ---- what is logged and measured

    def note_roll_out(self, batch: Batch) -> None:
        """Add reward and completionLength (tokens) of a batch to the step's figures."""
        real = batch["real"].double()
        lengths = (batch["labels"] != IGNORED).sum(-1)
        self.note("reward", (from_bits(batch["score"]) * real).sum(), real.sum())
        self.note("completionLength", (lengths * real).sum(), real.sum())

    def measure(self, model: nn.Module, batch: Batch) -> Sums:
        """reward of one completion for each held-out prompt, drawn with the same seed each time; loss is −reward."""
        seed = seed_of(self.run.hyperparameters.seed, _EVALUATION, int(batch["input_ids"].sum()))
        answers = self.answers({name: value.cpu() for name, value in batch.items()}, 1, seed)
        scores = torch.tensor(self.rewards.scores(answers), dtype=torch.float64, device=self.device(batch))
        count = torch.tensor(float(len(answers)), dtype=torch.float64, device=scores.device)
        return {"loss": torch.stack([-scores.sum(), count]), "reward": torch.stack([scores.sum(), count])}

    # ---- checkpoints

    def own_state(self) -> dict[str, dict[str, Tensor]]:
        """The completions in use, if the checkpoint lies between the steps that train on them."""
        if self.engine.state.global_step % self.repeats == 0:
            return {}
        tensors = {f"{k}/{name}": value for k, batch in enumerate(self.window) for name, value in batch.items()}
        return {self._file: {name: value.contiguous() for name, value in tensors.items()}}

    def load_state(self, folder: Path) -> None:
        """The completions that the step after the checkpoint trains on; raises CheckpointInvalid without them.

        Those of another number of processes are left: they are other prompts' than this rank's.
        """
        world_size = self.engine.supervision.ranks.world_size
        if self.engine.state.global_step % self.repeats == 0 or processes_of(folder) != world_size:
            return
        path = folder / self._file
        if not path.is_file():
            raise FinetuneError(
                f"The restored checkpoint cannot be used: it lacks {path.name}.", failure_class="CheckpointInvalid"
            )
        found: dict[int, Batch] = {}
        for name, value in load_file(path).items():
            number, _, key = name.partition("/")
            found.setdefault(int(number), {})[key] = value
        self.window = [found[k] for k in sorted(found)]

    @property
    def _file(self) -> str:
        return f"completions-{self.engine.supervision.ranks.rank}.safetensors"


def _texts(answers: Sequence[Answer]) -> Batch:
    """Prompts with their completions, padded on the right; no answers give one row that adds nothing."""
    rows = [torch.cat([answer.prompt, answer.drawn.ids]).numpy() for answer in answers]
    ids, mask = pad_arrays(rows, 0)
    labels = torch.full_like(ids, IGNORED)
    for row, answer in enumerate(answers):
        start, end = len(answer.prompt), len(answer.prompt) + len(answer.drawn.ids)
        labels[row, start:end] = ids[row, start:end]
    real = torch.full((len(ids),), int(bool(answers)))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "real": real}
