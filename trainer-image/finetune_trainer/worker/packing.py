"""Packing that is proven at start: a small copy of the model must not let one record of a sequence see another.

Which attention kernels keep packed records apart depends on the architecture, the kernel and the library's version, and
those that do not give no warning. So the way is chosen by trial: no mask, then no mask in one row, then a 4-D float
mask; where all of them leak, records are not packed, and the settings say why.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from finetune_api.job import ObjectiveType, Task, TuningType
from finetune_api.runfile import RunFile
from finetune_trainer.data import Encoded
from finetune_trainer.data.encoders import method
from finetune_trainer.data.kinds import EncodedPacked
from finetune_trainer.data.packing import Isolation, Packed
from finetune_trainer.worker.loading import ATTENTION, PRECISIONS
from finetune_trainer.worker.loss import IGNORED
from finetune_trainer.worker.padding import pad_arrays
from finetune_trainer.worker.ranks import Ranks

_SOFT_PROMPTS = (TuningType.PROMPT_TUNING, TuningType.P_TUNING, TuningType.PREFIX_TUNING)
_VOCABULARY = 64
_WINDOW = 4
"""Sliding window of the copy: shorter than the probe's records, so that a mask which loses the window shows."""
_SPREAD = 0.2
"""Weights large enough that a leak is far above rounding."""
_SEED = 20_251
# Both are seen beside what plain attention over the whole sequence lets through, which counts as 1. A record that is
# packed is worked out in another order than alone, which 16 bits round otherwise (0.017 was seen in BF16 on CPU); a lost
# window or wrong positions differ by about 1.
_LEAK = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.05}


@dataclass(frozen=True)
class Proof:
    """The way that keeps records apart; None where none does, with the reason."""

    isolation: Isolation | None
    reason: str


def arrange_packing(run: RunFile, data: Encoded, inputs: Path, ranks: Ranks) -> Encoded:
    """data with packed training records where packing is asked for and proven; the same on every rank.

    Its statistics say which way was chosen, or why none was. inputs: WORK/inputs.
    """
    hp, kind = run.hyperparameters, method(run)
    if (
        not hp.packing or hp.total_steps == 0 or kind is ObjectiveType.PRETRAIN
    ):  # Pretrain's blocks are full as they are
        return data
    if kind not in (ObjectiveType.SUPERVISED, ObjectiveType.DISTILLATION) or run.model.task is not Task.CAUSAL_LM:
        proof = Proof(None, f"records of objective {run.objective.type} and task {run.model.task} are not packed")
    elif run.tuning.type in _SOFT_PROMPTS:
        proof = Proof(None, f"{run.tuning.type} puts its tokens before a sequence, not before each of its records")
    else:
        folders = [inputs / "model"] + ([inputs / "teacher"] if kind is ObjectiveType.DISTILLATION else [])
        device = torch.device("cpu" if run.resources.accelerator == "cpu" else f"cuda:{ranks.local_rank}")
        proof = prove_isolation(folders, ATTENTION[run.model.attention], PRECISIONS[hp.precision], device)
    return _arranged(run, data, proof)


def _arranged(run: RunFile, data: Encoded, proof: Proof) -> Encoded:
    if proof.isolation is None:
        said = f"off: {proof.reason}, so each sequence is one record"
        return replace(data, stats=replace(data.stats, packing=said))
    lengths = data.train.lengths  # type: ignore[attr-defined]  # a table's
    packed = Packed(data.train, lengths, run.hyperparameters.max_sequence_length, run.hyperparameters.seed)
    said = (
        f"{proof.isolation}: {proof.reason}; {len(data.train)} records in {len(packed)} sequences, "
        f"{packed.fill:.0%} of the longest on average"
    )
    return replace(data, train=packed, isolation=proof.isolation, stats=replace(data.stats, packing=said))


def with_steps_of(run: RunFile, data: Encoded) -> RunFile:
    """run with as many steps as its epochs take of the sequences that there are.

    The planner knows how many tokens there are, not how well records fill a sequence, nor whether they can be packed.
    """
    hp = run.hyperparameters
    if not hp.packing or hp.epochs is None or method(run) is ObjectiveType.PRETRAIN:
        return run
    steps = max(1, math.ceil(len(data.train) / run.global_batch_size * hp.epochs))
    return run.model_copy(update={"hyperparameters": hp.model_copy(update={"total_steps": steps})})


def prove_isolation(folders: Sequence[Path], attention: str, dtype: torch.dtype, device: torch.device) -> Proof:
    """The first way that keeps records apart in every model of folders, shown on small copies with random weights."""
    copies = []
    for folder in folders:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        try:
            copies.append(small_copy(config, attention, dtype, device))
        except (ValueError, TypeError, RuntimeError, ImportError, AttributeError) as error:
            return Proof(None, f"no small copy of a {config.model_type} model can be made to prove it on ({error})")
    leaks = []
    for way in Isolation:
        if way is Isolation.FLOAT_MASK and any(hasattr(model.config, "router_aux_loss_coef") for model in copies):
            leaks.append(f"{way.value}: the balance loss of a mixture cannot read it")
            continue
        found = [leak for model in copies if (leak := leak_of(model, way)) is not None]
        if not found:
            return Proof(way, f"records do not see one another ({attention}, tried on {_names(copies)})")
        leaks.append(f"{way.value}: {found[0]}")
    return Proof(None, f"records of one sequence would see one another in {_names(copies)} ({'; '.join(leaks)})")


def small_copy(config: PretrainedConfig, attention: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model of the config's architecture with two layers (one of each kind, if more), a small vocabulary and random
    weights, in evaluation mode. Nothing of the global random state is used up."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_SEED)
        try:
            model = _build(_shrunk(config, narrow=True), attention, dtype)
        except (ValueError, TypeError, RuntimeError, AttributeError, ZeroDivisionError):
            # An architecture whose widths hang together otherwise keeps them.
            model = _build(_shrunk(config, narrow=False), attention, dtype)
    return model.to(device).eval()


def leak_of(model: PreTrainedModel, way: Isolation) -> str | None:
    """What one record learns of another when they are packed in this way; None if nothing.

    A record that is packed behind another must have the logits that it has alone, and keep them when the other changes.
    """
    first, second, other = _probe()
    try:
        with torch.no_grad():
            alone = _alone(model, second)
            packed = _behind(model, first, second, way)
            changed = _behind(model, other, second, way)
            control = (_unmasked(model, first, second) - _unmasked(model, other, second)).abs().max()
    except (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError, AssertionError) as error:
        return f"refused ({str(error).splitlines()[0][:80] if str(error) else type(error).__name__})"
    if not float(control) > 0:
        return "plain attention shows no influence to compare with"
    for what, difference, allowed in (
        ("changes with the record before it", packed - changed, _LEAK[model.dtype]),
        ("differs from itself alone", packed - alone, _DIFFERENCE[model.dtype]),
    ):
        share = float(difference.abs().max()) / float(control)
        if not share <= allowed:  # nan is no proof either
            return f"a record {what} ({share:.2g} of an open mask's)"
    return None


def packed_batch(items: Sequence[EncodedPacked], isolation: Isolation, dtype: torch.dtype) -> dict[str, Tensor]:
    """input_ids, position_ids and labels, each [batch, longest]; one row of all tokens with ONE_ROW.

    Positions begin at 0 with each record, and are 0 for all padding. FLOAT_MASK adds attention_mask
    [batch, 1, longest, longest] of dtype: 0 where a token may look, the lowest number elsewhere.
    """
    ids = [item.input_ids for item in items]
    labels = [item.labels for item in items]
    positions = [_positions(item.starts, len(item.input_ids)) for item in items]
    if isolation is Isolation.ONE_ROW:
        ids, labels, positions = [np.concatenate(ids)], [np.concatenate(labels)], [np.concatenate(positions)]
    batch = {
        "input_ids": pad_arrays(ids, 0)[0],
        "position_ids": pad_arrays(positions, 0)[0],
        "labels": pad_arrays(labels, IGNORED)[0],
    }
    if isolation is Isolation.FLOAT_MASK:
        batch["attention_mask"] = _float_mask(batch["position_ids"], dtype)
    return batch


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Any]:
    """What a causal model is called with. A packed batch leaves the cache off: with it, records see one another."""
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
    return {**inputs, "use_cache": False} if "position_ids" in batch else inputs


def packed_tokens(positions: Tensor) -> int:
    """How many tokens of a packed batch are no padding: each record has at least two."""
    begins = (positions[:, :-1] == 0) & (positions[:, 1:] == 1)
    return int((positions > 0).sum() + begins.sum())


def _positions(starts: np.ndarray[Any, Any], length: int) -> np.ndarray[Any, Any]:
    positions = np.arange(length, dtype=np.int64)
    lengths = np.diff(np.append(starts, length))
    return positions - np.repeat(starts, lengths)


def _float_mask(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """[batch, 1, length, length]: a token sees those before it in its own record."""
    record = (positions == 0).cumsum(1)
    same = record[:, None, :, None] == record[:, None, None, :]
    length = positions.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()
    return torch.zeros_like(same, dtype=dtype).masked_fill_(~(same & before), torch.finfo(dtype).min)


# ---- the probe


def _probe() -> tuple[list[int], list[int], list[int]]:
    """(a record, the record packed behind it, another record of the first one's length)."""
    drawn = np.random.default_rng(_SEED).integers(3, _VOCABULARY, 9 + 12 + 9).tolist()
    first, second, other = drawn[:9], drawn[9:21], drawn[21:]
    other = [
        token if token != was else 3 + (token - 2) % (_VOCABULARY - 3) for token, was in zip(other, first, strict=True)
    ]
    return first, second, other


def _behind(model: PreTrainedModel, first: list[int], second: list[int], way: Isolation) -> Tensor:
    """The logits of second, packed behind first in a batch with a longer sequence of other records."""
    rows = [(first, second), (second, first, second)]
    items = []
    for row in rows:
        ids = np.array([token for record in row for token in record], np.int32)
        starts = np.cumsum([0, *(len(record) for record in row[:-1])]).astype(np.int32)
        items.append(EncodedPacked(ids, ids, starts))
    batch = {name: value.to(model.device) for name, value in packed_batch(items, way, model.dtype).items()}
    logits = model(**model_inputs(batch))["logits"].float()
    return logits[0, len(first) : len(first) + len(second)]


def _alone(model: PreTrainedModel, record: list[int]) -> Tensor:
    ids = torch.tensor([record], device=model.device)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)["logits"].float()[0]


def _unmasked(model: PreTrainedModel, first: list[int], second: list[int]) -> Tensor:
    return _alone(model, [*first, *second])[len(first) :]


# ---- the small copy


def _shrunk(config: PretrainedConfig, *, narrow: bool) -> PretrainedConfig:
    small = copy.deepcopy(config)
    if getattr(small, "quantization_config", None) is not None:
        del small.quantization_config
    kinds = list(dict.fromkeys(getattr(small, "layer_types", None) or ()))
    layers = max(2, len(kinds))
    small.num_hidden_layers = layers
    if kinds:
        small.layer_types = (kinds * layers)[:layers]
    if getattr(small, "sliding_window", None):
        small.sliding_window = _WINDOW
    small.vocab_size = _VOCABULARY
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(small, name, None)
    for name in ("initializer_range", "init_std"):
        if hasattr(small, name):
            setattr(small, name, _SPREAD)
    if narrow:
        _narrow(small)
    return small


def _narrow(small: PretrainedConfig) -> None:
    """Few heads of the same width, and few experts: how attention masks does not depend on their number."""
    heads, width = small.num_attention_heads, small.hidden_size
    groups = getattr(small, "num_key_value_heads", None) or heads
    fewer = 2 if groups == 1 or heads // groups > 1 else 4
    small.num_attention_heads = fewer
    small.hidden_size = width // heads * fewer
    if getattr(small, "num_key_value_heads", None):
        small.num_key_value_heads = fewer if groups == heads else 1
    for name in ("intermediate_size", "ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size", "n_inner"):
        if getattr(small, name, None):
            setattr(small, name, 2 * small.hidden_size)
    for name in ("word_embed_proj_dim", "ffn_hidden_size"):
        if getattr(small, name, None):
            setattr(small, name, small.hidden_size * (4 if name == "ffn_hidden_size" else 1))
    for name in ("num_experts", "num_local_experts"):
        if getattr(small, name, None):
            setattr(small, name, max(2, getattr(small, "num_experts_per_tok", 2)))


def _build(config: PretrainedConfig, attention: str, dtype: torch.dtype) -> PreTrainedModel:
    # As the model itself is loaded: eager where the architecture (BLOOM) has no sdpa.
    if attention == "sdpa" and not AutoModelForCausalLM._model_mapping[type(config)]._supports_sdpa:
        attention = "eager"
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype, trust_remote_code=False)


def _names(copies: Sequence[PreTrainedModel]) -> str:
    return " and ".join(dict.fromkeys(str(model.config.model_type) for model in copies))
