"""What the part `correctness` checks on a device: errors against fp64, and what only a GPU shows.

A row holds the worst output and the worst gradient of a case beside what is allowed, or "ok" and
what was seen. Bounds and operands are those of `ddb_fast.kernels.check`.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from importlib import import_module

import closeness
import contenders
import shapes
import speed
import torch
from rows import Item, Row
from torch import Tensor

from ddb_fast.benchmark_presets import small_generator
from ddb_fast.diffusion.losses import diffusion_loss
from ddb_fast.diffusion.schedule import make_schedule
from ddb_fast.engine import build_optimizer, seed_step, set_learning_rate
from ddb_fast.graphs import Forward, Step
from ddb_fast.kernels import attention_qkv, backends, check, group_norm
from ddb_fast.models.unet import UNet

# (N, C, H, W, groups): C / G of 1 to 48; 1, 2, 3, 32 and C groups; odd sides, one pixel, no sample.
NORMS = (
    (3, 128, 16, 16, 32),
    (2, 256, 32, 32, 32),
    (160, 128, 32, 32, 32),
    (2, 32, 16, 16, 32),
    (2, 96, 9, 7, 32),
    (2, 192, 7, 5, 32),
    (1, 21, 7, 5, 3),
    (1, 12, 8, 6, 1),
    (2, 576, 16, 16, 32),
    (2, 42, 5, 9, 2),
    (1, 84, 7, 5, 2),
    (2, 1536, 8, 8, 32),
    (3, 16, 1, 1, 4),
    (2, 6, 7, 5, 6),
    (2, 1024, 16, 16, 1),
    (0, 32, 8, 8, 8),
)
# (B, H, S, D, S of k and v).
ATTENTIONS = (
    *((2, 2, s, d, s) for s in (1, 5, 64, 100, 256, 1024) for d in (64, 256)),
    *((2, 3, s, d, s) for s in (64, 300) for d in (8, 16, 32, 40, 96, 128)),
    (2, 2, 100, 64, 37),
    (2, 2, 64, 64, 1000),
)
_OPTIONS = (
    ("silu", "dropout", "pre_bias", "scale", "shift", "residual"),
    ("silu", "dropout", "pre_bias", "scale", "shift"),
    (),
)


def case_items(
    device: torch.device,
    norms: Iterable[tuple[int, ...]] = NORMS,
    attentions: Iterable[tuple[int, ...]] = ATTENTIONS,
) -> Iterator[Item]:
    """Every available backend on every shape, dtype and layout."""
    sizes = {"group_norm": tuple(norms), "attention": tuple(attentions)}
    for dtype in ("bf16", "fp32", "fp16"):
        for op, available in backends().items():
            for backend in (
                b for b, reasons in available.items() if not reasons and b != "reference"
            ):
                for layout in check.LAYOUTS[op]:
                    for shape in sizes[op]:
                        if op == "attention" and layout == "packed" and shape[2] != shape[4]:
                            continue
                        choices = _OPTIONS if op == "group_norm" else ((),)
                        cases = [
                            check.Case(op, backend, shape, dtype, layout, options)
                            for options in choices
                        ]
                        size = "x".join(map(str, shape))
                        key = f"{op} {backend} {dtype} {layout} {size}"
                        yield key, functools.partial(_case_row, device, cases)
    for backend in ("triton", "native"):
        if not backends()["group_norm"][backend]:
            # In registers, split, and walked over.
            far = ((64, 16, 8, 8, 8), (2, 64, 64, 64, 8), (160, 128, 32, 32, 32))
            for layout, shape in itertools.product(check.LAYOUTS["group_norm"], far):
                case = check.Case("group_norm", backend, shape, "fp32", layout, offset=1000.0)
                size = "x".join(map(str, shape))
                yield (
                    f"mean/std 1000 {backend} {layout} {size}",
                    functools.partial(_case_row, device, [case]),
                )


def _case_row(device: torch.device, cases: list[check.Case]) -> Row:
    found = []
    for case in cases:
        try:
            found += check.findings(case, device)
        except ValueError as refusal:
            return {"ok": True, "refused": str(refusal)}
    row: Row = {"ok": all(f.ok for f in found)}
    for name, kind in (("output", False), ("gradient", True)):
        worst = max((f for f in found if f.is_gradient == kind), key=lambda f: f.error / f.bound)
        row |= {name: worst.error, f"{name} bound": worst.bound}
    exceeded = sorted({f.name for f in found if not f.ok})
    return row | ({"exceeded": exceeded} if exceeded else {})


def special_items(device: torch.device) -> Iterator[Item]:
    """Repetition, the compiler and, on a GPU, sizes beyond 32 bits and replayed graphs."""
    norm = "triton" if device.type == "cuda" else "native"
    heads = "triton" if device.type == "cuda" else "torch"
    for options in ((), ("residual",)):
        text = "+".join(options) or "plain"
        yield f"group_norm twice, {text}", functools.partial(_norm_twice, device, norm, options)
    for dtype in ("fp32", "bf16", "fp16"):
        yield f"silu's derivative, {dtype}", functools.partial(_derivative, device, norm, dtype)
    for s in (64, 300):
        yield f"attention twice, S {s}", functools.partial(_attention_twice, device, heads, s)
    yield "torch.compile fullgraph", functools.partial(_fullgraph, device, norm, heads)
    yield "opcheck", functools.partial(_opcheck, device)
    if device.type != "cuda":
        return
    for layout in contenders.LAYOUTS:
        yield f"group_norm numel > 2^31, {layout}", functools.partial(_large, device, layout)
    for s in (64, 300):
        yield f"attention batch * heads > 65535, S {s}", functools.partial(_many, device, s)
    yield "operands that change their alignment", functools.partial(_alignment, device)
    yield "graph replay of dropout", functools.partial(_replay, device)
    yield "training step as a graph", functools.partial(_graphed_step, device)
    yield "forward pass as a graph", functools.partial(_graphed_forward, device)
    yield "a step that cannot be a graph", functools.partial(_refused_graph, device)


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> Row:
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    return {"ok": not differing, "differing": differing}


def _norm_twice(device: torch.device, backend: str, options: tuple[str, ...]) -> Row:
    for shape in ((160, 128, 32, 32, 32), (2, 512, 32, 32, 32), (4, 256, 8, 8, 32)):
        names = ("silu", "dropout", "pre_bias", *options)
        case = check.Case("group_norm", backend, shape, "bf16", "channels_last", names)
        given = check.operands(case, device)
        row = _same(check.call(case, backend, given), check.call(case, backend, given))
        if not row["ok"]:
            return row
    return row


def _derivative(device: torch.device, backend: str, dtype: str) -> Row:
    """silu'(z) at z from -20 to 20: what bias gets where weight is 0, so that z is bias.

    A tanh of z / 2 that is off by e changes it by at most e * (1 + |z|) / 2.
    """
    z = torch.linspace(-20, 20, 512, device=device, requires_grad=True)
    x = torch.randn(1, 512, 1, 1, device=device).to(speed.DTYPES[dtype])
    weight = torch.zeros_like(z)
    group_norm(x, 32, weight, z, activation="silu", backend=backend).sum().backward()
    exact = z.detach().double()
    sigmoid = exact.sigmoid()
    truth = sigmoid * (1 + exact * (1 - sigmoid))
    off = ((z.grad.double() - truth).abs() / (1 + exact.abs())).max().item()
    return {"ok": off <= (1e-6 if dtype == "fp32" else 2**-11), "off": off}


def _attention_twice(device: torch.device, backend: str, s: int) -> Row:
    case = check.Case("attention", backend, (8, 4, s, 64, s), "bf16", "packed")
    given = check.operands(case, device)
    return _same(check.call(case, backend, given), check.call(case, backend, given))


def _fullgraph(device: torch.device, norm: str, heads: str) -> Row:
    """One graph for two batch sizes marked dynamic, with eager's outputs and gradients."""
    torch.compiler.reset()
    graphs = 0

    def count(module: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return module.forward

    def block(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        h = group_norm(x, 8, weight, bias, activation="silu", backend=norm)
        tokens = h.flatten(2).mT
        return attention_qkv(torch.cat([tokens] * 3, 2), 2, backend=heads)

    draw = functools.partial(torch.randn, device=device)
    weight, bias = draw(64, requires_grad=True), draw(64, requires_grad=True)
    for compiler in (count, "inductor"):
        compiled = torch.compile(block, fullgraph=True, backend=compiler)
        for n in (4, 6):
            x = draw(n, 64, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
            torch._dynamo.mark_dynamic(x, 0)
            expected, actual = block(x, weight, bias), compiled(x, weight, bias)
            leaves, dy = (x, weight, bias), torch.randn_like(expected)
            pairs = zip(
                (expected, *torch.autograd.grad(expected, leaves, dy)),
                (actual, *torch.autograd.grad(actual, leaves, dy)),
                strict=True,
            )
            off = max(check.error(b, a.double()) for a, b in pairs)
            if not off <= 1e-4:
                return {"ok": False, "off": off}
    return {"ok": graphs == 1, "graphs": graphs, "off": off}


def _opcheck(device: torch.device) -> Row:
    """All utilities of torch.library.opcheck on the registered group norm."""
    draw = functools.partial(torch.randn, device=device, requires_grad=True)
    modules = {"cuda": "triton_group_norm", "cpu": "native"}
    # Registered when it is imported, which is when it is first used.
    import_module(f"ddb_fast.kernels.{modules[device.type]}")
    names = {"cuda": "group_norm_triton", "cpu": "group_norm_native"}
    op = getattr(torch.ops.ddb_fast, names[device.type]).default
    for layout in contenders.LAYOUTS.values():
        x, residual = (
            draw(2, 8, 4, 3).detach().contiguous(memory_format=layout).requires_grad_()
            for _ in range(2)
        )
        vectors = (draw(2, 8), draw(8), draw(8), draw(2, 8), draw(2, 8))
        seed = torch.tensor(3, device=device)
        torch.library.opcheck(op, (x, *[None] * 7, 4, 1e-5, False, 0.0, False))
        torch.library.opcheck(op, (x, residual, *vectors, seed, 4, 1e-5, True, 0.3, True))
    return {"ok": True, "op": str(op)}


def _large(device: torch.device, layout: str) -> Row:
    shape = shapes.GroupNorm(2100, 256, 64, 64, 32)
    contender = contenders.Contender("triton", contenders.ours("triton", 32, ("silu",)), layout)
    generator = torch.Generator(device).manual_seed(0)

    def image() -> Tensor:
        x = torch.empty(
            (shape.n, shape.c, shape.h, shape.w),
            dtype=torch.bfloat16,
            device=device,
            memory_format=contenders.LAYOUTS[layout],
        )
        return x.normal_(generator=generator)

    operands = {"x": image(), "dy": image()}
    operands |= {name: torch.randn(shape.c, device=device) for name in ("weight", "bias")}
    off = speed.norm_off(shape, ("silu",), contender, operands, "both")
    return {"ok": True, "off": off, "numel": shape.elements}


def _many(device: torch.device, s: int) -> Row:
    shape = shapes.Attention(4112, 16, s, 16)
    operands = contenders.attention_operands(shape, torch.bfloat16, device)
    off = closeness.assert_close(
        contenders.our_attention("triton"),
        operands,
        contenders.our_attention("reference"),
        gradients=True,
    )
    return {"ok": True, "off": off, "batch * heads": shape.b * shape.h}


def _alignment(device: torch.device) -> Row:
    """A call is launched as an earlier one of its kind was: a view that is not aligned is none."""
    off = {}
    for start in (0, 8, 1, 0, 3):
        case = check.Case("group_norm", "triton", (2, 64, 16, 16, 8), "bf16", "contiguous", ())
        given = check.operands(case, device)
        for name in ("x", "d_y"):
            room = torch.zeros(given[name].numel() + 8, dtype=given[name].dtype, device=device)
            view = room[start : start + given[name].numel()].view(given[name].shape)
            given[name] = view.copy_(given[name])
        truth = check.call(case, "reference", {k: x.double() for k, x in given.items()})
        found = check.call(case, "triton", given)
        off[start] = max(check.error(found[k], truth[k]) for k in truth)
    return {"ok": max(off.values()) < 4e-3, "off": str(off)}


def _replay(device: torch.device) -> Row:
    """A replayed graph draws the mask of the seed it finds; without a seed, a new one each time."""
    x = torch.randn(4, 64, 16, 16, device=device).contiguous(memory_format=torch.channels_last)
    seed = torch.tensor(0, device=device)

    def drop(seed: Tensor | None) -> Tensor:
        return group_norm(x, 8, dropout_p=0.5, seed=seed, backend="triton")

    found = {}
    for name, given in (("seed", seed), ("default generator", None)):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            drop(given)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = drop(given)
        masks = []
        for number in (1, 2):
            seed.fill_(number)
            graph.replay()
            masks.append(y.clone())
            if given is not None and not torch.equal(y, drop(seed)):
                return {"ok": False, "differs from eager": number}
        found[name] = not torch.equal(*masks)
    return {"ok": all(found.values()), "new masks": found}


def _trained(device: torch.device, how: str) -> list[Tensor]:
    """Losses and weights of a small generator after a few steps launched in this way."""
    torch.manual_seed(0)
    config = small_generator(image_size=16, images=64)
    network = UNet(config.unet, num_classes=3, timesteps=config.timesteps).to(device).train()
    parameters = list(network.parameters())
    optimizer, schedule = build_optimizer(config, parameters), make_schedule(config)
    images, y = torch.randn(64, 3, 16, 16, device=device), torch.arange(64, device=device) % 3

    def run(index: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = diffusion_loss(
                network, images[index], y[index], schedule=schedule, target=config.target,
                null_class=network.null_class,
            )  # fmt: skip
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    step, losses = Step(run, device=device, how=how), []
    for number in range(20):
        seed_step(number, device)
        set_learning_rate(optimizer, 1e-3 / (1 + number))
        losses.append(step(torch.arange(16, device=device) + number))
    return [torch.stack(losses), *(p.detach() for p in parameters)]


def _graphed_step(device: torch.device) -> Row:
    """Bit for bit what is launched op by op: noise, dropped labels, rates and weights."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        eager, again, graph, chosen = (
            _trained(device, how) for how in ("eager", "eager", "graph", "auto")
        )
    finally:
        torch.backends.cudnn.deterministic = before
    off = {
        name: max(check.error(a, b.double()) for a, b in zip(other, eager, strict=True))
        for name, other in (("eager again", again), ("graph", graph), ("auto", chosen))
    }
    return {"ok": off["graph"] <= off["eager again"] >= off["auto"], **off}


@torch.inference_mode()
def _graphed_forward(device: torch.device) -> Row:
    """What eager computes, for two sizes of batch in turn."""
    config = small_generator(image_size=16, images=64)
    network = UNet(config.unet, num_classes=3, timesteps=config.timesteps).to(device).eval()
    graphs, off = Forward(network), 0.0
    for n in (4, 8, 4, 8):
        x = torch.randn(n, 3, 16, 16, device=device)
        t, y = (torch.randint(k, (n,), device=device) for k in (1000, 3))
        with torch.autocast(device.type, torch.bfloat16):
            off = max(off, check.error(graphs(x, t, y), network(x, t, y).double()))
    return {"ok": off == 0, "off": off}


def _refused_graph(device: torch.device) -> Row:
    """A step that reads from the device goes on op by op, and so do random numbers."""
    x, seen = torch.ones(2, device=device), []

    def run(index: Tensor) -> Tensor:
        seen.append(index.sum().item())
        return x * torch.rand(2, device=device)

    step = Step(run, device=device, how="graph")
    for number in range(6):
        seed_step(number, device)
        drawn = step(torch.tensor([number], device=device))
        seed_step(number, device)
        if not torch.equal(drawn, torch.rand(2, device=device)):
            return {"ok": False, "another random number at step": number}
    return {"ok": sorted(set(seen)) == list(range(6)), "seen": seen}


def items(device: torch.device) -> Iterator[Item]:
    """All items of the part `correctness`."""
    yield from special_items(device)
    yield from case_items(device)
