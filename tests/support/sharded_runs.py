"""Code for the processes of tests/distributed: one training, sharded in many ways."""

import copy
import io

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models import METHODS, LoRALinear
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import rlora.torch
from rlora.core import dispatch
from rlora.core.errors import ShardingError
from rlora.torch import (
    AltLoRAPlus,
    GraftAdamW,
    LoRAFA,
    LoRAMuon,
    LoRAProAdamW,
    LoRARite,
    RefLoRA,
    Riemannion,
    ScaledAdamW,
    ScaledSGD,
    TrustRegion,
)
from rlora.torch.step.dtensors import check_cut

STEPS = 20
BEFORE = {"placement": "before", "damping": 1e-6, "damping_mode": "relative"}
RELATIVE = {"damping": 1e-2, "damping_mode": "relative"}
ABSOLUTE = {"damping": 1e-6, "damping_mode": "absolute"}
COVARIANT = {"damping": 1e-3, "damping_mode": "covariant"}
GUARDS = {"escape": True, "balance": True, "max_norm": 0.1, "max_rms": 1.0, "weight_decay": 0.1}
MAKERS = {
    "default": lambda m: ScaledAdamW(m, lr=1e-2),
    "default-gs": lambda m: ScaledAdamW(m, lr=1e-2, order="gauss_seidel"),
    "adamw": lambda m: ScaledAdamW(m, lr=1e-2, **BEFORE),
    "fused": lambda m: ScaledAdamW(m, lr=1e-2, fused=True, **BEFORE),
    "nearest": lambda m: ScaledAdamW(m, lr=1e-2, stochastic_rounding=False, **BEFORE),
    "foreach": lambda m: ScaledAdamW(m, lr=1e-2, foreach=True, **BEFORE),
    "after": lambda m: ScaledAdamW(m, lr=1e-2, placement="after", **RELATIVE),
    "both": lambda m: ScaledAdamW(m, lr=1e-2, placement="both", **ABSOLUTE),
    "covariant": lambda m: ScaledAdamW(m, lr=1e-2, placement="before", **COVARIANT),
    "gauss-seidel": lambda m: ScaledAdamW(m, lr=1e-2, order="gauss_seidel", amsgrad=True, **BEFORE),
    "sgd": lambda m: ScaledSGD(m, lr=1e-2, momentum=0.9, nesterov=True, **RELATIVE),
    "nadam": lambda m: rlora.torch.precondition(torch.optim.NAdam)(m, lr=1e-2),
    "rmsprop": lambda m: rlora.torch.precondition(torch.optim.RMSprop)(m, lr=1e-2),
    "rite": lambda m: LoRARite(m, lr=1e-2),
    "guarded": lambda m: LoRARite(m, lr=1e-2, **GUARDS),
    "pro": lambda m: LoRAProAdamW(m, lr=1e-3),
    "riemannion": lambda m: Riemannion(m, lr=1e-3),
    "alt": lambda m: AltLoRAPlus(m, lr=1e-3),
    "muon": lambda m: LoRAMuon(m, lr=1e-3),
    "ref": lambda m: RefLoRA(m, lr=1e-3, momentum=0.9),
    "graft": lambda m: GraftAdamW(m, lr=1e-3),
    "groups": lambda m: ScaledAdamW(
        [
            {"params": list(m[0].named_parameters(prefix="0")), "damping": 1e-3},
            {"params": list(m[2:].named_parameters()), "lr": 3e-2, "compute_dtype": "float64"},
        ],
        lr=1e-2,
        **BEFORE,
    ),
}


def make_model(dtype=torch.float32, seed=0):
    """Two ranks; over 4 processes 10 is uneven, and of the 3 rows of an A one process has none."""
    torch.manual_seed(seed)
    layers = [
        LoRALinear(8, 10, 3, dtype),
        LoRALinear(10, 12, 4, dtype),
        LoRALinear(12, 8, 3, dtype),
    ]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
    model.append(nn.Linear(8, 8, dtype=dtype))  # a head outside the pairs
    for layer in layers:
        nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    return model


def shard(model, layout):
    """The model as DDP, FSDP2 or HSDP has it; as it is with None."""
    if layout is None:
        return model
    if layout == "ddp":
        return DistributedDataParallel(model)
    world = dist.get_world_size()
    sizes = (2, world // 2) if layout == "hsdp" else (world,)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
    placement = rlora.torch.shard_placement(model, mesh) if layout == "columns" else None
    for module in [m for m in model if isinstance(m, LoRALinear)] + [model]:
        fully_shard(module, mesh=mesh, shard_placement_fn=placement)
    return model


def share_of_batch(t, dtype):
    """This process's rows of a batch of 16."""
    g = torch.Generator().manual_seed(t % 3)
    x, y = (torch.randn(16, 8, generator=g).to(dtype) for _ in range(2))
    parts = dist.get_world_size() if dist.is_initialized() else 1
    mine = (
        slice(None) if parts == 1 else slice(*(16 // parts * (dist.get_rank() + i) for i in (0, 1)))
    )
    return x[mine], y[mine]


def backward(model, t):
    dtype = next(model.parameters()).dtype
    x, y = share_of_batch(t, dtype)
    loss = (
        (model(x) - y).float().square().mean()
        if dtype is torch.bfloat16
        else (model(x) - y).square().mean()
    )
    loss.backward()


def train(model, optimizer, start=0, stop=STEPS):
    for t in range(start, stop):
        optimizer.zero_grad()
        backward(model, t)
        optimizer.step()


def whole(x):
    x = x.detach()
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).double().numpy()


def values(model):
    return {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}


def trained_on_given_gradients(layout, dtype):
    """The same gradients for all processes, so that only the optimizer can differ.

    Pieces are rounded at random otherwise than the whole: here all are rounded to the nearest.
    """
    model = shard(make_model(dtype), layout)
    optimizer = ScaledAdamW(model, lr=1e-2, stochastic_rounding=False, **BEFORE)
    g = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        for p in (p for p in model.parameters() if p.requires_grad):
            p.grad = torch.randn(p.shape, generator=g).to(dtype)
            if layout is not None:
                p.grad = distribute_tensor(p.grad, p.device_mesh, p.placements)
        optimizer.step()
    return values(model)


def trained_in_any_layout(maker, sharded, poison=None):
    """Pairs cut in all ways along two dimensions of a mesh, as tensor parallelism would too.

    From the fifth step on one entry of the gradient of the parameter `poison` is NaN.
    """
    cut_0, cut_1, whole_here = Shard(0), Shard(1), Replicate()
    placements = [
        ([cut_0, cut_1], [cut_0, whole_here]),
        ([whole_here, cut_0], [cut_0, cut_1]),  # the rank axis of both
        ([whole_here, whole_here], [whole_here, cut_0]),
        ([cut_1, cut_1], [cut_0, cut_0]),
        ([cut_0, whole_here], [cut_0, cut_0]),  # kernels
    ]
    mesh = init_device_mesh("cpu", (2, 2)) if sharded else None
    g = torch.Generator().manual_seed(3)

    def spread(x, places):
        return distribute_tensor(x, mesh, places) if sharded else x

    named = []
    for i, pair in enumerate(placements):
        shapes = ((3, 5), (7, 3)) if i < 4 else ((3, 2, 2, 2), (7, 3, 1, 1))
        for letter, shape, places in zip("AB", shapes, pair, strict=True):
            x = torch.randn(shape, generator=g, dtype=torch.float64)
            named.append((f"{i}.lora_{letter}.weight", nn.Parameter(spread(x, places))))
    optimizer = MAKERS[maker](named)
    for t in range(STEPS):
        for name, p in named:
            G = torch.randn(p.shape, generator=g, dtype=torch.float64)
            if t >= 4 and name == poison:
                G[-1, -1] = torch.nan
            p.grad = spread(G, p.placements if sharded else None)
        optimizer.step()
    return {name: whole(p) for name, p in named}


def experts(half):
    """A pair on all processes and an expert on each half, of which the first gets no gradient.

    As one process has them that stands for a half, or with None in four.
    """
    world = grid = None
    if half is None:
        world, grid = (
            init_device_mesh("cpu", (4,)),
            init_device_mesh("cpu", (2, 2), mesh_dim_names=("half", "in it")),
        )
        half = grid.get_coordinate()[0]
        grid = grid["in it"]
    g = torch.Generator().manual_seed(1)

    def spread(x, mesh):
        return x if mesh is None else distribute_tensor(x, mesh, [Shard(0)])

    def draw(shape, mesh):
        return spread(torch.randn(shape, generator=g, dtype=torch.float64), mesh)

    meshes = {"dense": world, "expert": grid}
    named = [
        (f"{layer}.lora_{letter}.weight", nn.Parameter(draw(shape, mesh)))
        for layer, mesh in meshes.items()
        for letter, shape in (("A", (4, 8)), ("B", (8, 4)))
    ]

    def backward(rests=True):
        for name, p in named:
            grad = draw(tuple(p.shape), meshes[name.partition(".")[0]])
            p.grad = grad if half or not rests or name.startswith("dense") else None

    return named, backward


def trained_with_experts(half):
    """A few steps of methods that gather factors, and of one that does not.

    The state of LoRA-FA begins with a sum over processes. In its run the experts of the first half
    rest in one step alone.
    """
    result = {}
    for kind in (Riemannion, TrustRegion, LoRARite, LoRAFA):
        named, backward = experts(half)
        optimizer = kind(named, lr=1e-2, weight_decay=0.1)
        for t in range(4):
            backward(rests=kind is not LoRAFA or t == 1)
            optimizer.step()
        result |= {f"{kind.__name__}: {name}": whole(p) for name, p in named}
    return result


def norm_over_meshes():
    """The refusal of a step that would need one norm of both meshes."""
    named, backward = experts(None)
    optimizer = LoRARite(named, lr=1e-2, max_norm=0.1)
    backward()
    try:
        optimizer.step()
    except ShardingError as error:
        return str(error)
    return ""


def trained_compiled(sharded):
    """A few steps, in a graph where they are sharded: the parameters and the counts of steps."""
    result = {}
    for kind, options in ((LoRARite, {}), (LoRAMuon, {}), (ScaledSGD, {"momentum": 0.9})):
        model = shard(make_model(torch.float64), "default" if sharded else None)
        optimizer = kind(model, lr=1e-3, **options)
        step = torch.compile(optimizer.step, backend="eager") if sharded else optimizer.step
        for t in range(3):
            optimizer.zero_grad()
            backward(model, t)
            step()
        result |= {f"{kind.__name__}: {name}": x for name, x in values(model).items()}
        counts = [held["count"] for held in optimizer.state.values() if "count" in held]
        result[f"{kind.__name__}: counts"] = np.array([float(x) for x in counts])
    return result


def trained_by_methods(layout):
    """A few steps of every other method: the parameters, and what the state has of factors' size.

    For each method its numbers in this process, and altogether.
    """
    result, shares = {}, {}
    for name, kind in METHODS.items():
        model = shard(make_model(torch.float64), layout)
        optimizer = kind(model, lr=1e-3)
        train(model, optimizer, stop=5)
        result |= {f"{name}: {key}": x for key, x in values(model).items()}
        factors = [p for key, p in model.named_parameters() if "lora_" in key]
        held = [x for p in factors for x in optimizer.state[p].values() if x.numel() == p.numel()]
        pieces = [x.to_local() if hasattr(x, "to_local") else x for x in held]
        shares[name] = [sum(x.numel() for x in some) for some in (pieces, held)]
    return result, shares


def trained_at_a_tensor_rate(layout):
    """A few steps of every other method with lr as a tensor, as a compiled loop has it."""
    result = {}
    for name, kind in METHODS.items():
        model = shard(make_model(torch.float64), layout)
        optimizer = kind(model, lr=torch.tensor(1e-3, dtype=torch.float64))
        train(model, optimizer, stop=3)
        result |= {f"{name}: {key}": x for key, x in values(model).items()}
    return result


def trained_with_a_whole_factor(sharded):
    """A few steps of every other method over pairs of which A, B or none lies whole everywhere."""
    cut_0, cut_1, whole_here = Shard(0), Shard(1), Replicate()
    pairs = [(whole_here, cut_0), (cut_1, whole_here), (cut_1, cut_0)]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if sharded else None
    result = {}
    for name, kind in METHODS.items():
        g = torch.Generator().manual_seed(6)

        def draw(p=None, place=None, shape=(), g=g):
            x = torch.randn(shape or p.shape, generator=g, dtype=torch.float64)
            return distribute_tensor(x, mesh, [place]) if sharded else x

        named = [
            (f"{i}.lora_{letter}.weight", place, nn.Parameter(draw(place=place, shape=shape)))
            for i, pair in enumerate(pairs)
            for letter, place, shape in zip("AB", pair, ((3, 6), (8, 3)), strict=True)
        ]
        optimizer = kind([(name, p) for name, _, p in named], lr=1e-3)
        for _ in range(3):
            for _, place, p in named:
                p.grad = draw(p, place)
            optimizer.step()
        result |= {f"{name}: {key}": whole(p) for key, _, p in named}
    return result


def trained_two_dtypes(sharded):
    """A few steps over pairs of two dtypes in one group: the rank axis of A is cut, and B."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if sharded else None
    result = {}
    for kind in (ScaledAdamW, ScaledSGD, LoRARite, rlora.torch.Riemannion):
        g = torch.Generator().manual_seed(8)

        def draw(shape, dtype, g=g):
            x = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
            return distribute_tensor(x, mesh, [Shard(0)]) if sharded else x

        named = [
            (f"{i}.lora_{letter}.weight", nn.Parameter(draw(shape, dtype)))
            for i, dtype in enumerate((torch.float32, torch.float64, torch.float32))
            for letter, shape in (("A", (3, 6)), ("B", (8, 3)))
        ]
        optimizer = kind(named, lr=1e-3)
        for _ in range(3):
            for _, p in named:
                p.grad = draw(p.shape, p.dtype)
            optimizer.step()
        result |= {f"{kind.__name__}: {name}": whole(p) for name, p in named}
    return result


def trained_channels_last(sharded):
    """A few steps over a kernel that is not contiguous, whole on every process; B is cut."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if sharded else None
    result = {}
    for kind in (ScaledAdamW, ScaledSGD, LoRARite):
        g = torch.Generator().manual_seed(7)

        def draw(shape, place, g=g):
            x = torch.randn(shape, generator=g, dtype=torch.float64)
            x = x.contiguous(memory_format=torch.channels_last)
            return distribute_tensor(x, mesh, [place]) if sharded else x

        pieces = {"A": ((4, 3, 3, 3), Replicate()), "B": ((6, 4, 1, 1), Shard(0))}
        named = [
            (f"0.lora_{letter}.weight", nn.Parameter(draw(*piece)))
            for letter, piece in pieces.items()
        ]
        optimizer = kind(named, lr=1e-1)
        for _ in range(4):
            for (_, p), piece in zip(named, pieces.values(), strict=True):
                p.grad = draw(*piece)
            optimizer.step()
        result |= {f"{kind.__name__}: {name}": whole(p) for name, p in named}
    return result


def trained(maker, layout, dtype=torch.float64):
    model = shard(make_model(dtype), layout)
    optimizer = MAKERS[maker](model)
    train(model, optimizer)
    return values(model)


def goes_on_from_one_process(maker, layout):
    """Half of the steps on one process, its whole state loaded for the others.

    Without the head: torch's own state is not cut.
    """
    model = make_model(torch.float64)[:-1]
    optimizer = MAKERS[maker](model)
    step_on_drawn_gradients(model, optimizer, 0)
    saved = optimizer.state_dict()
    model = shard(model, layout)
    optimizer = MAKERS[maker](model)
    optimizer.load_state_dict(saved)
    step_on_drawn_gradients(model, optimizer, STEPS // 2)
    return values(model)


def goes_on_on_one_process(maker, layout):
    """Half of the steps in pieces, their state loaded where factors are whole."""
    model = shard(make_model(torch.float64)[:-1], layout)
    optimizer = MAKERS[maker](model)
    step_on_drawn_gradients(model, optimizer, 0)
    alone = make_model(torch.float64)[:-1]
    alone.load_state_dict({name: torch.tensor(x) for name, x in values(model).items()})
    saved, optimizer = optimizer.state_dict(), MAKERS[maker](alone)
    optimizer.load_state_dict(saved)
    step_on_drawn_gradients(alone, optimizer, STEPS // 2)
    return values(alone)


def step_on_drawn_gradients(model, optimizer, start):
    """Half of the steps, on gradients that are the same however the model is cut."""
    for t in range(start, start + STEPS // 2):
        g = torch.Generator().manual_seed(t)
        for p in (p for p in model.parameters() if p.requires_grad):
            p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
            if hasattr(p, "device_mesh"):
                p.grad = distribute_tensor(p.grad, p.device_mesh, p.placements)
        optimizer.step()


def trained_at_the_edges(maker, sharded):
    """Axes that are shorter than the mesh, one of length 1, layers of several s; and a copied state."""
    torch.manual_seed(4)
    g = torch.Generator().manual_seed(4)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if sharded else None
    model = nn.Sequential()
    for i, (n, m, r) in enumerate([(5, 1, 2), (2, 2, 4), (2, 2, 4), (1, 6, 2), (6, 3, 3)]):
        layer = LoRALinear(n, m, r, torch.float64)
        layer.scaling = {"default": 1.0 + i}
        for p in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)
        model.append(layer)
    if sharded:
        fully_shard(model, mesh=mesh)
    optimizer = MAKERS[maker](model)
    for t in range(4):
        for p in (p for p in model.parameters() if p.requires_grad):
            grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if sharded else grad
        optimizer.step()
        if t == 2:
            file = io.BytesIO()
            torch.save(copy.deepcopy(optimizer.state_dict()), file)
            assert file.tell()
    return values(model)


def trained_by_the_generic_backend(maker, layout):
    """As where rlora.backends.torch cannot be imported."""
    load, dispatch.load_backend_class = dispatch.load_backend_class, lambda name: None
    try:
        dispatch._by_type.clear()
        dispatch.backend_for_namespace.cache_clear()
        return trained(maker, layout)
    finally:
        dispatch.load_backend_class = load
        dispatch._by_type.clear()
        dispatch.backend_for_namespace.cache_clear()


def refused_cut():
    """The error for a stack of directions that are whole where the factors are cut."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)])
    check_cut(distribute_tensor(torch.ones(1, 4, 6), mesh, [Shard(2)]), p)
    with pytest.raises(ShardingError, match="leave out its sharded=True"):
        check_cut(distribute_tensor(torch.ones(1, 4, 6), mesh, [Replicate()]), p)


# --- gradients that are missing ------------------------------------------------------------------


def trained_frozen(maker, layout):
    """The first layer's A is frozen from the start, and in odd steps the second B has no gradient."""
    model = make_model(torch.float64)
    model[0].lora_A["default"].weight.requires_grad_(False)
    model = shard(model, layout)
    optimizer = MAKERS[maker](model)
    for t in range(STEPS):
        optimizer.zero_grad()
        backward(model, t)
        if t % 2:
            model[2].lora_B["default"].weight.grad = None
        optimizer.step()
    return values(model)


def frozen_before_the_step(maker, layout):
    """Two factors are frozen between the backward pass and the step, and keep their gradients."""
    model = shard(make_model(torch.float64), layout)
    optimizer = MAKERS[maker](model)
    train(model, optimizer, stop=2)
    optimizer.zero_grad()
    backward(model, 2)
    model[0].lora_A["default"].weight.requires_grad_(False)
    model[2].lora_B["default"].weight.requires_grad_(False)
    optimizer.step()
    return values(model)


def step_with_none_on_one(maker):
    """Process 0 alone has lost the gradients of its factors."""
    model = shard(make_model(torch.float64), "default")
    optimizer = MAKERS[maker](model)
    train(model, optimizer, stop=2)
    before = {name: p.detach().to_local().clone() for name, p in model.named_parameters()}
    backward(model, 2)
    if dist.get_rank() == 0:
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.grad = None
    optimizer.step()
    after = {name: p.detach().to_local() for name, p in model.named_parameters()}
    return {name: bool((x != before[name]).any()) for name, x in after.items() if x.numel()}


# --- what is sent --------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Name and bytes of what this process hands to each collective."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            given = args[1] if func.__name__.startswith(("alltoall", "_allgather")) else args[0]
            tensors = given if isinstance(given, (list, tuple)) else [given]
            name = func.__name__.split(".")[0].strip("_")
            self.sent.append((name, sum(x.numel() * x.element_size() for x in tensors)))
        return func(*args, **(kwargs or {}))


def traffic(maker, layout, dtype, shapes):
    """Traffic of one step after the first; `shapes` are (n, m, r)."""
    torch.manual_seed(0)
    model = nn.Sequential(*(LoRALinear(n, m, r, dtype) for n, m, r in shapes))
    model = shard(model, layout)
    optimizer = MAKERS[maker](model)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    optimizer.step()
    with Traffic() as traffic:
        optimizer.step()
    return traffic.sent


# --- replicas ------------------------------------------------------------------------------------


def replicas(maker, layout, dtype):
    """The bits of this process's pieces."""
    model = shard(make_model(dtype), layout)
    optimizer = MAKERS[maker](model)
    train(model, optimizer)
    pieces = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    bits = b"".join(x.detach().double().numpy().tobytes() for x in pieces)
    return dist.get_rank(), bits
