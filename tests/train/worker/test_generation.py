"""Answers longer than a model's positions go on; those that fit are what the library writes in one go."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.train.worker.runs import in_child, launch, made_model

SHIPPED = Path(__file__).parents[3] / "examples/configs/character-gpt/config.json"
POSITIONS, WANTED = 256, 500


def test_answers_go_on_where_the_positions_of_the_shipped_character_model_end() -> None:
    found = in_child(_long_answers, str(SHIPPED), str(made_model()))
    assert found["positions"] == POSITIONS
    assert len(found["answer"]) == WANTED
    assert len(set(found["answer"])) > 20, "the answer varies, so that a wrong context would show"
    assert found["answer"] == found["expected"]
    assert len(found["longPrompt"]) == WANTED
    assert found["longPrompt"][:130] == found["longExpected"]
    first = found["answer"].index(found["end"])
    assert first > POSITIONS, "the end token comes in a later window"
    assert found["ended"] == found["answer"][: first + 1]
    assert found["beams"] == WANTED


def test_answers_that_fit_are_what_the_library_writes_and_a_long_neighbour_shortens_none() -> None:
    found = in_child(_fitting_answers, str(SHIPPED), str(made_model()))
    assert found["ours"] == found["library"]
    assert len(found["together"]) == 2
    assert found["together"] == found["alone"]
    assert [len(answer) for answer in found["tokens"]] == [30, 30]


def test_ranks_make_the_same_passes_where_one_answer_ends_before_the_other(tmp_path: Path) -> None:
    work = [str(tmp_path), str(SHIPPED), str(made_model())]
    assert launch(_answers_of_rank, 2, work) == [0, 0]
    first, second = (json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in (0, 1))
    assert first["looks"] == second["looks"] == 4, "500 tokens behind a prompt of 5 take windows of 251, 128 and 121"
    assert first["passes"] == second["passes"]
    assert (first["tokens"], second["tokens"]) == (WANTED, 3)


def test_the_report_says_where_a_decoders_positions_cut_the_answers() -> None:
    found = in_child(_capped, str(made_model()))
    assert found["tokens"] == 64
    assert found["note"] == {
        "generation.maxNewTokens": "answers end after 64 tokens, where the decoder's positions end"
    }
    assert found["fitting"] == {}


def _model(config_file: str, **changes: Any) -> Any:
    """The shipped config at a width of 32; weights so far apart that its texts vary."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    content = {**json.loads(Path(config_file).read_text()), "n_embd": 32, "n_head": 2, "n_layer": 2, **changes}
    config = AutoConfig.for_model(**content, initializer_range=0.4, bos_token_id=0, eos_token_id=None)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def _engine(model: Any, zero_stage: int = 0) -> Any:
    from contextlib import nullcontext

    import torch

    from finetune_trainer.worker.agreement import Agreement

    return SimpleNamespace(
        model=model,
        args=SimpleNamespace(device=torch.device("cpu")),
        accelerator=SimpleNamespace(autocast=nullcontext),
        agreement=Agreement(),
        supervision=SimpleNamespace(zero_stage=zero_stage, heartbeat=SimpleNamespace(long_phase=nullcontext)),
        look_for_stop=lambda: None,
    )


def _generator(folder: str, **settings: Any) -> Any:
    from transformers import AutoTokenizer

    from finetune_api.job import Generation
    from finetune_trainer.worker.evaluate.generation import Generator

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<end>"})  # beyond the vocabulary: no answer ends by itself
    return Generator(Generation(**settings), tokenizer, seed=1)


def _prompt(length: int) -> Any:
    import numpy as np

    return 20 + np.arange(length, dtype=np.int32) % 200


def _tokens(generator: Any, model: Any, prompt: Any) -> list[int]:
    import torch

    with torch.no_grad():
        return [int(token) for token in generator._written(_engine(model), [prompt])[0]]


def _expected(model: Any, prompt: Sequence[int], count: int = WANTED) -> list[int]:
    """Token by token, without a cache: each time the positions are full, the newest half of them stays."""
    import torch

    context, answer = list(prompt), list[int]()
    with torch.no_grad():
        while len(answer) < count:
            if len(context) >= POSITIONS:
                context = context[-(POSITIONS // 2) :]
            answer.append(int(model(input_ids=torch.tensor([context])).logits[0, -1].argmax()))
            context.append(answer[-1])
    return answer


def _long_answers(config_file: str, folder: str) -> dict[str, Any]:
    model = _model(config_file)
    generator = _generator(folder, max_new_tokens=WANTED)
    prompt, long = _prompt(5), _prompt(280)
    answer = _tokens(generator, model, prompt)
    end = next(token for token in answer[POSITIONS + 20 :] if token not in answer[: POSITIONS + 20])
    found = {
        "positions": model.config.max_position_embeddings,
        "answer": answer,
        "expected": _expected(model, prompt.tolist()),
        "longPrompt": _tokens(generator, model, long),
        "longExpected": _expected(model, long.tolist(), 130),
        "end": end,
        "beams": len(_tokens(_generator(folder, max_new_tokens=WANTED, num_beams=2), model, prompt)),
    }
    model.generation_config.eos_token_id = end
    return found | {"ended": _tokens(generator, model, prompt)}


def _fitting_answers(config_file: str, folder: str) -> dict[str, Any]:
    import torch

    from finetune_trainer.worker.evaluate.generation import pad_prompts

    model, generator = _model(config_file), _generator(folder, max_new_tokens=30)
    few = [_prompt(5), _prompt(9), _prompt(226)]
    ids, mask = pad_prompts(few, generator.tokenizer.pad_token_id, left=True)
    with torch.no_grad():
        output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=2)
    library = generator.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    engine, pair = _engine(model), [_prompt(5), _prompt(250)]
    return {
        "ours": generator.answers(engine, few),
        "library": [text.strip() for text in library],
        "together": generator.answers(engine, pair),
        "alone": [generator.answers(engine, [prompt])[0] for prompt in pair],
        "tokens": [_tokens(generator, model, prompt) for prompt in pair],
    }


def _answers_of_rank(arguments: Sequence[str], env: dict[str, str]) -> int:
    import torch
    from torch import distributed

    root, config_file, folder = arguments
    distributed.init_process_group("gloo")
    rank = int(env["RANK"])
    model, generator = _model(config_file), _generator(folder, max_new_tokens=WANTED)
    counted = {"looks": 0, "passes": 0}

    def look() -> None:
        counted["looks"] += 1

    def count(*_: Any) -> None:
        counted["passes"] += 1

    engine = _engine(model, zero_stage=3)
    engine.look_for_stop = look
    if rank == 1:  # as if its arithmetic differed: its answer ends with the third token
        model.generation_config.eos_token_id = _tokens_of_one(model)[2]
    model.register_forward_hook(count)
    texts: list[Any] = []
    generator.tokenizer.batch_decode = lambda rows, **_: texts.extend(rows) or [""] * len(rows)
    generator.answers(engine, [_prompt(5)])
    Path(root, f"rank-{rank}").write_text(json.dumps({**counted, "tokens": len(texts[0])}))
    torch.distributed.destroy_process_group()
    return 0


def _tokens_of_one(model: Any) -> list[int]:
    import torch

    with torch.no_grad():
        ids = torch.from_numpy(_prompt(5).astype("int64"))[None]
        return model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=2)[0, 5:].tolist()


def _capped(folder: str) -> dict[str, Any]:
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = BartForConditionalGeneration(
        BartConfig(vocab_size=320, **layers, **sizes, eos_token_id=None, forced_eos_token_id=None)
    )
    return {
        "tokens": len(_tokens(_generator(folder, max_new_tokens=100), model.eval(), _prompt(7))),
        "note": _generator(folder, max_new_tokens=100).notes(model),
        "fitting": _generator(folder, max_new_tokens=64).notes(model) | _generator(folder).notes(_model(str(SHIPPED))),
    }
