"""GRPO and PPO by their papers' formulas, and the built-in rewards."""

from __future__ import annotations

import time
from itertools import chain
from typing import Any

import pytest

from tests.train.worker.runs import in_child

CLOSE = 1e-5


def test_grpo_advantages_are_scores_normalised_within_their_group() -> None:
    found, expected = in_child(_group_advantages)
    assert found == pytest.approx(expected, abs=CLOSE)
    assert found[-4:] == [0.0, 0.0, 0.0, 0.0], "a group of equal scores teaches nothing"


def _group_advantages() -> tuple[list[float], list[float]]:
    import statistics

    import torch

    from finetune_trainer.worker.objectives.grpo import group_advantages

    groups = [[1.0, 0.0, 0.5, 0.25], [-3.0, 9.0, 2.0, 2.0], [0.1 * 3] * 4]
    found = group_advantages(torch.tensor(groups, dtype=torch.float64)).flatten().tolist()
    expected = [
        (score - statistics.mean(group)) / statistics.stdev(group) for group in groups[:2] for score in group
    ] + [0.0] * 4
    return found, expected


def test_the_gain_is_clipped_on_the_side_that_it_would_be_overstated() -> None:
    found = in_child(_gains)
    assert found == pytest.approx([1.2 * 2, 0.5 * 2, 1.5 * -2, 0.8 * -2], abs=CLOSE)


def _gains() -> list[float]:
    import torch

    from finetune_trainer.worker.objectives.grpo import clipped_gain

    ratio, advantage = torch.tensor([1.5, 0.5, 1.5, 0.5]), torch.tensor([2.0, 2.0, -2.0, -2.0])
    return clipped_gain(ratio, advantage, 0.2).tolist()


def test_the_estimate_of_the_divergence_is_right_in_the_mean_and_never_negative() -> None:
    estimate, exact, least = in_child(_divergence)
    assert estimate == pytest.approx(exact, abs=CLOSE)
    assert least >= 0


def _divergence() -> tuple[float, float, float]:
    """The mean over all tokens of a distribution, each with its probability, is the divergence itself."""
    import torch

    from finetune_trainer.worker.objectives.grpo import k3

    torch.manual_seed(0)
    policy, reference = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    each = k3(policy, reference)
    exact = (policy.exp() * (policy - reference)).sum()
    return float((policy.exp() * each).sum()), float(exact), float(each.min())


def test_ppo_rewards_and_advantages_are_those_of_the_papers() -> None:
    rewards, expected_rewards, found, expected = in_child(_gae)
    assert rewards == pytest.approx(expected_rewards, abs=CLOSE)
    assert found == pytest.approx(expected, abs=CLOSE)


def _gae() -> tuple[list[float], list[float], list[float], list[float]]:
    """Sums of discounted errors, written out: A_t = Σ_l (γλ)^l δ_{t+l} (Schulman et al. 2016, equation 16)."""
    import torch

    from finetune_trainer.worker.objectives.ppo import advantages_of, token_rewards

    torch.manual_seed(0)
    gamma, decay, beta = 0.9, 0.7, 0.3
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 0, 0]]).bool()
    policy, reference, values = torch.randn(3, 3, 6)
    scores = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    rewards = token_rewards(scores, policy, reference, mask, beta)
    found = advantages_of(rewards, values, mask, gamma, decay)
    expected_rewards, expected = torch.zeros(3, 6), torch.zeros(3, 6)
    for row in range(3):
        places = mask[row].nonzero().flatten().tolist()
        own = [-beta * float(policy[row, t] - reference[row, t]) for t in places]
        own[-1] += float(scores[row])
        worth = [*(float(values[row, t]) for t in places), 0.0]
        errors = [own[k] + gamma * worth[k + 1] - worth[k] for k in range(len(places))]
        for k, t in enumerate(places):
            expected_rewards[row, t] = own[k]
            expected[row, t] = sum((gamma * decay) ** (m - k) * errors[m] for m in range(k, len(places)))
    return (
        rewards.flatten().tolist(),
        expected_rewards.flatten().tolist(),
        found.flatten().tolist(),
        expected.flatten().tolist(),
    )


def test_ppo_value_losses_are_clipped_like_the_ratio() -> None:
    found = in_child(_value_losses)
    # within the range; moved away from the return beyond it; moved to the return beyond it
    assert found == pytest.approx([0.5 * 0.9**2, 0.5 * 2.0**2, 0.5 * 0.8**2], abs=CLOSE)


def _value_losses() -> list[float]:
    import torch

    from finetune_trainer.worker.objectives.ppo import value_losses

    values, old, returns = torch.tensor([0.1, -1.0, 0.9]), torch.zeros(3), torch.ones(3)
    return value_losses(values, old, returns, 0.2).tolist()


def test_log_probs_are_those_of_the_distribution_that_was_sampled_from() -> None:
    found, expected = in_child(_log_probs)
    assert found == pytest.approx(expected, abs=CLOSE)


def _log_probs() -> tuple[list[float], list[float]]:
    import torch

    from finetune_trainer.worker.objectives.policy import token_log_probs

    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 11), torch.randint(0, 11, (2, 5))
    labels[0, :3] = -100
    found = token_log_probs(logits, labels, 0.7)
    expected = torch.zeros(2, 4)
    for row in range(2):
        for t in range(4):
            if labels[row, t + 1] != -100:
                expected[row, t] = (logits[row, t] / 0.7).log_softmax(-1)[labels[row, t + 1]]
    return found.flatten().tolist(), expected.flatten().tolist()


def test_built_in_rewards_judge_as_they_say() -> None:
    exact, length, pattern = in_child(_judge)
    assert exact == [1.0, 0.0, 0.0]
    assert length == pytest.approx([1.0, 0.75, 0.0])
    assert pattern == [1.0, 0.0, 1.0]


def _answers() -> list[Any]:
    import torch

    from finetune_trainer.worker.objectives.rewards import Answer
    from finetune_trainer.worker.objectives.sampling import Drawn

    def answer(text: str, tokens: int, ended: bool) -> Any:
        return Answer(torch.zeros(2), Drawn(torch.zeros(tokens), ended), text, "42")

    return [answer(" 42\n", 5, True), answer("Forty", 5, False), answer("the answer is 42", 9, True)]


def _judge() -> tuple[list[float], list[float], list[float]]:
    from finetune_trainer.worker.objectives.rewards import ExactMatch, Length, Pattern

    answers = _answers()
    return ExactMatch("f")(answers), Length(4)(answers), Pattern(r"\d+$", "f")(answers)


def test_a_pattern_that_backtracks_without_end_is_refused_in_bounded_time() -> None:
    begun = time.monotonic()
    message, field = in_child(_catastrophe)
    assert "took more than 0.2 s on a completion of 41 letters" in message
    assert field == "spec.objective.grpo.rewards[1].pattern"
    assert time.monotonic() - begun < 200, "unbounded, it would take years"


def _catastrophe() -> tuple[str, str | None]:
    from dataclasses import replace

    from finetune_api.failures import FinetuneError
    from finetune_trainer.worker.objectives.rewards import Pattern

    answer = replace(_answers()[0], text="a" * 40 + "!")
    try:
        Pattern(r"^(a|a|aa)+$", "spec.objective.grpo.rewards[1].pattern", 0.2)([answer])
    except FinetuneError as error:
        return str(error), error.field
    return "no error", None


def test_a_broken_pattern_is_refused_with_its_field() -> None:
    message, field, kind = in_child(_broken_pattern)
    assert message.startswith("The pattern '(' is not a regular expression")
    assert (field, kind) == ("spec.objective.grpo.rewards[0].pattern", "InvalidSpec")


def _broken_pattern() -> tuple[str, str | None, str]:
    from finetune_api.failures import FinetuneError
    from finetune_trainer.worker.objectives.rewards import Pattern

    try:
        Pattern("(", "spec.objective.grpo.rewards[0].pattern")
    except FinetuneError as error:
        return str(error), error.field, error.failure_class
    return "no error", None, ""


def test_exact_match_without_an_answer_to_match_is_refused() -> None:
    assert in_child(_no_reference) == "spec.objective.grpo.rewards[0]"


def _no_reference() -> str | None:
    from dataclasses import replace

    from finetune_api.failures import FinetuneError
    from finetune_trainer.worker.objectives.rewards import ExactMatch

    try:
        ExactMatch("spec.objective.grpo.rewards[0]")([replace(_answers()[0], reference="")])
    except FinetuneError as error:
        return error.field
    return None


def test_steps_that_share_completions_see_the_same_prompts_also_at_the_end_of_an_epoch() -> None:
    steps, lengths = in_child(_repeated_steps)
    assert lengths == [12, 12], "two ranks, three steps of two passes each twice"
    assert [len(records) for records in steps] == [8, 8, 8, 8, 3, 3]
    assert steps[0::2] == steps[1::2]
    assert sorted(chain(*steps[0::2])) == list(range(19))


def _repeated_steps() -> tuple[list[list[int]], list[int]]:
    """Records of each step of an epoch, and how many micro batches each rank has."""
    from finetune_trainer.worker.batches import Split, StepBatches

    ranks = []
    for rank in range(2):
        batches = StepBatches([5 + k % 7 for k in range(19)], Split(2, 2, rank, 2), seed=5, repeats=2)
        ranks.append(list(batches))
        assert len(ranks[-1]) == len(batches)
    passes = [sorted(chain(*parts)) for parts in zip(*ranks, strict=True)]
    return [sorted(passes[k] + passes[k + 1]) for k in range(0, len(passes), 2)], [len(own) for own in ranks]
