"""Models of the workloads' architectures with weights drawn at random, and data to train them on."""

import json

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

END = "<|endoftext|>"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())

PLACES = ["Eagle", "Mill", "Wrestlers", "Vaults", "Giraffe", "Cocum"]
FOODS = ["French", "Thai", "Greek"]


def write_table(path, rows):
    """As JSON lines, TSV or CSV, by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    mark, quote = ("\t", "") if path.suffix == ".tsv" else (",", '"')
    table = [list(rows[0]), *(row.values() for row in rows)]
    path.write_text("".join(mark.join(f"{quote}{x}{quote}" for x in row) + "\n" for row in table))
    return path


def byte_tokenizer(folder):
    """A token for each byte, as GPT-2 spells them, and one for the end of a text."""
    vocabulary = {token: i for i, token in enumerate([END, *ALPHABET])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)
    tokenizer.save_pretrained(folder)
    return tokenizer


def e2e(folder):
    """Three CSV files; two of the test's three rows are of one restaurant."""
    pairs = [(place, food) for place in PLACES for food in FOODS]
    rows = [
        {"mr": f"name[{p}], eatType[pub], food[{f}]", "ref": f"{p} has {f} food."} for p, f in pairs
    ]
    other = {"mr": rows[0]["mr"], "ref": "The Eagle is a pub, and it cooks French."}
    write_table(folder / "trainset.csv", rows[2:16])
    write_table(folder / "devset.csv", rows[16:])
    write_table(folder / "testset_w_refs.csv", [rows[0], other, rows[1]])
    return folder


def gpt2(folder, taught):
    """GPT-2 that knows these texts by heart, (prompt, answer) each."""
    tokenizer = byte_tokenizer(folder)
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
    drop = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size, **drop, **ends))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    known = [len(tokenizer(f"{prompt}{END}").input_ids) for prompt, _ in taught]
    texts = [tokenizer(f"{prompt}{END}{answer}{END}").input_ids for prompt, answer in taught]
    for _ in range(80):
        for start, ids in zip(known, texts, strict=True):
            labels = [-100] * start + ids[start:]
            model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def mistral(folder):
    """Two layers, wide enough for blocks of 64 weights."""
    tokenizer = byte_tokenizer(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    MistralForCausalLM(
        MistralConfig(vocab_size=len(tokenizer), **size, **heads, **ends)
    ).save_pretrained(folder)
    return folder


def sums(folder):
    """School mathematics."""
    rows = [
        {"question": f"What is {a} and {b}?", "answer": f"It is {a + b}.\n#### {a + b}"}
        for a in range(4)
        for b in range(5)
    ]
    write_table(folder / "train.jsonl", rows[:-2])
    write_table(folder / "test.jsonl", rows[-2:])
    return folder


def clip_tokenizer():
    """A token for each byte within a word and at its end."""
    tokens = [*ALPHABET, *(f"{x}</w>" for x in ALPHABET), "<|startoftext|>", END]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=24
    )


def clip_text(tokenizer):
    """Configuration of CLIP's text encoder."""
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 24,
        "num_attention_heads": 2,
        "pad_token_id": tokenizer.eos_token_id,
        **size,
        **ids,
    }


def stable_diffusion(folder, prediction="epsilon"):
    """Latents of 8 x 8, pictures of 16 x 16."""
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, norm_num_groups=2, block_out_channels=(4, 8),
        cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4), norm_num_groups=2, sample_size=16,
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
        steps_offset=1, prediction_type=prediction,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=autoencoder, unet=unet, scheduler=scheduler, tokenizer=tokenizer,
        text_encoder=CLIPTextModel(CLIPTextConfig(**clip_text(tokenizer))),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def concept(folder, count=5, seed=0):
    """Pictures of one colour with a little noise, not square, and their captions."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    colour, rows = rng.integers(0, 200, 3), []
    for i in range(count):
        pixels = colour + rng.integers(0, 50, (20, 24, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"a photo of {folder.name}"})
    write_table(folder / "metadata.jsonl", rows)
    return folder
