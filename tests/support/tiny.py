"""A tiny Llama with a PEFT adapter, and sequences that it can learn, made without a download."""

import torch

VOCABULARY = 16
PAIRS = 14  # every linear layer of the two decoder layers


def base(seed=0, width=16):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.2,  # a base whose features are worth adapting
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def lora(**options):
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)


def adapted(seed=0, **options):
    from peft import get_peft_model

    return get_peft_model(base(seed), lora(**options))


def sequences(count=64, length=12):
    """Every token is the last one plus a step that the sequence keeps."""
    rows = [[(i + j * (1 + i % 3)) % VOCABULARY for j in range(length)] for i in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def batches(size=8):
    """The sequences as batches of tensors."""
    rows = torch.tensor([row["input_ids"] for row in sequences()])
    return [{"input_ids": part, "labels": part} for part in rows.split(size)]


def loss_on_all(model):
    rows = torch.tensor([row["input_ids"] for row in sequences()])
    with torch.no_grad():
        return float(model(input_ids=rows, labels=rows).loss)


def trained(model):
    """The parameters that training moves, by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
