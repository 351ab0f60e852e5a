"""TRL's SFTTrainer, by the ways that docs/how-to/trainers.md shows, on a tiny Llama and made-up text."""

import inspect

import pytest
import torch
from pages import HOW_TO, sections
from tiny import PAIRS, adapted, base, lora, same, trained

import rlora.torch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytest.importorskip("peft")

PAGE = "trainers.md"
OF_THE_PAGE = sections(PAGE)["TRL"]
ADAPTED = """
import rlora.torch
from trl import SFTTrainer
optimizer = rlora.torch.ScaledAdamW(adapted, lr=4e-3)
trainer = SFTTrainer(
    adapted,
    arguments,
    train_dataset=dataset,
    processing_class=tokenizer,
    optimizers=(optimizer, None),
)
trainer.train(resume_from_checkpoint=checkpoint)
"""
STEPS = 20
MOMENTS = ("exp_avg", "mu", "nu")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* is deprecated and will be removed in v6:FutureWarning",
)


def tokenizer():
    """A word for each of twelve numbers, and the special tokens of the tiny model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(12))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def dataset():
    lines = [" ".join(f"w{(i + j * (1 + i % 3)) % 12}" for j in range(10)) for i in range(64)]
    return datasets.Dataset.from_list([{"text": line} for line in lines])


def arguments_of(folder, **changes):
    options = {
        "max_steps": STEPS,
        "save_steps": 10,
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "report_to": [],
        "disable_tqdm": True,
        "lr_scheduler_type": "cosine",
    }
    return trl.SFTConfig(folder, **(options | changes))


def train(way, kind, folder, checkpoint=None, model=None, **changes):
    space = {
        "model": base() if model is None else model,
        "adapted": adapted(),
        "peft_config": lora(),
        "arguments": arguments_of(folder, **changes),
        "dataset": dataset(),
        "tokenizer": tokenizer(),
        "checkpoint": checkpoint,
    }
    exec(way.replace("ScaledAdamW", kind), space)
    return space["trainer"]


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["ScaledAdamW", "LoRARite"])
@pytest.mark.parametrize("way", [OF_THE_PAGE, ADAPTED], ids=["by class", "adapted"])
@pytest.mark.works("TRL SFTTrainer", "with peft_config or an adapted model; resume bit for bit")
def test_the_loss_falls_on_the_schedule_and_a_checkpoint_resumes_bit_for_bit(way, kind, tmp_path):
    trainer = train(way, kind, tmp_path)
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is getattr(rlora.torch, kind)
    assert len(optimizer.report) == PAIRS
    assert sum(losses(trainer)[-5:]) < 0.9 * sum(losses(trainer)[:5])
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    half = [4e-3 * (1 + torch.cos(torch.tensor(torch.pi * t / STEPS))) / 2 for t in range(STEPS)]
    assert rates == pytest.approx([float(x) for x in half], abs=1e-8)  # the log rounds
    resumed = train(way, kind, tmp_path, str(tmp_path / "checkpoint-10"))
    assert resumed.state.global_step == STEPS
    assert same(trained(resumed.model), trained(trainer.model))


@pytest.mark.works("TRL SFTTrainer", "its own AdamW's checkpoint goes on")
def test_the_checkpoint_of_its_own_adamw_goes_on(tmp_path):
    """`RLoraFactory` makes two groups, as SFTTrainer's AdamW has; its options come from the file."""
    from rlora.integrations.trainer import RLoraFactory

    def trainer_of(**changes):
        return trl.SFTTrainer(
            base(),
            arguments_of(tmp_path, learning_rate=1e-2),
            train_dataset=dataset(),
            processing_class=tokenizer(),
            peft_config=lora(),
            **changes,
        )

    trainer_of().train()
    trainer = trainer_of(optimizer_cls_and_kwargs=(RLoraFactory, {"lr": 4e-3}))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert trainer.state.global_step == STEPS
    optimizer = trainer.optimizer.optimizer
    assert len(optimizer.report) == PAIRS
    assert [g["betas"] for g in optimizer.param_groups] == [(0.9, 0.999)] * 2
    assert {int(s["step"]) for s in optimizer.state.values()} == {STEPS}
    assert sum(losses(trainer)[-5:]) < sum(losses(trainer)[:5])


def test_the_trainers_that_take_a_class_are_those_of_the_page():
    """All six take an optimizer; two take `optimizer_cls_and_kwargs`."""
    text = " ".join((HOW_TO / PAGE).read_text(encoding="utf-8").split())
    assert "Only `SFTTrainer` and `RewardTrainer` take it. For DPO, KTO, GRPO and RLOO" in text
    takes = {"SFT": True, "Reward": True, "DPO": False, "KTO": False, "GRPO": False, "RLOO": False}
    for name, by_class in takes.items():
        options = inspect.signature(getattr(trl, f"{name}Trainer")).parameters
        assert {"optimizers", "peft_config"} <= options.keys()
        assert ("optimizer_cls_and_kwargs" in options) is by_class


@pytest.mark.parametrize("kind", ["ScaledAdamW", "LoRARite"])
def test_trls_own_defaults(kind, tmp_path):
    """bfloat16 autocast, packed sequences, accumulated gradients."""
    trainer = train(
        OF_THE_PAGE,
        kind,
        tmp_path,
        bf16=True,
        packing=True,
        packing_strategy="wrapped",
        max_length=16,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    assert sum(losses(trainer)[-5:]) < 0.9 * sum(losses(trainer)[:5])


@pytest.mark.parametrize("kind", ["ScaledAdamW", "LoRARite"])
@pytest.mark.works("TRL SFTTrainer", "a base in 4 bits")
def test_a_base_in_four_bits(kind, tmp_path):
    """TRL's adapter of it is bfloat16, the moments are float32; PEFT loads it back as float32."""
    pytest.importorskip("bitsandbytes", minversion="0.50")  # from then on it runs on a CPU
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base(width=64).save_pretrained(tmp_path / "base")
    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    dtypes = [torch.bfloat16, torch.float32]
    for checkpoint, dtype in zip((None, str(tmp_path / "checkpoint-10")), dtypes, strict=True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=bits)
        trainer = train(OF_THE_PAGE, kind, tmp_path, checkpoint, model=model, bf16=True)
        assert len(trainer.optimizer.optimizer.report) == PAIRS
        assert {p.dtype for p in trained(trainer.model).values()} == {dtype}
        assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]
        for state in trainer.optimizer.state_dict()["state"].values():
            assert all(x.dtype == torch.float32 for k, x in state.items() if k.startswith(MOMENTS))
