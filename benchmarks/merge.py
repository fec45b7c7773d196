"""Rows of the suite as Markdown: one page a part under results/<device>/."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import rows
import tune
from rows import Row

RESULTS = Path(__file__).parent / "results"


def table(header: Iterable[str], body: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; numbers with three digits, None as a dash."""
    lines = [list(header)]
    lines += [["---"] * len(lines[0]), *([_text(cell) for cell in line] for line in body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    if not isinstance(cell, float):
        return str(cell).replace("|", "\\|")
    return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"


def page(measured_on: Row, part: str, found: list[Row], command: str) -> str:
    """The page of a part: what it was measured on, its tables, and what could not be measured."""
    versions = ", ".join(f"{k} {measured_on[k]}" for k in ("torch", "triton", "cuda", "python"))
    head = f"# {part}\n\n{measured_on['device']}; {versions}. Written by `{command}`.\n"
    good = [row for row in found if "error" not in row]
    text = _TABLES[part](good)
    failed = [(row["key"], row["error"]) for row in found if "error" in row]
    if failed:
        text += "\n## Not measured\n" + table(("row", "reason"), failed)
    return f"{head}\n{text}"


def _kernels(found: list[Row]) -> str:
    """A line for each shape, microseconds of every contender side by side."""
    text = (
        "Microseconds, medians. CE: the time of ours over that of y.copy_(x) on a tensor like x. "
        "ours / best: time of the fastest other contender over ours, above 1 where ours wins. "
        "compile: mode max-autotune, without its coordinate descent.\n"
    )
    groups: dict[tuple, dict[str, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in found:
        if "op" in row:
            title = (row["op"], row["dtype"], row["options"], row["direction"])
            groups[title][row["shape"]][row["contender"]] = row
    for title, by_shape in groups.items():
        names = list(dict.fromkeys(name for shape in by_shape.values() for name in shape))
        body = []
        for shape, by_name in by_shape.items():
            own = [by_name[n] for n in by_name if n.split("/")[0] in ("triton", "native")]
            other = [x["us"] for n, x in by_name.items() if x not in own]
            first = min(own, key=lambda row: row["us"]) if own else {}
            body.append(
                [
                    shape,
                    *(by_name.get(name, {}).get("us") for name in names),
                    first.get("CE"),
                    first.get("GB/s"),
                    first.get("TFLOP/s"),
                    min(other) / first["us"] if first and other else None,
                ]
            )
        header = ("shape", *names, "CE", "GB/s", "TFLOP/s", "ours / best")
        text += f"\n## {' '.join(filter(None, title))}\n" + table(header, body)
    host = [(r["host"], r["contender"], r["direction"], r["us"]) for r in found if "host" in r]
    if host:
        header = ("op", "contender", "direction", "us")
        text += "\n## Host cost of an eager call\n" + table(header, host)
    absent = [(row["absent"], row["why"]) for row in found if "absent" in row]
    if absent:
        text += "\n## Absent\n" + table(("contender", "why"), absent)
    return text


def _cpu(found: list[Row]) -> str:
    text = (
        "Milliseconds of native, in C++, beside eager torch and torch.compile, taken in turns; "
        "blocks of less than 32 MiB are reused, larger ones come fresh from the kernel. Two "
        "ratios, of times over native's in channels_last: of eager in channels_last, and of the "
        "fastest other in any layout. Attention: heads of a packed projection, torch's is its "
        "scaled dot product attention; GFLOP/s of native.\n"
    )
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in found:
        groups[row["op"], row["dtype"], row["direction"]].append(row)
    for (op, dtype, direction), part in groups.items():
        ratios, line = _CPU_LINES[op]
        names = list(part[0]["us"])
        body = [
            (row["shape"], *(row["us"][name] / 1e3 for name in names), *line(row)) for row in part
        ]
        title = f"{dtype} {direction}" if op == "group_norm" else f"{op}, {dtype} {direction}"
        text += f"\n## {title}\n" + table(("shape", *names, *ratios), body)
        for at, name in enumerate(ratios, start=1 + len(names)):
            if " / " in name:
                column = [cells[at] for cells in body]
                text += f"\n{name}: median {median(column):.2f}, least {min(column):.2f}.\n"
    return text


def _cpu_norm(row: Row) -> tuple[float, float]:
    times, ours = row["us"], row["us"]["native/nhwc"]
    other = min(us for name, us in times.items() if not name.startswith("native"))
    return times["torch/nhwc"] / ours, other / ours


def _cpu_attention(row: Row) -> tuple[float, str, float]:
    return row["us"]["torch"] / row["us"]["native"], row["automatic"], row["GFLOP/s"]


_CPU_LINES = {
    "group_norm": (("eager / native", "best / native"), _cpu_norm),
    "attention": (("torch / native", "automatic", "GFLOP/s"), _cpu_attention),
}


def _correctness(found: list[Row]) -> str:
    """Counts, and every row that is not within its bounds."""
    counts = Counter("ok" if row["ok"] else "FAILED" for row in found)
    text = ", ".join(f"{n} {name}" for name, n in counts.items()) + "\n\n"
    worst: dict[str, Row] = {}
    for row in found:
        if "output" in row:
            name = " ".join(row["key"].split()[:4])
            before = worst.setdefault(name, row)
            ratio = row["gradient"] / row["gradient bound"]
            if ratio > before["gradient"] / before["gradient bound"]:
                worst[name] = row
    names = ("output", "output bound", "gradient", "gradient bound")
    body = [(name, *(f"{row[n]:.1e}" for n in names)) for name, row in worst.items()]
    text += table(("worst of", *names), body)
    others = [row for row in found if "output" not in row or not row["ok"]]
    lines = [(row["key"], row["ok"], _details(row, {"key", "took", "ok"})) for row in others]
    return text + "\n" + table(("case", "ok", "what"), lines)


def _details(row: Row, without: set[str]) -> str:
    return ", ".join(f"{k} {_text(x)}" for k, x in row.items() if k not in without)


def _tune(found: list[Row]) -> str:
    """For each shape torch, the default, and the fastest configuration of each kernel.

    Best adds up what they save: each was measured with the other kernel of the call at its default.
    """
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in found:
        names = [row[k] for k in ("op", "shape", "dtype", "layout", "direction") if k in row]
        groups[" ".join(names), row["class"]].append(row)
    body = []
    for (name, shape_class), part in groups.items():
        us = {row["backend"]: row["us"] for row in part if not row["configuration"]}
        default = us.get("triton")
        fastest: dict[str | None, Row] = {}
        for row in part:
            if default is not None and row["configuration"] and not tune.spills(row):
                kernel = row.get("kernel")
                if row["us"] < fastest.get(kernel, {"us": default})["us"]:
                    fastest[kernel] = row
        best = default and default - sum(default - row["us"] for row in fastest.values())
        choice = "; ".join(
            " ".join(filter(None, (kernel, *(f"{k}={x}" for k, x in row["configuration"].items()))))
            for kernel, row in fastest.items()
        )
        body.append((name, shape_class, us.get("torch"), default, best, choice))
    return table(("what", "class", "torch us", "default us", "best us", "best"), body)


def _networks(found: list[Row]) -> str:
    """Every figure of every form, and how many times faster ours is at the same batch."""
    names = [k for k in found[0] if k not in ("key", "took", "form", "batch")] if found else []
    for row in found:
        names += [k for k in row if k not in (*names, "key", "took", "form", "batch")]
    ours = {row["batch"]: row["images/s"] for row in found if row["form"] == "ours"}
    body = [
        (
            row["form"],
            row["batch"],
            *(row.get(name) for name in names),
            ours[row["batch"]] / row["images/s"] if row["batch"] in ours else None,
        )
        for row in found
    ]
    return table(("form", "batch", *names, "ours is faster"), body)


def _in_turns(found: list[Row]) -> str:
    """Seconds of forms that took turns, and how many times as long each took as ours."""
    text = ""
    for row in found:
        seconds, cores = row["seconds"], row["core seconds"]
        body = [
            (
                *(name, seconds[name], " to ".join(map(_text, row["spread"][name]))),
                *(seconds[name] / seconds["ours"], cores[name], cores[name] / cores["ours"]),
            )
            for name in seconds
        ]
        notes = _details(row, {"key", "took", "what", "seconds", "spread", "core seconds"})
        header = ("form", "seconds", "1st to 9th tenth", "times ours", "core seconds", "times ours")
        text += f"\n## {row['what']}\n{table(header, body)}\n{notes}\n"
    return text


def _swapped(found: list[Row]) -> str:
    """Another library's network with and without our operators."""
    if not found:
        return ""
    names = (
        "what",
        "way",
        "batch",
        "ms",
        "ms_10",
        "ms_90",
        "forward ms",
        "images/s",
        "peak GB",
        "how",
    )
    body = [[row.get(name) for name in names] for row in found]
    return "\n## `optimize`, a training step and a forward pass\n" + table(names, body)


def _memory(found: list[Row]) -> str:
    if not found:
        return ""
    ours = next((row["peak MB"] for row in found if row["form"] == "ours"), None)
    body = [
        (r["form"], r["batch"], r["peak MB"], r["kept MB"], ours and r["peak MB"] / ours)
        for r in found
    ]
    header = ("form", "batch", "peak beyond what is kept, MB", "resident before, MB", "times ours")
    return "\n## Memory of a training step\n" + table(header, body)


def _step(found: list[Row]) -> str:
    """Of a GPU a line a form; of a CPU the forms side by side, and their memory."""
    memory = [row for row in found if "kept MB" in row]
    turns = [row for row in found if "seconds" in row]
    swapped = [row for row in found if "way" in row]
    forms = [row for row in found if not any(row in part for part in (memory, turns, swapped))]
    text = _networks(forms) if forms else ""
    return text + _swapped(swapped) + _in_turns(turns) + _memory(memory)


def _scaling(found: list[Row]) -> str:
    """Images a second and microseconds of looking up, a line a number of images and batch."""
    text = ""
    for name, title in (
        ("images/s", "Images a second"),
        ("lookups us", "Microseconds a step for sampler, pixels and the method's tables"),
    ):
        header = ("batch", "images", *found[0][name]) if found else ()
        body = [(row["batch"], row["images"], *row[name].values()) for row in found]
        text += f"\n## {title}\n" + (table(header, body) if found else "")
    body = [
        (r["batch"], r["images"], r["anonymous MB"], max(r["grown MB"].values())) for r in found
    ]
    header = ("batch", "images", "in the generator's training, MB", "most grown in a training, MB")
    return text + "\n## Anonymous memory\n" + table(header, body)


_TABLES: dict[str, Callable[[list[Row]], str]] = {
    "correctness": _correctness,
    "kernels": _kernels,
    "tune": _tune,
    "step": _step,
    "sampling": _step,
    "cpu": _cpu,
    "scaling": _scaling,
}


def merge(out: Path, command: str, results: Path = RESULTS) -> list[Path]:
    """Write a page for every file of rows in `out`; returns the pages.

    Raises ValueError if there is none, or a file is not one that the suite wrote.
    """
    written = []
    for part in _TABLES:
        there = rows.of_part(out, part)
        if there is None:
            continue
        measured_on, found = there
        device = re.sub(r"[^a-z0-9]+", "-", measured_on["device"].lower()).strip("-")
        page_path = results / device / f"{part}.md"
        page_path.parent.mkdir(parents=True, exist_ok=True)
        text = page(measured_on, part, list(found.values()), command)
        page_path.write_text(text, "utf-8")
        written.append(page_path)
    if not written:
        raise ValueError(f"{out}: no rows of the suite in it")
    return written
