"""Time of finding the pairs, once, at construction."""

from types import SimpleNamespace

from .common import Suite, attribute, titled

MODULES = 1000
RANK, WIDTH = 4, 8


class TimeFindPairs(Suite):
    """A thousand adapted modules: as names with shapes, and as a torch model."""

    repeat = (5, 50, 0.6)
    param_names = ("source",)
    params = (("names", "torch model"),)

    def prepare(self, source: str) -> None:
        if source == "names":
            self.find, self.given = attribute("rlora", "find_pairs"), names()
        else:
            self.find, self.given = attribute("rlora.torch", "find_pairs"), model()
        assert len(self.find(self.given)) == MODULES  # noqa: S101

    @titled("Find the pairs of 1000 modules")
    def time_find_pairs(self, source: str) -> None:
        self.find(self.given)


def names() -> list[tuple[str, SimpleNamespace]]:
    """Names as PEFT gives them, the adapted weight between its factors."""
    sizes = {
        "base_layer": (WIDTH, WIDTH), "lora_A.default": (RANK, WIDTH),
        "lora_B.default": (WIDTH, RANK),
    }  # fmt: skip
    return [
        (f"base_model.model.layers.{i}.proj.{part}.weight", SimpleNamespace(shape=shape))
        for i in range(MODULES)
        for part, shape in sizes.items()
    ]


def model() -> object:
    """The same as a tree of torch modules."""
    attribute("torch", "nn")
    from torch import nn

    def layer() -> nn.Module:
        module = nn.Module()
        module.base_layer = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        module.lora_A = nn.ModuleDict({"default": nn.Linear(WIDTH, RANK, bias=False)})
        module.lora_B = nn.ModuleDict({"default": nn.Linear(RANK, WIDTH, bias=False)})
        return module

    return nn.Sequential(*(layer() for _ in range(MODULES)))
