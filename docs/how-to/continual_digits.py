"""Class-incremental learning on handwritten digits: sequential LoRA beside SD-LoRA.

Five tasks of two digits each, one after the other, without any data of the tasks before. The
backbone has seen other digits, turned by a quarter, and is frozen; low-rank adapters and one head
over all ten classes are trained. Everything but the method depends on the seed alone.

    python docs/how-to/continual_digits.py            # less than a minute on one core
    python docs/how-to/continual_digits.py --quick    # a few seconds
    python docs/how-to/continual_digits.py --sweep    # how the learning rates were chosen
"""

import argparse
import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from statistics import mean, stdev

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from rlora.torch import ScaledSGD
from rlora.torch.init.sd_lora import SDLoRALinear, add_sd_lora, parameter_groups

TASKS, WIDTH, RANK, BATCH, MOMENTUM = 5, 128, 8, 32, 0.9
HEAD_LR = 0.01  # of the head and of the magnitudes, for every method
SWEEP = (0.003, 0.005, 0.01, 0.02, 0.03)
TUNING_SEEDS = range(100, 106)  # none of them is reported
QUICK = range(3), 8  # seeds, epochs


@dataclass(frozen=True)
class Method:
    """A way to train the tasks: trained parameters, loss and optimizer."""

    name: str
    lr: float  # of the pairs, chosen by --sweep
    new_pair: bool = False  # SD-LoRA: freeze the direction after each task
    published: bool = False  # one magnitude a task for all layers, all 0.8 again in each task
    scaled: bool = False  # ScaledSGD on the current pair
    all_seen: bool = False  # cross-entropy over all classes seen, not over the task's own
    joint: bool = False  # all data at once: what forgetting is measured against


METHODS = (
    Method("head only, no adapter", 0.0),
    Method("LoRA, loss over all classes seen", 0.003, all_seen=True),
    Method("SD-LoRA, loss over all classes seen", 0.003, all_seen=True, new_pair=True),
    Method("LoRA", 0.005),
    Method("LoRA, ScaledSGD", 0.005, scaled=True),
    Method("SD-LoRA, magnitudes as published", 0.02, new_pair=True, published=True),
    Method("SD-LoRA", 0.02, new_pair=True),
    Method("SD-LoRA, ScaledSGD", 0.005, new_pair=True, scaled=True),
    Method("LoRA, all tasks at once", 0.03, joint=True),
)


# ---------------------------------------------------------------- data and backbone


@dataclass(frozen=True)
class Problem:
    """Digits of one seed, and a backbone pretrained on others of them."""

    x: Tensor
    y: Tensor
    train: Tensor  # indices
    test: Tensor
    tasks: list[list[int]]  # the classes of each
    backbone: nn.Module


@cache
def make_problem(seed: int) -> Problem:
    """600 images, turned, for the backbone; 800 to train and 397 to test; classes in any order."""
    digits = load_digits()
    x = torch.tensor(digits.images / 16 - 0.3, dtype=torch.float32)
    y = torch.tensor(digits.target)
    torch.manual_seed(seed)
    pretrain, train, test = torch.randperm(len(x)).split([600, 800, len(x) - 1400])
    order = torch.randperm(10).tolist()
    size = 10 // TASKS
    tasks = [order[i : i + size] for i in range(0, 10, size)]
    return Problem(x, y, train, test, tasks, make_backbone(x[pretrain], y[pretrain]))


def make_backbone(x: Tensor, y: Tensor) -> nn.Module:
    """Two hidden layers that tell digits turned to the left or right apart."""
    first, second = nn.Linear(64, WIDTH), nn.Linear(WIDTH, WIDTH)
    body = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), nn.LayerNorm(WIDTH))
    model = nn.Sequential(body, nn.Linear(WIDTH, 10))
    x, y = torch.cat([torch.rot90(x, turns, (1, 2)) for turns in (1, 3)]), y.repeat(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(40):
        for batch in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return body.requires_grad_(False)


# ---------------------------------------------------------------- one run


def run(problem: Problem, method: Method, seed: int, epochs: int) -> tuple[float, float]:
    """Average accuracy after the last task, and forgetting."""
    torch.manual_seed(1000 + seed)
    model = nn.Sequential(copy.deepcopy(problem.backbone), nn.Linear(WIDTH, 10))
    layers = add_sd_lora(model, RANK, ["0.1", "0.3"], share_magnitudes=method.published)
    if not method.new_pair:  # plain LoRA: one pair, and a scaling that is no parameter
        for layer in layers:
            layer.magnitudes.requires_grad_(False)
    tasks = [list(chain(*problem.tasks))] if method.joint else problem.tasks
    accuracy: list[list[float]] = []
    for t, classes in enumerate(tasks):
        if t and method.new_pair:
            next_task(layers, method)
        seen = list(chain(*tasks[: t + 1]))
        train(model, problem, classes, seen if method.all_seen else classes, method, epochs)
        accuracy.append(evaluate(model, problem, seen, tasks[: t + 1]))
    last = accuracy[-1]
    lost = [max(row[j] for row in accuracy[j:-1]) - last[j] for j in range(len(tasks) - 1)]
    return mean(last), mean(lost or [0.0])


def next_task(layers: list[SDLoRALinear], method: Method) -> None:
    for layer in layers:
        layer.next_task()
    if method.published:
        for magnitude in layers[0].magnitudes:
            magnitude.data.fill_(layers[0].alpha)


def make_optimizer(model: nn.Module, method: Method) -> torch.optim.Optimizer:
    groups = parameter_groups(model, method.lr, magnitude_lr=HEAD_LR, rest_lr=HEAD_LR)
    if method.scaled:
        return ScaledSGD(groups, momentum=MOMENTUM, damping_mode="covariant", damping=1e-2)
    return torch.optim.SGD(groups, lr=method.lr, momentum=MOMENTUM)


def train(
    model: nn.Module, problem: Problem, classes: list[int], among: list[int], method: Method,
    epochs: int,
) -> None:  # fmt: skip
    """SGD with momentum, the learning rate divided by ten after one half and three quarters."""
    optimizer = make_optimizer(model, method)
    drops = [epochs // 2, epochs * 3 // 4]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, gamma=0.1)
    indices, shut = choose(problem.train, problem.y, classes), shut_out(among)
    for _ in range(epochs):
        for batch in indices[torch.randperm(len(indices))].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(problem.x[batch]) + shut, problem.y[batch]).backward()
            optimizer.step()
        schedule.step()


@torch.no_grad()
def evaluate(
    model: nn.Module, problem: Problem, seen: list[int], tasks: list[list[int]]
) -> list[float]:
    """Accuracy on each task so far, of one head that chooses among all classes seen."""
    right = (model(problem.x) + shut_out(seen)).argmax(1) == problem.y
    parts = [choose(problem.test, problem.y, classes) for classes in tasks]
    return [right[part].double().mean().item() for part in parts]


def choose(indices: Tensor, y: Tensor, classes: list[int]) -> Tensor:
    return indices[torch.isin(y[indices], torch.tensor(classes))]


def shut_out(classes: list[int]) -> Tensor:
    """A mask that, added to the logits, leaves only these classes."""
    logits = torch.full((10,), -torch.inf)
    logits[classes] = 0.0
    return logits


# ---------------------------------------------------------------- report

Results = dict[str, list[tuple[float, float]]]


def compare(methods: Iterable[Method], seeds: Iterable[int], epochs: int) -> Results:
    """(accuracy, forgetting) of each method for each seed: the same problems for all."""
    return {
        method.name: [run(make_problem(seed), method, seed, epochs) for seed in seeds]
        for method in methods
    }


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}"


def table(methods: Iterable[Method], results: Results) -> Table:
    view = Table(title="Mean ± standard deviation over the seeds")
    for heading in ("method", "lr", "accuracy", "forgetting", "accuracy - LoRA's", "wins"):
        view.add_column(heading, justify="left" if heading == "method" else "right")
    plain = [accuracy for accuracy, _ in results["LoRA"]]
    for method in methods:
        accuracy, forgetting = map(list, zip(*results[method.name], strict=True))
        ahead = [a - b for a, b in zip(accuracy, plain, strict=True)]
        wins = f"{sum(d > 0 for d in ahead)}/{len(ahead)}"
        row = [spread(accuracy), "" if method.joint else spread(forgetting)]
        row += ["", ""] if method.name == "LoRA" else [spread(ahead), wins]
        view.add_row(method.name, f"{method.lr:g}" if method.lr else "", *row)
    return view


def sweep(epochs: int) -> Iterator[str]:
    """Accuracy for each learning rate of the pairs, on seeds that are not reported."""
    for method in METHODS[1:]:
        tried = tuple(replace(method, name=f"{lr:g}", lr=lr) for lr in SWEEP)
        results = compare(tried, TUNING_SEEDS, epochs)
        figures = {lr: mean(a for a, _ in runs) for lr, runs in results.items()}
        yield f"{method.name}: " + "  ".join(f"{lr}: {x:.3f}" for lr, x in figures.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0; at least 2")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="three seeds, fewer epochs")
    parser.add_argument("--sweep", action="store_true", help="print the choice of learning rates")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=110)
    if options.sweep:
        for line in sweep(options.epochs):
            console.print(line, highlight=False)
        return
    seeds, epochs = QUICK if options.quick else (range(options.seeds), options.epochs)
    console.print(table(METHODS, compare(METHODS, seeds, epochs)))


if __name__ == "__main__":
    main()
