"""Sentences to classify, or pairs of them: GLUE."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .sources import Row, columns
from .workload import Part, Workload, cut, set_mode, shuffled


class GlueTask(NamedTuple):
    """Columns that are read, labels, and the measure of answers."""

    fields: tuple[str, ...]
    labels: tuple[str, ...]
    """Names of the classes in the order of their numbers; none where a real number is learned."""

    metric: Literal["accuracy", "matthews", "pearson"] = "accuracy"


ENTAILMENT: Final = ("entailment", "not_entailment")
TWO: Final = ("sentence1", "sentence2")
TASKS: Final[Mapping[str, GlueTask]] = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), "matthews"),
    "mnli": GlueTask(("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "mrpc": GlueTask(TWO, ("not_equivalent", "equivalent")),
    "qnli": GlueTask(("question", "sentence"), ENTAILMENT),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate")),
    "rte": GlueTask(TWO, ENTAILMENT),
    "sst2": GlueTask(("sentence",), ("negative", "positive")),
    "stsb": GlueTask(TWO, (), "pearson"),
    "wnli": GlueTask(TWO, ("not_entailment", "entailment")),
}


class Batch(NamedTuple):
    """Token ids, where they are not padding, and what is to be said."""

    ids: Tensor  # (batch, tokens)
    mask: Tensor  # (batch, tokens)
    labels: Tensor  # (batch,)


class GlueWorkload(Workload[Batch]):
    """A model with a head for classes, which is frozen: only the adapters learn."""

    def __init__(
        self,
        base: Any,
        tokenizer: Any,
        parts: Mapping[Part, list[Row]],
        task: GlueTask,
        adapters: Mapping[str, Any],
        batch: int,
    ) -> None:
        self.tokenizer, self.task, self.device = tokenizer, task, base.device
        batches = {part: self._batched(rows, part, batch) for part, rows in parts.items()}
        super().__init__(base, adapters, batches)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of the classes, or the mean squared error of real numbers."""
        set_mode(model)
        output = self._output(model, batch)
        if self.task.labels:
            return functional.cross_entropy(output, batch.labels)
        return functional.mse_loss(output.squeeze(-1), batch.labels)

    def weight(self, batch: Batch) -> int:
        """Count what is classified."""
        return len(batch.labels)

    @torch.no_grad()
    def scores(self, model: nn.Module, part: Part) -> dict[str, float]:
        """The task's metric."""
        set_mode(model)
        outputs = torch.cat([self._output(model, batch) for batch in self.parts[part]])
        labels = torch.cat([batch.labels for batch in self.parts[part]])
        said = outputs.argmax(-1) if self.task.labels else outputs.squeeze(-1)
        if self.task.metric == "accuracy":
            return {"accuracy": float((said == labels).float().mean())}
        return {self.task.metric: correlation(said, labels)}

    def _output(self, model: Any, batch: Batch) -> Tensor:
        logits: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask).logits
        return logits.float()

    def _batched(self, rows: list[Row], part: Part, size: int) -> list[Batch]:
        table = columns(rows, *self.task.fields, "label")
        return [self._batch(x) for x in cut(shuffled(table) if part == "train" else table, size)]

    def _batch(self, rows: Sequence[tuple[Any, ...]]) -> Batch:
        *fields, labels = zip(*rows, strict=True)
        tokens = self.tokenizer(*map(list, fields), padding=True, return_tensors="pt")
        wanted = torch.tensor([label_of(label, self.task.labels) for label in labels])
        return Batch(
            tokens.input_ids.to(self.device),
            tokens.attention_mask.to(self.device),
            wanted.to(self.device),
        )


def label_of(label: Any, names: Sequence[str]) -> int | float:
    """The number of a class, given it or its name; or the real number."""
    if not names:
        return float(label)
    if str(label) in names:
        return names.index(str(label))
    if str(label) in map(str, range(len(names))):
        return int(label)
    msg = f"expected a label 0 to {len(names) - 1} or one of {', '.join(names)}, got {label!r}"
    raise ValueError(msg)


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's; of two classes it is Matthews'. 0 where one of the two does not vary."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size else 0.0
