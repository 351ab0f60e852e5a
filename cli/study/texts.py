"""A language model that learns to answer prompts: what GPT-2 and Mistral share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LogitsProcessor, LogitsProcessorList, NoRepeatNGramLogitsProcessor

from .tasks import Example
from .workload import Part, Workload, cut, set_mode, shuffled

IGNORE: Final = -100
"""The target of a token that does not count."""

Judge = Callable[[list[str], list[list[str]]], dict[str, float]]
"""Answers, and for each all right ones -> scores."""


class Batch(NamedTuple):
    """Token ids, and for each the next token if it belongs to the answer, else `IGNORE`."""

    ids: Tensor  # (batch, tokens)
    targets: Tensor  # (batch, tokens)


class Recipe(NamedTuple):
    """Settings by which a model is adapted, trained and asked."""

    adapters: Mapping[str, Any]
    """Arguments of PEFT's LoraConfig but for the rank."""

    batch: int
    decoding: Mapping[str, Any]
    """Arguments of transformers' generate."""

    smoothing: float = 0.0
    """Smoothing of the labels, in training."""

    separator: bool = False
    """Flag: the end-of-text token stands between prompt and answer, as in the LoRA paper."""

    no_repeat: int = 0
    """No n-gram of this size stands twice in an answer; 0 for no such rule."""


class TextWorkload(Workload[Batch]):
    """A causal language model with prompts and answers."""

    def __init__(
        self,
        base: Any,
        tokenizer: Any,
        parts: Mapping[Part, list[Example]],
        recipe: Recipe,
        judge: Judge,
    ) -> None:
        self.tokenizer, self.recipe, self.judge = tokenizer, recipe, judge
        self.device, self.examples = base.device, parts
        batches = {part: self._batched(part) for part in parts}
        super().__init__(base, recipe.adapters, batches)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Mean cross-entropy of the answers' tokens; in training the labels are smoothed."""
        smoothing = self.recipe.smoothing if set_mode(model) else 0.0
        base = model.get_base_model()
        hidden = base.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
        wanted = batch.targets != IGNORE
        logits = base.get_output_embeddings()(hidden[wanted]).float()  # the others are not needed
        return functional.cross_entropy(logits, batch.targets[wanted], label_smoothing=smoothing)

    def weight(self, batch: Batch) -> int:
        """Tokens of answers."""
        return int((batch.targets != IGNORE).sum())

    def scores(self, model: Any, part: Part) -> dict[str, float]:
        """Ask each different prompt once and judge the answers by all right ones."""
        right: dict[str, list[str]] = {}
        for example in self.examples[part]:
            right.setdefault(example.prompt, []).append(example.answer)
        return self.judge(self.answers(model, list(right)), list(right.values()))

    @torch.no_grad()
    def answers(self, model: Any, prompts: list[str]) -> list[str]:
        """Generate answers, each up to the end-of-text token or a blank line."""
        set_mode(model)
        base, filler, said = model.get_base_model(), self.tokenizer.eos_token_id, []
        for some in cut([self._prompt(prompt) for prompt in prompts], self.recipe.batch):
            ids, mask = left_padded(some, filler, self.device)
            start = ids.shape[1]
            made = base.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                pad_token_id=filler,
                logits_processor=self._rules(start),
                **self.recipe.decoding,
            )
            said += self.tokenizer.batch_decode(made[:, start:], skip_special_tokens=True)
        return [answer.strip().split("\n\n")[0].strip() for answer in said]

    def _batched(self, part: Part) -> list[Batch]:
        examples = self.examples[part]
        examples = shuffled(examples) if part == "train" else examples
        encoded = [(self._prompt(x.prompt), self._answer(x.answer)) for x in examples]
        return [right_padded(some, self.device) for some in cut(encoded, self.recipe.batch)]

    def _prompt(self, prompt: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(prompt)
        return ids + [self.tokenizer.eos_token_id] * self.recipe.separator

    def _answer(self, answer: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(answer, add_special_tokens=False)
        return [*ids, self.tokenizer.eos_token_id]

    def _rules(self, start: int) -> LogitsProcessorList:
        size = self.recipe.no_repeat
        return LogitsProcessorList([NoRepeats(size, start)] if size else [])


class NoRepeats(LogitsProcessor):
    """No n-gram twice in what is generated; transformers' own rule counts the prompt in.

    An answer has to name what its prompt names.
    """

    def __init__(self, size: int, start: int) -> None:
        self.rule, self.start = NoRepeatNGramLogitsProcessor(size), start

    def __call__(self, ids: Any, scores: Any) -> Any:
        return self.rule(ids[:, self.start :], scores)


def right_padded(
    examples: Sequence[tuple[list[int], list[int]]], device: torch.device | str = "cpu"
) -> Batch:
    """Prompts and answers in a row; a token never looks at the padding behind it: no mask."""
    longest = max(len(prompt) + len(answer) for prompt, answer in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    targets = torch.full_like(ids, IGNORE)
    for row, (prompt, answer) in enumerate(examples):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        targets[row, len(prompt) - 1 : end - 1] = torch.tensor(answer)
    return Batch(ids.to(device), targets.to(device))


def left_padded(
    prompts: Sequence[list[int]], filler: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Prompts that end together, and where they are not padding."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), filler)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
