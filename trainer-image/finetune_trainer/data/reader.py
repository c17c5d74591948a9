"""Records of all sources as examples: the first record decides how all of them are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from finetune_api.job import Columns, DataFormat, ObjectiveType, Task
from finetune_trainer.data.detect import resolve_shape
from finetune_trainer.data.examples import to_example
from finetune_trainer.data.formats import Example, RecordShape
from finetune_trainer.data.pairs import apart
from finetune_trainer.data.readers import Row
from finetune_trainer.data.records import BadRecord
from finetune_trainer.data.windows import joined_lines


class ExampleReader:
    """Turns the records of all sources of a data set into examples. The first record decides the shape of all."""

    def __init__(
        self,
        format: DataFormat | None,
        columns: Columns | None,
        prompt_template: str | None,
        *,
        objective: ObjectiveType = ObjectiveType.SUPERVISED,
        task: Task = Task.CAUSAL_LM,
        whole_texts: bool = False,
    ) -> None:
        """The settings of a data set, and for which objective and task it is read.

        whole_texts: a txt file that is one text is one record however long it is, as it is for a template.
        """
        self._settings = (format, columns, prompt_template)
        self._objective = objective
        self._task = task
        self._whole_texts = whole_texts or prompt_template is not None
        self._shape: RecordShape | None = None

    @property
    def shape(self) -> RecordShape | None:
        """How records are read; None before the first one."""
        return self._shape

    def read(self, rows: Iterable[Row]) -> Iterator[Example | BadRecord]:
        """The examples of rows. Raises FinetuneError if no format fits the first record, or a setting does not.

        For KTO a pair of completions gives two examples; for Pretrain the lines of a txt file give one, or
        several that continue each other.
        """
        for row in joined_lines(rows, whole=self._whole_texts) if self._objective is ObjectiveType.PRETRAIN else rows:
            if isinstance(row, BadRecord):
                yield row
                continue
            if self._shape is None:
                self._shape = resolve_shape(*self._settings, row.fields, objective=self._objective, task=self._task)
            found = to_example(row, self._shape)
            if self._objective is ObjectiveType.KTO and isinstance(found, Example) and found.label is None:
                yield from apart(found)
            else:
                yield found
