"""Metrics of classes, entities and texts against the libraries that define them."""

from __future__ import annotations

import random

import pytest

from finetune_trainer.worker.metrics import (
    Ratio,
    bleu,
    class_counts,
    class_metrics,
    entities,
    entity_counts,
    exact_match,
    f1,
    rouge,
)


def _added(batches: list[dict[str, Ratio]]) -> dict[str, float]:
    """What the engine makes of sums over batches and ranks: total / count."""
    names = batches[0].keys()
    return {
        name: sum(batch[name].part for batch in batches) / max(sum(batch[name].whole for batch in batches), 1)
        for name in names
    }


def _confusion(actual: list[int], predicted: list[int], classes: int) -> list[list[int]]:
    table = [[0] * classes for _ in range(classes)]
    for a, p in zip(actual, predicted, strict=True):
        table[a][p] += 1
    return table


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("seed", range(5))
def test_precision_recall_and_f1_are_those_of_scikit_learn_however_batches_are_cut(classes: int, seed: int) -> None:
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    draw = random.Random(seed)
    used = classes if seed else classes - 1  # one class that is nowhere
    actual = [draw.randrange(used) for _ in range(60)]
    predicted = [a if draw.random() < 0.4 else draw.randrange(used) for a in actual]
    cuts = [(0, 7), (7, 8), (8, 40), (40, 60)]
    batches = [class_counts(_confusion(actual[a:b], predicted[a:b], classes)) for a, b in cuts]
    found = class_metrics(_added(batches), classes)

    options = {"pos_label": 1, "average": "binary"} if classes == 2 else {"average": "macro"}
    precision, recall, fscore, _ = precision_recall_fscore_support(actual, predicted, zero_division=0, **options)
    assert found == pytest.approx(
        {"accuracy": accuracy_score(actual, predicted), "precision": precision, "recall": recall, "f1": fscore}
    )


def _random_tags(draw: random.Random, broken: bool) -> list[str]:
    tags: list[str] = []
    for _ in range(draw.randrange(1, 12)):
        allowed = ["O", "B-LOC", "B-PER", "B-A-B"]
        if broken or tags[-1:] not in ([], ["O"]):
            allowed += ["I-LOC", "I-PER", "I-A-B"] if broken else ["I-" + tags[-1][2:]]
        tags.append(draw.choice(allowed))
    return tags


@pytest.mark.parametrize("broken", [False, True], ids=["well-formed", "I- anywhere"])
def test_entity_level_precision_recall_and_f1_equal_seqeval(broken: bool) -> None:
    from seqeval.metrics import f1_score, precision_score, recall_score
    from seqeval.metrics.sequence_labeling import get_entities

    draw = random.Random(3)
    actual = [_random_tags(draw, broken) for _ in range(500)]
    predicted = [
        [tag if draw.random() < 0.7 else draw.choice(["O", "B-LOC", "I-PER", "B-A-B", "I-A-B"]) for tag in tags]
        for tags in actual
    ]
    for tags in predicted:
        assert entities(tags) == set(get_entities(tags))

    found = _added([entity_counts(*pair) for pair in zip(actual, predicted, strict=True)])
    assert found["precision"] == precision_score(actual, predicted)
    assert found["recall"] == recall_score(actual, predicted)
    assert f1(found["precision"], found["recall"]) == pytest.approx(f1_score(actual, predicted), abs=1e-15)
    assert 0.1 < found["precision"] < 0.9


def test_without_entities_the_scores_are_zero() -> None:
    found = _added([entity_counts(["O", "O"], ["O", "O"])])
    assert (found["precision"], found["recall"], f1(0.0, 0.0)) == (0.0, 0.0, 0.0)


def test_texts_are_scored_as_by_sacrebleu_and_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import BLEU

    predictions = ["the cat sat on the mat today", "a dog barks at night"]
    references = ["the cat sat on a mat today", "a dog barks loudly at night"]
    assert bleu(predictions, references) == pytest.approx(BLEU().corpus_score(predictions, [references]).score)
    assert bleu(references, references) == pytest.approx(100)
    scores = RougeScorer(["rougeL"]).score(references[0], predictions[0])
    assert rouge(predictions[:1], references[:1])["rougeL"] == pytest.approx(scores["rougeL"].fmeasure)
    # Words in common, by hand: 6 of 7 both ways; 5 of 5 predicted and 5 of 6 wished.
    assert rouge(predictions, references)["rouge1"] == pytest.approx((6 / 7 + 10 / 11) / 2)
    assert rouge([], [])["rouge2"] == 0
    assert bleu([], []) == 0


def test_an_exact_match_forgives_white_space_at_the_ends_only() -> None:
    assert exact_match([" Paris\n", "paris", "New  York"], ["Paris", "Paris", "New York"]) == pytest.approx(1 / 3)
    assert exact_match([], []) == 0
