"""What the part `tune` measures, and the table that `kernels/tuned.py` reads, from its rows.

A row is one shape on one backend with one configuration. Rows of the shapes that share a key or a
class are pooled by the geometric mean of their times; what is used without a measurement stays
unless something else is faster by more than noise.
"""

import functools
import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import contenders
import measure
import rows
import shapes
import speed
import torch
from contenders import Contender
from rows import Item, Row
from torch import Tensor

from ddb_fast.kernels import dispatch, tuned

# Two measurements of one call in turns differ by less.
NOISE = 1.03
# And two in different parts of a sitting, of 77 of 82 launches; what is chosen is kept for long.
_NOISE_OF_A_LAUNCH = 1.06
_DEFAULT: Mapping[str, int] = {}
# What `kernels/triton_group_norm_plan.py` and `kernels/triton_attention.py` take, besides their
# own choice.
_NORMS = (
    _DEFAULT,
    *({"split": 0, "num_warps": w, "stages": s} for w in (4, 8, 16) for s in (1, 3)),
    *({"split": 1, "num_warps": w, "unroll": u} for w in (4, 8) for u in (1, 2)),
    *({"registers": elements} for elements in (8192, 16384)),
)
# What a tile holds is no matter of speed.
_TILES = tuple({"num_warps": w} for w in (2, 4, 8))
# (queries, keys, warps, stages) of the kernels that walk over a long sequence.
_WALKS = {
    kernel: tuple(
        dict(zip(("block_m", "block_n", "num_warps", "num_stages"), sizes, strict=True))
        for sizes in choices
    )
    for kernel, choices in {
        "attention_forward": (
            (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 32, 4, 4), (128, 32, 8, 2),
            (128, 32, 8, 3), (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4),
            (128, 128, 8, 2),
        ),
        "attention_backward_queries": (
            (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (64, 32, 8, 2),
            (128, 32, 8, 2), (128, 32, 8, 3), (128, 64, 8, 1), (128, 64, 8, 2), (128, 64, 8, 3),
            (128, 128, 8, 2),
        ),
        "attention_backward_keys": (
            (16, 64, 8, 2), (32, 64, 4, 1), (32, 64, 4, 2), (32, 64, 4, 3), (32, 64, 8, 2),
            (64, 32, 8, 1), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 1), (64, 128, 8, 2),
            (64, 128, 8, 3),
        ),
    }.items()
}  # fmt: skip


@contextmanager
def trying(
    configuration: Mapping[str, int], kernel: str | None = None
) -> Iterator[set[tuple[str, str]]]:
    """Launch a kernel, or all, with this configuration; yields which (kernel, key) asked for it."""
    asked = set()

    def answer(name: str, device: torch.device, key: str) -> Mapping[str, int] | None:
        if kernel not in (None, name):
            return None
        asked.add((name, key))
        return configuration or None

    before, tuned.configuration = tuned.configuration, answer
    forget()
    try:
        yield asked
    finally:
        tuned.configuration = before
        forget()


def forget() -> None:
    """Let every launch be chosen anew."""
    from ddb_fast.kernels import launch, triton_attention, triton_group_norm_plan

    triton_group_norm_plan._plan.cache_clear()
    triton_attention.forward_blocks.cache_clear()
    triton_attention.backward_blocks.cache_clear()
    launch._compiled.clear()


def norm_items(
    device: torch.device,
    dtypes: Sequence[str],
    groups: Iterable[tuple[str, shapes.GroupNorm]],
    layouts: Sequence[str],
) -> Iterator[Item]:
    """Triton with every different configuration, and torch, on every shape, dtype and layout."""
    from ddb_fast.kernels import triton_group_norm_plan

    kinds = itertools.product(dtypes, layouts, groups, (False, True))
    for dtype, layout, (_, shape), backward in kinds:
        x = torch.empty(
            (shape.n, shape.c, shape.h, shape.w),
            dtype=speed.DTYPES[dtype],
            device=device,
            memory_format=contenders.LAYOUTS[layout],
        )
        plan = functools.partial(
            triton_group_norm_plan.plan, x, shape.g, backward=backward, dropout=False
        )
        row = {
            "op": "group_norm", "shape": str(shape), "dtype": dtype, "layout": layout,
            "class": tuned.group_norm_class(x.dtype, x.is_contiguous(), x.shape[1:], backward),
            "direction": "backward" if backward else "forward",
        }  # fmt: skip
        candidates = [(configuration, None) for configuration in _NORMS]
        yield from _tried(row, candidates, plan, functools.partial(_norm_timing, device, shape))


def attention_items(
    device: torch.device, dtypes: Sequence[str], groups: Iterable[tuple[str, shapes.Attention]]
) -> Iterator[Item]:
    """Triton with every different configuration, and torch, on every shape and dtype."""
    from ddb_fast.kernels import triton_attention

    directions = {
        "forward": triton_attention.forward_blocks,
        "backward": triton_attention.backward_blocks,
    }
    for dtype, (_, shape), direction in itertools.product(dtypes, groups, directions):
        kind = speed.DTYPES[dtype]
        blocks = functools.partial(directions[direction], kind, shape.s, shape.s, shape.d, device)
        row = {
            "op": "attention", "shape": str(shape), "dtype": dtype, "direction": direction,
            "class": tuned.attention_class(kind, shape.s, shape.d, direction == "backward"),
        }  # fmt: skip
        timing = functools.partial(_attention_timing, device, shape)
        yield from _tried(row, _attention_candidates(blocks), blocks, timing)


def _attention_candidates(
    blocks: Callable[[], Any],
) -> list[tuple[Mapping[str, int], str | None]]:
    """Of each kernel by itself: with dq's launch, that of dk and dv stays what it is."""
    with trying(_DEFAULT) as asked:
        usual = blocks()
    walk = not (usual[0] if isinstance(usual, tuple) else usual).heads
    return [
        (_DEFAULT, None),
        *((c, kernel) for kernel, _ in sorted(asked) for c in (_WALKS[kernel] if walk else _TILES)),
    ]


def _tried(
    about: Row,
    candidates: Iterable[tuple[Mapping[str, int], str | None]],
    plan: Callable[[], Hashable],
    timing: Callable[[Row], measure.Timing],
) -> Iterator[Item]:
    """A row for torch, and one for each candidate that leads to another plan."""
    different = {}
    for configuration, kernel in candidates:
        with trying(configuration, kernel) as asked:
            different.setdefault(plan(), (configuration, kernel, sorted(asked)))
    for backend, choices in (("torch", [(_DEFAULT, None, [])]), ("triton", different.values())):
        for configuration, kernel, asked in choices:
            row = {
                **about, "backend": backend, "configuration": configuration, "kernel": kernel,
                "asked": asked,
            }  # fmt: skip
            names = ("op", "shape", "dtype", "layout", "direction", "backend", "kernel")
            key = " ".join([row[k] for k in names if row.get(k)] + [json.dumps(configuration)])
            yield key, functools.partial(_row, row, timing)


def _row(row: Row, timing: Callable[[Row], measure.Timing]) -> Row:
    try:
        with trying(row["configuration"], row.get("kernel")):
            return {**row, **timing(row).row(), "spills": _spills()}
    except TimeoutError:
        raise
    except Exception as reason:
        # Kept with what it is about: a backend that fails at a shape must not win its class.
        return {**row, "error": rows.reason(reason)}


def _spills() -> int:
    """Registers that the kernels launched since the last `trying` keep in memory."""
    from ddb_fast.kernels import launch

    return max((compiled.n_spills for compiled, _ in launch._compiled.values()), default=0)


def _norm_timing(device: torch.device, shape: shapes.GroupNorm, row: Row) -> measure.Timing:
    run = contenders.ours(row["backend"], shape.g, ("silu",))
    contender = Contender(f"{row['backend']}/{row['layout']}", run, row["layout"])

    def operands(seed: int) -> dict[str, Tensor]:
        return contenders.norm_operands(
            shape, speed.DTYPES[row["dtype"]], ("silu",), contender, device, seed
        )

    size = shape.elements * speed.DTYPES[row["dtype"]].itemsize
    speed.norm_off(shape, ("silu",), contender, operands(0), row["direction"])
    return speed.time_contender(device, contender, row["direction"], operands, 3 * size)


def _attention_timing(device: torch.device, shape: shapes.Attention, row: Row) -> measure.Timing:
    contender = contenders.our_attention(row["backend"])

    def operands(seed: int) -> dict[str, Tensor]:
        return contenders.attention_operands(shape, speed.DTYPES[row["dtype"]], device, seed)

    size = shape.elements * speed.DTYPES[row["dtype"]].itemsize
    speed.attention_off(contender, operands(0), row["direction"])
    return speed.time_contender(device, contender, row["direction"], operands, 7 * size)


def items(device: torch.device) -> Iterator[Item]:
    """All items of the part `tune`: what the U-Nets train in first, winners before candidates."""
    norms, heads = shapes.unique(shapes.GROUP_NORM), shapes.unique(shapes.ATTENTION)
    own = [pair for pair in norms if pair[0] in ("ddb", "lean")]
    others = [pair for pair in norms if pair not in own]
    for dtype in ("bf16", "fp16", "fp32"):
        parts = [
            list(attention_items(device, (dtype,), heads)),
            list(norm_items(device, (dtype,), own, ("nhwc",))),
            list(norm_items(device, (dtype,), others, ("nhwc",))),
            list(norm_items(device, (dtype,), norms, ("nchw",))),
        ]
        for winners in (True, False):
            for part in parts:
                yield from (item for item in part if item[0].endswith("{}") == winners)


def best(
    times: Sequence[Mapping[str, float]], order: Sequence[str], noise: float = NOISE
) -> str | None:
    """Pool the times of several shapes: the first of `order`, unless another beats it by `noise`.

    Only what was measured on every shape takes part; None if nothing was.
    """
    common = [name for name in order if times and all(name in shape for shape in times)]
    if not common:
        return None
    pooled = {name: statistics.geometric_mean(shape[name] for shape in times) for name in common}
    fastest = min(common, key=pooled.__getitem__)
    if pooled[fastest] == math.inf:
        return None
    return common[0] if pooled[common[0]] <= noise * pooled[fastest] else fastest


def from_gpu(measured: Iterable[Row]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(winners, configurations) of the rows of the part `tune`.

    A class "backward" is a call that will be differentiated: forward and backward count together.
    Where two kernels make a call and both are launched otherwise, what each saves is added up.
    A configuration that spills in 16 bits does not count, for it is not shipped.
    """
    pools: dict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(dict)
    timed = [row for row in measured if "us" in row or ("error" in row and "class" in row)]
    timed = [{"us": math.inf, **row} for row in timed if not spills(row)]
    for row in timed:
        tried = json.dumps(row["configuration"])
        for kernel, key in row["asked"]:
            pools[kernel, key].setdefault(row["shape"], {})[tried] = row["us"]
    configurations: dict[str, Any] = defaultdict(dict)
    for (kernel, key), by_shape in pools.items():
        tried = dict.fromkeys(name for shape in by_shape.values() for name in shape)
        order = [json.dumps(_DEFAULT), *tried]
        chosen = best(list(by_shape.values()), order, _NOISE_OF_A_LAUNCH)
        if chosen is not None and json.loads(chosen):
            configurations[kernel][key] = json.loads(chosen)

    times: dict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(dict)
    for row in timed:
        if row["configuration"]:
            continue
        us = row["us"]
        for kernel, key in row["asked"]:
            chosen = configurations.get(kernel, {}).get(key, _DEFAULT)
            tuned_us = pools[kernel, key][row["shape"]][json.dumps(chosen)]
            us = min(us, tuned_us) if us == math.inf else us - row["us"] + tuned_us
        times[row["op"], row["class"]].setdefault(row["shape"], {})[row["backend"]] = us
    winners: dict[str, Any] = defaultdict(dict)
    for (op, shape_class), by_shape in times.items():
        if "/backward/" in shape_class:
            forward = times.get((op, shape_class.replace("/backward/", "/forward/")), {})
            by_shape = {
                shape: {
                    name: us + forward[shape][name]
                    for name, us in backward.items()
                    if name in forward.get(shape, {})
                }
                for shape, backward in by_shape.items()
            }
        order = _order(op, shape_class)
        # A shape of which the time allowed only some backends says nothing.
        whole = [times for times in by_shape.values() if set(order) <= set(times)]
        chosen = best(whole or list(by_shape.values()), order)
        if chosen is not None:
            winners[op][shape_class] = chosen
    return dict(winners), dict(configurations)


def spills(row: Row) -> bool:
    """Whether a configuration keeps registers in memory in 16 bits, so that it is not shipped."""
    return bool(row["configuration"] and row.get("spills") and row["dtype"] != "fp32")


def _order(op: str, shape_class: str) -> tuple[str, ...]:
    # As `dispatch.automatic` tries them where nothing was measured.
    if op == "group_norm":
        return "triton", "torch"
    length = int(shape_class.split("/S")[1].split("/")[0])
    return ("triton", "torch") if length <= dispatch._SHORT else ("torch", "triton")


def from_cpu(measured: Iterable[Row]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(winners, configurations) of the rows of the part `cpu`; there is nothing to configure."""
    pools: dict[str, list[dict[str, float]]] = defaultdict(list)
    for row in measured:
        for layout, shape_class in row.get("classes", {}).items():
            times = {name: row["us"][f"{name}/{layout}"] for name in ("native", "torch")}
            pools[shape_class].append(times)
    winners = {name: best(times, ("native", "torch")) for name, times in pools.items()}
    return {"group_norm": winners}, {}


def write(
    measured_on: Row, command: str, tables: tuple[dict[str, Any], dict[str, Any]], folder: Path
) -> Path:
    """Write the table of this device's architecture for `kernels/tuned.py`, return its path."""
    winners, configurations = ({k: _sorted(v) for k, v in table.items()} for table in tables)
    table = {
        **{k: measured_on[k] for k in ("device", "torch", "triton")}, "command": command,
        "winners": winners, "configurations": configurations,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    path = folder / f"{tuned.architecture(torch.device(measured_on['type'], 0))}.json"
    path.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    return path


def _sorted(table: Mapping[str, Any]) -> dict[str, Any]:
    return dict(sorted(table.items()))
