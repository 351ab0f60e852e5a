"""tunix by its calling conventions, on adapters that qwix makes, as there.

google/tunix c7d8950f12a9c55a976bf2e1a0d8b447d71c20b3: `_extract_kwargs` and `create_optimizer` of
tunix/cli/config.py, `PeftTrainer.__init__`, `_train_step` and `_opt_state_dtypes` of
tunix/sft/peft_trainer.py. The last test is of google-tunix 0.1.7 itself, where it is installed.
"""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from pages import HOW_TO

import rlora
import rlora.optax

nnx = pytest.importorskip("flax.nnx")
optax = pytest.importorskip("optax")
qwix = pytest.importorskip("qwix")

pytestmark = [  # qwix 0.1.8 calls flax 0.12 by old names
    pytest.mark.filterwarnings("ignore:The 'm.iter_modules:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'.value' access:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning"),
]


class Net(nnx.Module):
    """An einsum over heads and a linear layer."""

    def __init__(self, rngs):
        self.q = nnx.Einsum("TD,DNH->TNH", (8, 2, 4), rngs=rngs)
        self.up = nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x):
        heads = nnx.tanh(self.q(x))
        return self.up(heads.reshape(len(x), -1))


X = jnp.asarray(np.random.default_rng(0).standard_normal((32, 8)), jnp.float32)
Y = X[:, :6] ** 2


def adapted():
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=4.0)
    return qwix.apply_lora_to_model(Net(nnx.Rngs(0)), provider, X, rngs=nnx.Rngs(1))


@pytest.fixture
def registered(monkeypatch):
    """Our names in optax, for as long as a test runs."""
    names = [name for name in rlora.optax.__all__ if not hasattr(optax, name)]
    assert names == rlora.optax.__all__  # none is optax's
    for name in names:  # so that they are taken out again
        monkeypatch.setattr(optax, name, None, raising=False)
        monkeypatch.delattr(optax, name)
    import importlib

    module = importlib.import_module("rlora.integrations.tunix")
    importlib.reload(module)
    return names


def extract_kwargs(function, config, learning_rate=None):
    options = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in config:
            options[name] = config[name]
        elif learning_rate is not None and name == "learning_rate":
            options[name] = learning_rate
        else:
            assert parameter.default is not parameter.empty, f"tunix finds {name} missing"
    return options


def create_optimizer(config):
    """As tunix's config makes it, with the keys that the function has, under inject_hyperparams."""
    function = getattr(optax, config["opt_type"].lower())
    rate = config.get("learning_rate")
    if "schedule_type" in config:
        schedule = getattr(optax.schedules, config["schedule_type"])
        rate = schedule(**extract_kwargs(schedule, config))
    options = extract_kwargs(function, config, rate)
    return optax.inject_hyperparams(function, hyperparam_dtype=jnp.float32)(**options)


def trains(model, transformation, kind, steps=30, accumulated=None):
    """The trainer's optimizer, its jitted step; losses before and after."""
    if accumulated is not None:
        transformation = optax.MultiSteps(transformation, accumulated)
    optimizer = nnx.Optimizer(model, transformation, wrt=kind)
    for leaf in jax.tree.leaves(
        nnx.state(optimizer, nnx.optimizer.OptState), is_leaf=lambda x: isinstance(x, nnx.Variable)
    ):
        assert leaf.get_value().dtype is not None  # it restores the dtypes after every step

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(X) - Y) ** 2)

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, kind))(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(steps)]
    return optimizer, losses


def described():
    text = (HOW_TO / "trainers.md").read_text(encoding="utf-8").partition("## tunix\n")[2]
    return yaml.safe_load(re.search("```yaml\n(.*?)```", text, re.DOTALL)[1])["optimizer_config"]


@pytest.mark.works("tunix", "`opt_type` by name, its trainer's step on qwix's adapters")
def test_by_name(registered):
    config = described()
    model = adapted()
    optimizer, losses = trains(model, create_optimizer(config), nnx.LoRAParam)
    assert losses[-1] < 0.97 * losses[0]
    rate = optimizer.opt_state.hyperparams["learning_rate"]
    assert float(rate[...]) == pytest.approx(config["learning_rate"])
    by_hand = rlora.optax.scaled_adamw(
        **{k: v for k, v in config.items() if k != "opt_type"},
    )
    twin = adapted()
    _, expected = trains(twin, by_hand, nnx.LoRAParam)
    # the same numbers, as float32 arrays in one and as Python's in the other
    assert losses == pytest.approx(expected, rel=1e-4)


def scheduled():
    """The page's config on a schedule; tunix would take a `learning_rate` before it."""
    config = {k: v for k, v in described().items() if k != "learning_rate"}
    return {**config, "schedule_type": "linear_schedule", **SCHEDULE}


SCHEDULE = {"init_value": 1e-2, "end_value": 0.0, "transition_steps": 4}


def factors(model):
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))]


@pytest.mark.works("tunix", "schedules and gradient accumulation")
def test_a_schedule_of_the_config(registered):
    """At its end, where the rate is 0, nothing moves."""
    model = adapted()
    optimizer, _ = trains(model, create_optimizer(scheduled()), nnx.LoRAParam, steps=4)
    assert float(optimizer.opt_state.hyperparams["learning_rate"][...]) == pytest.approx(2.5e-3)
    twin = adapted()
    trains(twin, create_optimizer(scheduled()), nnx.LoRAParam, steps=6)
    for x, y, start in zip(factors(model), factors(twin), factors(adapted()), strict=True):
        np.testing.assert_array_equal(x, y)
        assert (x != start).any()


def test_accumulated_gradients(registered):
    """Twice the same batch is that batch."""
    model, twin = adapted(), adapted()
    trains(model, create_optimizer(described()), nnx.LoRAParam, steps=5)
    trains(twin, create_optimizer(described()), nnx.LoRAParam, steps=10, accumulated=2)
    for x, y in zip(factors(model), factors(twin), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)  # float32, another program


def test_every_method_has_a_learning_rate_and_no_other_key_that_must_be_given(registered):
    """`_extract_kwargs` refuses a function with ``**options``, or with one more key to be given."""
    for name in registered:
        parameters = inspect.signature(getattr(optax, name)).parameters
        must = [n for n, p in parameters.items() if p.default is p.empty]
        if name not in ("scale_by_gram", "transformation"):  # pieces for chains
            assert must == ["learning_rate"], name


@pytest.mark.refuses("tunix", "a model without adapters")
def test_a_model_without_adapters(registered):
    with pytest.raises(rlora.PairingError):
        trains(Net(nnx.Rngs(0)), create_optimizer(described()), nnx.Param)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jax, about what tunix calls
@pytest.mark.parametrize("accumulated", [None, 2])
def test_tunix_itself(registered, accumulated):
    """Its config and its trainer, for as many steps as the schedule has, and two without a rate."""
    hyperparameters = pytest.importorskip("tunix.cli.config", exc_type=ImportError).HyperParameters
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

    config = object.__new__(hyperparameters)  # without reading files and a command line
    config.config = {"optimizer_config": scheduled()}
    model, twin = adapted(), adapted()
    trainer = PeftTrainer(
        model,
        config.create_optimizer("optimizer_config"),
        TrainingConfig(
            eval_every_n_steps=100, max_steps=6, gradient_accumulation_steps=accumulated
        ),
    )
    trainer.with_gen_model_input_fn(lambda batch: batch)
    trainer.with_loss_fn(lambda model, x, y: jnp.mean((model(x) - y) ** 2))
    trainer.train([{"x": X, "y": Y}] * 6 * (accumulated or 1))
    trains(twin, create_optimizer(scheduled()), nnx.LoRAParam, steps=4)
    for x, y in zip(factors(model), factors(twin), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)  # float32, another program
