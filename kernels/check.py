"""Every op and backend against the fp64 reference, with bounds: `ddb-fast kernels check`.

A `Case` is one call; `findings` runs it, forward and backward, and measures each result. The error
is RMS(difference) / RMS(truth), the latter at least a floor taken from the operands, for truths
that vanish. The bounds: in fp32 3e-6 for outputs and 6e-6 for gradients; in half precision 1.25
times the error that torch makes in that dtype, at least 3e-3 and 4e-3; 1e-5 for the fp32 gradients
of parameters, which our kernels sum in fp32.
"""

import itertools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch, ops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {
    "group_norm": ("contiguous", "channels_last"),
    "attention": ("separate", "packed"),
}
_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_SHAPES = {
    # (N, C, H, W, groups): C / G of 4, 6 and 21, odd sides, one pixel.
    "group_norm": ((2, 32, 16, 16, 8), (2, 48, 9, 7, 8), (1, 63, 5, 4, 3), (3, 16, 1, 1, 4)),
    # (B, H, S, D, S of k and v).
    "attention": ((2, 2, 64, 32, 64), (1, 3, 100, 40, 100), (2, 1, 5, 16, 5)),
}
_OPTIONS = ("silu", "dropout", "pre_bias", "scale", "shift", "residual")
# These sum the parameters' gradients in x's dtype, or leave that to torch.
_HALF_SUMS = ("torch", "xformers")


@dataclass(frozen=True)
class Case:
    """One call of an op.

    shape: (N, C, H, W, groups), or (B, H, S, D, S of k and v). options: which of silu, dropout,
    pre_bias, scale, shift and residual (with its sum returned) a group norm has.
    offset: what is added to x, its mean in standard deviations.
    """

    op: str
    backend: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    options: tuple[str, ...] = ()
    offset: float = 0.0


class Finding(NamedTuple):
    """The error of one result of a case and what is allowed; "y", "o" and "sum" are outputs."""

    name: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        # Not `error > bound`, which a NaN would pass.
        return self.error <= self.bound

    @property
    def is_gradient(self) -> bool:
        return self.name.startswith("d_")


def error(actual: Tensor, truth: Tensor, floor: float = 0.0) -> float:
    """RMS of the difference over RMS of the truth, over the floor where that is larger."""
    if truth.numel() == 0:
        return 0.0
    difference = _rms(actual.double() - truth)
    return difference / max(_rms(truth), floor, 1e-30)


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def operands(case: Case, device: torch.device | str) -> dict[str, Tensor]:
    """Draw what a case is called with, and the gradients of its outputs (d_y, d_sum or d_o)."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[case.dtype]

    def draw(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    if case.op == "attention":
        b, h, s, d, keys = case.shape
        if case.layout == "packed":
            packed = draw(b, s, 3, h, d)
            q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = draw(b, h, s, d), draw(b, h, keys, d), draw(b, h, keys, d)
        return {"q": q, "k": k, "v": v, "d_o": draw(b, h, s, d)}

    n, c, h, w, _ = case.shape
    memory_format = _FORMATS[case.layout]

    def image() -> Tensor:
        return draw(n, c, h, w).contiguous(memory_format=memory_format)

    drawn = {"x": image() + case.offset, "weight": draw(c, dtype=torch.float32)}
    drawn |= {"bias": draw(c, dtype=torch.float32), "d_y": image()}
    for name in ("pre_bias", "scale", "shift"):
        if name in case.options:
            drawn[name] = draw(n, c)
    if "residual" in case.options:
        drawn |= {"residual": image(), "d_sum": image()}
    return drawn


def call(case: Case, backend: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a case forward and backward; every output, and the gradient of every operand as d_NAME.

    Raises ValueError where the backend cannot run the case.
    """
    inputs = {k: x.detach().requires_grad_() for k, x in given.items() if not k.startswith("d_")}
    if case.op == "attention":
        o = ops.attention(inputs["q"], inputs["k"], inputs["v"], backend=backend)
        outputs, cotangents = {"o": o}, [given["d_o"]]
    else:
        options: dict[str, Any] = {k: x for k, x in inputs.items() if k != "x"}
        if "silu" in case.options:
            options["activation"] = "silu"
        if "dropout" in case.options:
            options |= {"dropout_p": 0.25, "seed": torch.tensor(7, device=inputs["x"].device)}
        both = "residual" in case.options
        y = ops.group_norm(inputs["x"], case.shape[4], **options, return_sum=both, backend=backend)
        outputs, cotangents = {"y": y}, [given["d_y"]]
        if both:
            outputs = dict(zip(("y", "sum"), y, strict=True))
            cotangents.append(given["d_sum"])
    gradients = torch.autograd.grad(tuple(outputs.values()), tuple(inputs.values()), cotangents)
    return outputs | {f"d_{k}": g for k, g in zip(inputs, gradients, strict=True)}


def findings(case: Case, device: torch.device | str) -> list[Finding]:
    """Measure every result of a case; memory that a backend does not write shows as NaN."""
    given = operands(case, device)
    with _poisoned():
        actual = call(case, case.backend, given)
    truth = call(case, "reference", {k: x.double() for k, x in given.items()})
    half = case.dtype != "fp32"
    usual = call(case, "torch", given) if half else {}
    floors = _floors(case, given)
    found = []
    for name, expected in truth.items():
        floor, gradient = floors.get(name, 0.0), name.startswith("d_")
        bound = 6e-6 if gradient else 3e-6
        if half:
            bound = 4e-3 if gradient else 3e-3
            bound = max(bound, 1.25 * error(usual[name], expected, floor))
        # With a residual the backward reads the sum as it was rounded to x's dtype.
        exact = case.backend not in _HALF_SUMS and not (half and "residual" in case.options)
        if name in ("d_weight", "d_bias") and exact:
            bound = 1e-5
        if case.offset:
            bound = max(bound, 1e-3)
        found.append(Finding(name, error(actual[name], expected, floor), bound))
    return found


def _floors(case: Case, given: Mapping[str, Tensor]) -> dict[str, float]:
    """What a result's RMS would be without the cancellation that can make its truth vanish."""
    if case.op == "attention":
        # One token attends to itself alone.
        return dict.fromkeys(("d_q", "d_k"), _rms(given["d_o"]) if case.shape[4] == 1 else 0.0)
    n, c, h, w, groups = case.shape
    size = _rms(given["d_y"])
    summed = {"d_pre_bias": h * w, "d_scale": h * w, "d_weight": n * h * w}
    floors = {name: 0.1 * size * count**0.5 for name, count in summed.items()}
    alone = c // groups * h * w == 1
    # A group's gradients add up to zero: with one channel to a group, that is the pre_bias's.
    if c == groups:
        floors["d_pre_bias"] *= 10
    # One element is its own mean: x changes nothing, and rstd = 1 / sqrt(eps) is 316.
    return floors | {"d_x": size * (316 if alone else 0.1), "y": 0.1, "d_residual": 0.1 * size}


@contextmanager
def _poisoned() -> Iterator[None]:
    """Fill what torch.empty returns with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def report(device: str) -> tuple[str, bool]:
    """Check every op, backend, dtype and layout on a device; (table, whether all bounds hold).

    Raises ValueError if there is no such device.
    """
    try:
        torch.empty((), device=device)
    except (RuntimeError, AssertionError) as reason:
        raise ValueError(f"device {device!r}: {str(reason).splitlines()[0]}") from None
    lines = [
        f"{'op':<11}{'backend':<11}{'dtype':<6}{'layout':<15}"
        f"{'output':>9}{'bound':>9}  {'gradient':>9}{'bound':>9}"
    ]
    fine = True
    for op, backends in dispatch.backends().items():
        for backend, reasons in backends.items():
            if reasons:
                lines.append(f"{op:<11}{backend:<11}not available: {'; '.join(reasons)}")
                continue
            for dtype in DTYPES:
                for layout in LAYOUTS[op]:
                    text, ok = _line(op, backend, dtype, layout, device)
                    lines.append(f"{op:<11}{backend:<11}{dtype:<6}{layout:<15}{text}")
                    fine &= ok
    lines.append("every error is within its bound" if fine else "an error exceeds its bound")
    return "\n".join(lines), fine


def _line(op: str, backend: str, dtype: str, layout: str, device: str) -> tuple[str, bool]:
    """The worst output and the worst gradient, relative to their bounds, over all shapes."""
    found = []
    choices = (_OPTIONS, _OPTIONS[:-1]) if op == "group_norm" else ((),)
    for shape, options in itertools.product(_SHAPES[op], choices):
        case = Case(op, backend, shape, dtype, layout, options)
        try:
            found += findings(case, device)
        except ValueError as refusal:
            return f"not run: {refusal}", True
    worst = [
        max((f for f in found if f.is_gradient == gradient), key=lambda f: _badness(f))
        for gradient in (False, True)
    ]
    numbers = "  ".join(f"{f.error:9.1e}{f.bound:9.1e}" for f in worst)
    broken = ", ".join(dict.fromkeys(f.name for f in found if not f.ok))
    return numbers + (f"  EXCEEDED by {broken}" if broken else ""), not broken


def _badness(finding: Finding) -> float:
    ratio = finding.error / finding.bound
    return ratio if ratio == ratio else float("inf")
