"""axolotl, LLaMA-Factory v1 and ms-swift, by their calling conventions, reproduced from their sources.

axolotl 067b021c8b87a9e5e380b9173c704cf7340e30f5: src/axolotl/core/trainers/mixins/optimizer.py,
train.py (`post_trainer_create`). LLaMA-Factory ff6d4d12eeb035d6ce06805a5733dd7b29f2ac30:
src/llamafactory/v1/utils/plugin.py, core/base_trainer.py, config/training_args.py. ms-swift
3602360a562313afbf2ef6065fdf61f271a2c5b9: swift/trainers/mixin.py, swift/optimizers/base.py,
swift/utils/utils.py (`import_external_file`). axolotl 0.19.0, llamafactory 0.9.5 and ms-swift 4.6.0
themselves are tested where they are installed (`pip install --no-deps`, with what is then missing:
they pin other versions than this project's).
"""

import importlib
import re
import shlex
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from pages import HOW_TO, run
from tiny import PAIRS, adapted, batches, loss_on_all, same, sequences, trained

import rlora
import rlora.torch
from rlora.integrations.options import from_mapping, from_text, optimizer_names
from rlora.integrations.trainer import RLoraFactory

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)


def block(trainer, language):
    text = (HOW_TO / "trainers.md").read_text(encoding="utf-8").partition(f"## {trainer}\n")[2]
    return re.search(f"```{language}\n(.*?)```", text, re.DOTALL)[1]


def stand_in(monkeypatch, name, **content):
    """A module of a trainer, with the packages above it, for as long as a test runs."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    vars(sys.modules[name]).update(content)


def fresh(monkeypatch, name):
    """Our module anew, against the stand-ins; forgotten after the test."""
    monkeypatch.setitem(sys.modules, name, None)  # what was there comes back
    del sys.modules[name]
    return importlib.import_module(name)


def training_arguments(folder, **options):
    """Arguments of a short run on a CPU that reports to nobody."""
    from transformers import TrainingArguments

    quiet = {"report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}
    return TrainingArguments(str(folder), use_cpu=True, **quiet, **options)


def learns(model, optimizer):
    start = loss_on_all(model)
    for batch in batches():
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert loss_on_all(model) < start
    assert len(optimizer.report) == PAIRS


ARGS = SimpleNamespace(learning_rate=1e-2, weight_decay=0.05, optimizer=None, optim_args=None)


@pytest.mark.works("axolotl", "a plugin, also in its own trainer")
def test_axolotl(monkeypatch):
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    fresh(monkeypatch, "rlora.integrations.axolotl")
    config = yaml.safe_load(block("axolotl", "yaml"))
    module, _, name = config["plugins"][0].rpartition(".")
    plugin = getattr(sys.modules[module], name)()
    module, _, name = plugin.get_input_args().rpartition(".")
    checked = getattr(sys.modules[module], name)(rlora=config["rlora"])
    trainer = SimpleNamespace(optimizer_cls_and_kwargs=None)
    plugin.post_trainer_create(SimpleNamespace(rlora=checked.rlora), trainer)
    factory, options = trainer.optimizer_cls_and_kwargs
    model = adapted()
    optimizer = factory()(model, ARGS, **options)
    assert type(optimizer) is rlora.torch.ScaledAdamW
    first, second = optimizer.param_groups
    assert (first["lr"], first["weight_decay"], first["damping"]) == (1e-2, 0.05, 1e-3)
    assert (second["params"], second["weight_decay"]) == ([], 0.0)
    learns(model, optimizer)


def test_axolotl_itself(tmp_path):
    """axolotl 0.19.0, where it is installed: its plugins, its check of the YAML, its trainer."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("axolotl.core.trainers", exc_type=ImportError)
    from axolotl.core.trainers import AxolotlTrainer
    from axolotl.core.training_args import AxolotlTrainingArguments
    from axolotl.integrations.base import PluginManager
    from axolotl.integrations.config import merge_input_args
    from axolotl.utils.dict import DictDefault
    from datasets import Dataset

    config = yaml.safe_load(block("axolotl", "yaml"))
    plugins = PluginManager.get_instance()
    for name in config["plugins"]:
        plugins.register(name)
    _, schema = merge_input_args()  # the first asks what the GPU can do
    base = {"base_model": "tiny", "datasets": [{"path": "tiny", "type": "alpaca"}]}
    sizes = {"micro_batch_size": 8, "gradient_accumulation_steps": 1}
    checked = DictDefault(schema(**base, **sizes, **config).model_dump(exclude_none=True))
    assert checked.rlora == config["rlora"]
    arguments = AxolotlTrainingArguments(
        str(tmp_path),
        max_steps=8,
        learning_rate=checked.learning_rate,
        weight_decay=checked.weight_decay,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    model = adapted()
    before = loss_on_all(model)
    trainer = AxolotlTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(sequences()),
        data_collator=transformers.default_data_collator,
    )
    trainer.axolotl_cfg = checked
    plugins.post_trainer_create(checked, trainer)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is rlora.torch.ScaledAdamW
    assert len(optimizer.report) == PAIRS
    assert optimizer.param_groups[0]["initial_lr"] == 4e-3
    assert optimizer.param_groups[0]["damping"] == 1e-3
    assert loss_on_all(model) < before


@pytest.mark.works("LLaMA-Factory v1", "its optimizer plugins")
@pytest.mark.parametrize("place", ["optimizer", "optimizers.optimizer"])
def test_llama_factory(place, monkeypatch):
    registry = {}

    class OptimizerPlugin:
        def __init__(self, name):
            self.name = name

        def register(self):
            return lambda made: registry.setdefault(self.name, made)

    where = f"llamafactory.v1.plugins.trainer_plugins.{place}"
    stand_in(monkeypatch, where, OptimizerPlugin=OptimizerPlugin)
    fresh(monkeypatch, "rlora.integrations.llama_factory")
    assert registry.keys() == set(optimizer_names())
    config = yaml.safe_load(block("LLaMA-Factory", "yaml"))
    described = {**config["optim_config"], "lr": float(config["learning_rate"])}
    model = adapted()
    optimizer = registry[described["name"]](model, described)
    assert type(optimizer) is rlora.torch.ScaledAdamW
    (group,) = optimizer.param_groups
    assert (group["lr"], group["damping"], group["betas"]) == (4e-3, 1e-3, (0.7, 0.8))
    with pytest.raises(ValueError, match="no lr; write it under optim_config"):
        registry["ScaledAdamW"](model, config["optim_config"])
    prodigy = registry["ScaledProdigy"]
    assert prodigy(model, {"name": "ScaledProdigy"}).param_groups[0]["lr"] == 1.0
    assert prodigy(model, {"name": "ScaledProdigy", "lr": "1"}).param_groups[0]["lr"] == 1
    with pytest.raises(ValueError, match=r"expected learning_rate 1, got 0\.0001"):
        prodigy(model, {"name": "ScaledProdigy", "lr": "1e-4"})
    learns(model, optimizer)


def test_llama_factorys_own_plugins(monkeypatch):
    """llamafactory 0.9.5 itself, where it is installed, as `BaseTrainer._init_optimizer` calls it."""
    where = "llamafactory.v1.plugins.trainer_plugins.optimizer"
    plugins = pytest.importorskip(where, exc_type=ImportError)
    fresh(monkeypatch, "rlora.integrations.llama_factory")
    described = yaml.safe_load(block("LLaMA-Factory", "yaml"))["optim_config"]
    model = adapted()
    with pytest.raises(ValueError, match="no lr; write it under optim_config"):
        plugins.OptimizerPlugin(described["name"])(model, described)
    described["lr"] = 4e-3
    learns(model, plugins.OptimizerPlugin(described["name"])(model, described))


@pytest.mark.works("ms-swift", "`--external_plugins`, also by its own code")
def test_ms_swift(monkeypatch):
    class OptimizerCallback:
        def __init__(self, args, trainer):
            self.args, self.trainer = args, trainer

    known = {}
    stand_in(
        monkeypatch, "swift.optimizers", OptimizerCallback=OptimizerCallback, optimizers_map=known
    )
    from rlora.integrations.ms_swift import PLUGIN

    folder, _, file = PLUGIN.rpartition("/")
    monkeypatch.syspath_prepend(folder)
    fresh(monkeypatch, file.removesuffix(".py"))
    assert known.keys() == set(optimizer_names())
    words = shlex.split(block("ms-swift", "bash"))
    name, text = (words[words.index(w) + 1] for w in ("--optimizer", "--optim_args"))
    args = SimpleNamespace(**{**vars(ARGS), "optimizer": name, "optim_args": text})
    model = adapted()
    callback = known[name](args, SimpleNamespace(model=model))
    optimizer = callback.create_optimizer(model=None)
    optimizer.param_groups = [g for g in optimizer.param_groups if g["params"]]  # as it does
    assert type(optimizer) is rlora.torch.LoRARite
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-2, 0.05, (0.9, 0.99))
    learns(model, optimizer)


def test_ms_swift_itself(tmp_path):
    """ms-swift 4.6.0, where it is installed: its import of plugins, its arguments, its trainer."""
    pytest.importorskip("swift.trainers.mixin", exc_type=ImportError)
    from swift.optimizers import optimizers_map
    from swift.trainers import Trainer, TrainingArguments
    from swift.utils import import_external_file

    from rlora.integrations.ms_swift import PLUGIN

    import_external_file(PLUGIN)
    words = shlex.split(block("ms-swift", "bash"))
    options = dict(zip(words[2::2], words[3::2], strict=False))
    args = TrainingArguments(
        str(tmp_path),
        learning_rate=float(options["--learning_rate"]),
        weight_decay=float(options["--weight_decay"]),
        optimizer=words[words.index("--optimizer") + 1],
        optim_args=words[words.index("--optim_args") + 1],
        use_cpu=True,
        report_to=[],
    )
    trainer = Trainer.__new__(Trainer)  # its constructor wants a model of ms-swift's own hub
    trainer.model, trainer.args, trainer.is_deepspeed_enabled = adapted(), args, False
    trainer.optimizer_callback = optimizers_map[args.optimizer](args, trainer)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is rlora.torch.LoRARite
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-2, 0.05, (0.9, 0.99))
    learns(trainer.model, optimizer)


@pytest.mark.works("transformers Trainer", "`RLoraFactory`")
def test_the_factory_in_the_real_trainer_goes_on_from_its_adamw(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    arguments = training_arguments(tmp_path, max_steps=8, save_steps=4, learning_rate=1e-2)
    transformers.Trainer(adapted(), arguments, train_dataset=sequences()).train()
    choice = (RLoraFactory, {"lr": 1e-2})
    trainer = transformers.Trainer(
        adapted(), arguments, train_dataset=sequences(), optimizer_cls_and_kwargs=choice
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 8
    assert len(trainer.optimizer.optimizer.report) == PAIRS
    assert loss_on_all(trainer.model) < loss_on_all(adapted())


@pytest.mark.parametrize("norms", [[], ["input_layernorm"]], ids=["adapter", "and norms"])
def test_the_groups_of_the_factory_are_those_of_the_trainers_adamw(norms, tmp_path):
    """Trained norms have no decay, and those of a checkpoint's groups are kept."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    arguments = training_arguments(
        tmp_path, max_steps=4, save_steps=2, learning_rate=1e-2, weight_decay=0.1
    )
    plain = transformers.Trainer(
        adapted(modules_to_save=norms), arguments, train_dataset=sequences()
    )
    plain.train()
    choice = (RLoraFactory, {"lr": 1e-2})
    trainer = transformers.Trainer(
        adapted(modules_to_save=norms),
        arguments,
        train_dataset=sequences(),
        optimizer_cls_and_kwargs=choice,
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected, found = (
        [
            ([id_of[id(p)] for p in group["params"]], group["weight_decay"])
            for group in made.optimizer.param_groups
        ]
        for made, id_of in (
            (x.optimizer, {id(p): name for name, p in x.model.named_parameters()})
            for x in (plain, trainer)
        )
    )
    assert found == expected
    assert bool(found[1][0]) == bool(norms)


def test_the_trainers_of_the_page():
    space = run("trainers.md", "axolotl", {"model": adapted()})
    assert type(space["optimizer"]) is rlora.torch.LoRARite


def test_options_in_words():
    text = "damping=1e-3, betas=(0.7, 0.8),placement=both,fused=True,name='x'"
    assert from_text(text) == {
        "damping": 1e-3,
        "betas": (0.7, 0.8),
        "placement": "both",
        "fused": True,
        "name": "x",
    }
    assert from_text(None) == from_text(" ") == {}
    for wrong in ("damping", "1e-3", "a=1) or (b=2", "**x", "a=", "a=1;b=2", "a=1)(b=2"):
        with pytest.raises(ValueError, match="must be name=value"):
            from_text(wrong)
    with pytest.raises(ValueError, match="may be given once, got 'a' 2 times"):
        from_text("a=1, b=2, a=3")


@pytest.mark.parametrize("words", ["maximize=false", "maximize=False", "maximize=FALSE"])
def test_false_is_not_true(words):
    assert from_text(words) == {"maximize": False}


def test_words_of_yaml():
    expected = {"a": None, "b": None, "c": True, "d": "a-b"}
    assert from_text("a=none,b=null,c=true,d=a-b") == expected
    assert from_mapping({"betas": [0.9, 0.99]}) == {"betas": (0.9, 0.99)}


def test_a_factory_reads_words():
    """As text, "false" would be true, and the loss would rise."""
    model = adapted()
    learns(model, RLoraFactory()(model, optimizer="LoRARite", lr=1e-2, maximize="false"))


def test_a_factory_asks_for_the_rate_that_no_trainer_gives():
    """Transformers' Trainer calls its factory with the model and the options alone."""
    with pytest.raises(ValueError, match="its learning_rate and weight_decay would be ignored"):
        RLoraFactory()(adapted(), optimizer="LoRARite", weight_decay=0.1)


def test_a_class_that_finds_its_rate_is_not_multiplied_by_the_trainers():
    make = RLoraFactory()
    for args in (None, ARGS):
        groups = make(adapted(), args, optimizer="ScaledProdigy").param_groups
        assert [group["lr"] for group in groups] == [1.0, 1.0]
    (group, _) = make(adapted(), ARGS, optimizer="ScaledProdigy", lr="0.5").param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.05)


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(ValueError, match=r"no optimizer 'AdamW'; it has .*ScaledAdamW"):
        RLoraFactory()(torch.nn.Linear(2, 2), optimizer="AdamW")


@pytest.mark.works("LLaMA-Factory v0", "a callback, in the real Trainer below it; resume")
@pytest.mark.parametrize(
    ("kind", "frozen"), [("ScaledAdamW", None), ("LoRARite", None), ("ScaledAdamW", "lora_A")]
)
def test_the_callback_in_the_real_trainer(kind, frozen, tmp_path, monkeypatch):
    """The page's script, by v0's `run_exp(args, callbacks)`; the run is that of the factory."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    runs = []

    def trainer_of(folder, **changes):
        arguments = training_arguments(
            tmp_path / folder, max_steps=8, save_steps=4, learning_rate=1e-2, weight_decay=0.05
        )
        model = adapted()
        for name, p in model.named_parameters():
            if frozen and frozen in name:
                p.requires_grad_(False)
        return transformers.Trainer(model, arguments, train_dataset=sequences(), **changes)

    def run_exp(args=None, callbacks=None):
        trainer = trainer_of("ours", callbacks=callbacks)
        trainer.train(resume_from_checkpoint=args)
        runs.append(trainer)

    stand_in(monkeypatch, "llamafactory.train.tuner", run_exp=run_exp)
    space = run("trainers.md", "LLaMA-Factory", {}, kind)
    assert type(runs[0].optimizer.optimizer) is getattr(rlora.torch, kind)
    assert len(runs[0].optimizer.optimizer.report) == PAIRS
    chosen = {"optimizer": kind, "lr": 1e-2, "weight_decay": 0.05, **space["options"]}
    choice = (RLoraFactory, chosen)
    reference = trainer_of("reference", optimizer_cls_and_kwargs=choice)
    reference.train()
    assert same(trained(runs[0].model), trained(reference.model))
    checkpoint = str(tmp_path / "ours" / "checkpoint-4")
    if kind == "LoRARite" or frozen:  # the Trainer loads it into its AdamW before any callback
        with pytest.raises((KeyError, ValueError), match=r"step|size of optimizer's group"):
            run_exp(checkpoint, [space["callback"]])
        return
    run_exp(checkpoint, [space["callback"]])
    assert runs[1].state.global_step == 8
    assert same(trained(runs[1].model), trained(runs[0].model))


@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_the_callback_refuses_what_the_trainer_has(option):
    pytest.importorskip("transformers", minversion="5.0")
    from rlora.integrations.trainer_callback import OptimizerCallback

    with pytest.raises(ValueError, match=f"^{option} would be ignored"):
        OptimizerCallback(**{option: 0.1})


def test_the_callback_refuses_a_rate_that_would_multiply_the_one_found(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from rlora.integrations.trainer_callback import OptimizerCallback

    def train(rate):
        arguments = training_arguments(
            tmp_path, max_steps=4, learning_rate=rate, warmup_steps=2, save_strategy="no"
        )
        callback = OptimizerCallback("ScaledProdigy")
        trainer = transformers.Trainer(
            adapted(), arguments, train_dataset=sequences(), callbacks=[callback]
        )
        trainer.train()
        return trainer.optimizer.optimizer

    with pytest.raises(ValueError, match=r"expected learning_rate 1, got 0\.0001"):
        train(1e-4)
    assert type(train(1.0)) is rlora.torch.ScaledProdigy


def test_the_callback_keeps_what_a_schedule_has_put_into_the_groups(tmp_path):
    """OneCycleLR keeps its three rates there."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from rlora.integrations.trainer_callback import OptimizerCallback

    class Trainer(transformers.Trainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            made = optimizer or self.optimizer
            cycle = torch.optim.lr_scheduler.OneCycleLR(made, 1e-2, total_steps=6)
            self.lr_scheduler = cycle
            return cycle

    arguments = training_arguments(tmp_path, max_steps=4, save_steps=2)
    for checkpoint, damping in ((None, 1e-2), (str(tmp_path / "checkpoint-2"), 0.5)):
        callback = OptimizerCallback(damping=damping)
        trainer = Trainer(adapted(), arguments, train_dataset=sequences(), callbacks=[callback])
        trainer.train(resume_from_checkpoint=checkpoint)
        (group, _) = trainer.optimizer.optimizer.param_groups
        assert group["max_lr"] == 1e-2
        assert group["lr"] == trainer.lr_scheduler.get_last_lr()[0] < 1e-2
        assert group["betas"][0] > 0.85  # the momentum cycles too
        assert group["damping"] == damping  # the callback's, not the checkpoint's


def test_the_callback_takes_a_schedule_over_the_bare_optimizer_along():
    """Accelerate's wrapper hands it on by itself."""
    pytest.importorskip("transformers", minversion="5.0")
    from rlora.integrations.trainer_callback import OptimizerCallback

    model = adapted()
    plain = torch.optim.Adadelta([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(plain, lambda step: 0.5**step)
    prepared = SimpleNamespace(optimizer=plain, scaler=None)
    OptimizerCallback().on_train_begin(
        None, None, None, model=model, optimizer=prepared, lr_scheduler=schedule
    )
    assert schedule.optimizer is prepared.optimizer is not plain
    (group,) = prepared.optimizer.param_groups
    assert group["initial_lr"] == 1e-3
    assert "rho" not in group  # Adadelta's own


def test_the_callback_refuses_a_step_that_is_not_the_optimizers():
    pytest.importorskip("transformers", minversion="5.0")
    from rlora.integrations.trainer_callback import OptimizerCallback

    model = adapted()
    plain = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    strange = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    for optimizer in (
        SimpleNamespace(optimizer=plain, scaler=object()),
        SimpleNamespace(optimizer=strange, scaler=None),
        plain,
    ):
        with pytest.raises(TypeError, match="without DeepSpeed"):
            OptimizerCallback().on_train_begin(None, None, None, model=model, optimizer=optimizer)
