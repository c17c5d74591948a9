"""The metrics of classes, entities and texts, as pure functions.

Those of classes and entities are worked out from counts, which add up exactly over batches and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

Entity = tuple[str, int, int]
"""(type, first word, last word)."""
_PER_CLASS = ("precision", "recall", "f1")


class Ratio(NamedTuple):
    """A share as its two whole numbers; over nothing it is 0."""

    part: int
    whole: int

    @property
    def value(self) -> float:
        """part / whole, 0 where whole is 0."""
        return self.part / self.whole if self.whole else 0.0


def class_counts(confusion: Sequence[Sequence[int]]) -> dict[str, Ratio]:
    """Accuracy, and precision, recall and F1 of each class, as ratios that may be added up over batches.

    confusion[a][p]: how many records of class a were taken for p. Names: `accuracy`; `precision/<class>` and so on;
    `seen/<class>`: how many records were of the class or taken for it.
    """
    total = sum(map(sum, confusion))
    found = {"accuracy": Ratio(sum(row[k] for k, row in enumerate(confusion)), total)}
    columns = [sum(column) for column in zip(*confusion, strict=True)]
    for k, row in enumerate(confusion):
        right, actual, predicted = row[k], sum(row), columns[k]
        found[f"precision/{k}"] = Ratio(right, predicted)
        found[f"recall/{k}"] = Ratio(right, actual)
        found[f"f1/{k}"] = Ratio(2 * right, predicted + actual)
        found[f"seen/{k}"] = Ratio(predicted + actual - right, 1)
    return found


def class_metrics(values: Mapping[str, float], classes: int) -> dict[str, float]:
    """accuracy, precision, recall and f1 from the added-up ratios of class_counts.

    Of two classes: those of the second, the positive one. Of more: the plain (macro) mean over the classes that are in
    the records or were predicted, as scikit-learn has it.
    """
    if classes == 2:
        return {"accuracy": values["accuracy"], **{name: values[f"{name}/1"] for name in _PER_CLASS}}
    seen = [k for k in range(classes) if values[f"seen/{k}"] > 0]
    means = {name: sum(values[f"{name}/{k}"] for k in seen) / max(len(seen), 1) for name in _PER_CLASS}
    return {"accuracy": values["accuracy"], **means}


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities in the BIO tags of one record, as the CoNLL evaluation script and seqeval find them.

    An I- that follows O or another type begins an entity too.
    """
    found: set[Entity] = set()
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if kind and (prefix != "I" or name != kind):
            found.add((kind, start, place - 1))
            kind = ""
        if prefix != "O" and not kind:
            kind, start = name, place
    return found


def entity_counts(actual: Sequence[str], predicted: Sequence[str]) -> dict[str, Ratio]:
    """precision and recall of whole entities of one record; right is one with the same type, first and last word."""
    wanted, found = entities(actual), entities(predicted)
    right = len(wanted & found)
    return {"precision": Ratio(right, len(found)), "recall": Ratio(right, len(wanted))}


def f1(precision: float, recall: float) -> float:
    """The harmonic mean of precision and recall; 0 where both are."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions that are their reference but for white space round it; 0 without any."""
    pairs = list(zip(predictions, references, strict=True))
    return Ratio(sum(given.strip() == wanted.strip() for given, wanted in pairs), len(pairs)).value


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of the corpus, 0 to 100, by sacrebleu with its own tokenisation (13a) and one reference each."""
    from sacrebleu import corpus_bleu

    return float(corpus_bleu(list(predictions), [list(references)]).score) if predictions else 0.0


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """rouge1, rouge2 and rougeL: mean F-measures, 0 to 1, by rouge-score without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names)
    scores = [scorer.score(wanted, given) for given, wanted in zip(predictions, references, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / max(len(scores), 1) for name in names}
