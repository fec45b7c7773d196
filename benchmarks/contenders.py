"""Who is measured side by side: ours on each backend, plain torch, torch.compile, other libraries.

Each contender builds, from operands, a call that runs forward, and one that runs backward.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import shapes
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddb_fast.kernels import attention, backends, group_norm

Operands = Mapping[str, Tensor]
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
# As in the authors' network.
DROPOUT = 0.15
# Operands that are no leaves of the graph.
_CONSTANT = ("dy", "seed", "d_sum")


@dataclass(frozen=True)
class Contender:
    """One implementation: run(operands) -> output, or outputs; `layout` of x, for group norms.

    half_parameters: it takes weight and bias in x's dtype only.
    """

    name: str
    run: Callable[[Operands], Any]
    layout: str = "nhwc"
    half_parameters: bool = False


def norm_operands(
    shape: shapes.GroupNorm,
    dtype: torch.dtype,
    options: tuple[str, ...],
    contender: Contender,
    device: torch.device,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Draw the operands of a group norm, the gradients of its outputs (dy, d_sum) included."""
    generator = torch.Generator(device).manual_seed(seed)
    parameters = dtype if contender.half_parameters else torch.float32

    def draw(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    def image() -> Tensor:
        drawn = draw(shape.n, shape.c, shape.h, shape.w)
        return drawn.contiguous(memory_format=LAYOUTS[contender.layout])

    operands = {"x": image(), "dy": image()}
    operands |= {name: draw(shape.c, dtype=parameters) for name in ("weight", "bias")}
    for name in ("pre_bias", "scale", "shift"):
        if name in options:
            operands[name] = draw(shape.n, shape.c)
    if "residual" in options:
        operands |= {"residual": image(), "d_sum": image()}
    if "dropout" in options:
        operands["seed"] = torch.tensor(seed, device=device)
    return operands


def ours(backend: str, groups: int, options: tuple[str, ...]) -> Callable[[Operands], Any]:
    """Our group norm on one backend."""
    fixed: dict[str, Any] = {"backend": backend, "return_sum": "return_sum" in options}
    if "silu" in options:
        fixed["activation"] = "silu"
    if "dropout" in options:
        fixed["dropout_p"] = DROPOUT

    def run(operands: Operands) -> Any:
        given = {k: x for k, x in operands.items() if k not in ("x", "dy", "d_sum")}
        return group_norm(operands["x"], groups, **given, **fixed)

    return run


def _plain(
    groups: int, options: tuple[str, ...], layout: str, *, copies: bool
) -> Callable[[Operands], Any]:
    """What a network written in torch does; on CUDA torch returns NCHW, `copies` undoes it."""

    def run(operands: Operands) -> Any:
        x = operands["x"]
        if "pre_bias" in options:
            x = x + operands["pre_bias"][:, :, None, None]
        if "residual" in options:
            x = x + operands["residual"]
        y = F.group_norm(x, groups, operands["weight"], operands["bias"])
        if copies:
            y = y.contiguous(memory_format=LAYOUTS[layout])
        if "scale" in options:
            y = y * (1 + operands["scale"][:, :, None, None]) + operands["shift"][:, :, None, None]
        if "silu" in options:
            y = F.silu(y)
        if "dropout" in options:
            y = F.dropout(y, DROPOUT)
        return (y, x) if "return_sum" in options else y

    return run


def compile_options(mode: str) -> dict[str, Any]:
    """What a mode of torch.compile stands for, but for its descent.

    max-autotune descends from the fastest launch of each kernel along one coordinate after the
    other and compiles every step where it stands: 15 to 60 s for a group norm beside others, more
    than 400 s for the forward pass of a network.
    """
    options = torch._inductor.list_mode_options(mode)
    return {k: x for k, x in options.items() if k != "coordinate_descent_tuning"}


def norm_contenders(
    shape: shapes.GroupNorm, options: tuple[str, ...], device: torch.device, compile_mode: str
) -> tuple[list[Contender], dict[str, str]]:
    """Everything that can be measured on this device, and the reasons for what cannot."""
    found, missing = [], {}
    cuda = device.type == "cuda"
    for backend, reasons in backends()["group_norm"].items():
        if backend == "reference":
            continue
        if reasons:
            missing[backend] = "; ".join(reasons)
            continue
        found += [
            Contender(f"{backend}/{layout}", ours(backend, shape.g, options), layout)
            for layout in LAYOUTS
        ]
    for layout in LAYOUTS:
        plain = _plain(shape.g, options, layout, copies=cuda and layout == "nhwc")
        found.append(Contender(f"eager/{layout}", plain, layout, cuda))
    for layout in LAYOUTS:
        plain = _plain(shape.g, options, layout, copies=False)
        compiled = torch.compile(plain, options=compile_options(compile_mode), dynamic=False)
        found.append(Contender(f"compile/{layout}", compiled, layout, cuda))
    if options != ("silu",):
        return found, missing
    try:
        liger = import_module("liger_kernel.ops.group_norm").LigerGroupNormFunction.apply
    except (ImportError, RuntimeError, AttributeError) as reason:
        missing["liger"] = f"{type(reason).__name__}: {reason}"
        return found, missing

    def run(operands: Operands) -> Tensor:
        x = operands["x"]
        y = liger(x.flatten(2), operands["weight"], operands["bias"], shape.c, shape.g, 1e-5)
        return F.silu(y.view_as(x))

    found.append(Contender("liger/nchw", run, "nchw", True))
    return found, missing


def attention_operands(
    shape: shapes.Attention, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> dict[str, Tensor]:
    """Draw q, k and v as views of one packed projection, as the U-Net has them, and dy."""
    generator = torch.Generator(device).manual_seed(seed)
    b, h, s, d = shape.b, shape.h, shape.s, shape.d

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    q, k, v = draw(b, s, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
    return {"q": q, "k": k, "v": v, "dy": draw(b, s, h, d).transpose(1, 2)}


def _on_three(run: Callable[..., Tensor]) -> Callable[[Operands], Tensor]:
    return lambda operands: run(operands["q"], operands["k"], operands["v"])


def our_attention(backend: str) -> Contender:
    """Our attention on one backend."""

    def run(operands: Operands) -> Tensor:
        return attention(operands["q"], operands["k"], operands["v"], backend=backend)

    return Contender(backend, run)


def attention_contenders(device: torch.device) -> tuple[list[Contender], dict[str, str]]:
    """As `norm_contenders`: ours, each backend of torch's attention, Flex, xformers."""
    found, missing = [], {}
    for backend, reasons in backends()["attention"].items():
        if backend in ("torch", "reference"):
            continue
        if reasons:
            missing[backend] = "; ".join(reasons)
            continue
        found.append(our_attention(backend))
    choices = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    if device.type == "cuda":
        choices |= {
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION,
        }
    for name, choice in choices.items():

        def forced(q: Tensor, k: Tensor, v: Tensor, choice: SDPBackend = choice) -> Tensor:
            with sdpa_kernel(choice):
                return F.scaled_dot_product_attention(q, k, v)

        found.append(Contender(f"sdpa-{name}", _on_three(forced)))
    found.append(Contender("sdpa", _on_three(F.scaled_dot_product_attention)))
    if device.type == "cuda":
        flex = import_module("torch.nn.attention.flex_attention").flex_attention
        found.append(Contender("flex", _on_three(torch.compile(flex, dynamic=False))))
    else:
        missing["flex"] = "measured on CUDA only"
    return found, missing


def first(outputs: Any) -> Tensor:
    """The output that is compared: y or o."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def forward(contender: Contender, operands: Operands) -> Callable[[], Any]:
    """A call of the forward pass alone, without anything kept for a backward."""

    def call() -> Any:
        with torch.no_grad():
            return contender.run(operands)

    return call


def backward(contender: Contender, operands: Operands) -> Callable[[], Any]:
    """Run forward once; a call computes the gradients of all operands."""
    leaves, outputs, cotangents = _differentiable(contender, operands)
    return lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)


def both(contender: Contender, operands: Operands) -> Callable[[], Any]:
    """A call of forward and backward."""

    def call() -> Any:
        leaves, outputs, cotangents = _differentiable(contender, operands)
        return torch.autograd.grad(outputs, leaves, cotangents)

    return call


def gradients(contender: Contender, operands: Operands) -> dict[str, Tensor]:
    """The gradient of every operand, by its name."""
    names = [k for k in operands if k not in _CONSTANT]
    return dict(zip(names, both(contender, operands)(), strict=True))


def _differentiable(
    contender: Contender, operands: Operands
) -> tuple[list[Tensor], tuple[Tensor, ...], list[Tensor]]:
    given = {k: x if k in _CONSTANT else x.detach().requires_grad_() for k, x in operands.items()}
    with torch.enable_grad():
        outputs = contender.run(given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [operands[name] for name in ("dy", "d_sum") if name in operands]
    leaves = [x for k, x in given.items() if k not in _CONSTANT]
    return leaves, outputs, cotangents[: len(outputs)]


DIRECTIONS = {"forward": forward, "backward": backward, "both": both}
