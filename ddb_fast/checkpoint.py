"""Files that a killed process cannot leave half written, and training state as safetensors.

Everything is written to a temporary name, flushed and renamed. A checkpoint is one safetensors
file: tensors of the model, its moving average, the optimiser and the recipe under their prefixes,
and scalars with the configuration as JSON in the metadata. Nothing is pickled.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def _replace(temporary: Path, path: Path) -> None:
    # safetensors makes files that only their owner can read.
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o666 & ~mask)
    descriptor = os.open(temporary, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name of this process's own, which takes the place of `path` once the block has written it.

    OSError, which names `path`, when the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_atomically(path: Path, content: str | bytes | Iterable[str]) -> None:
    """Write a whole file or nothing; OSError, which names it, when the disk refuses.

    content: or its parts, which need not all be in memory. A link stays: the file that it names is
    written. What is there and no regular file, a device or a pipe, is written to as it is.
    """
    parts = [content] if isinstance(content, str | bytes) else content

    def write(target: Path) -> None:
        with target.open("wb") as file:
            for part in parts:
                file.write(part.encode() if isinstance(part, str) else part)

    if path.exists() and not path.is_file():
        write(path)
        return
    with _whole(Path(os.path.realpath(path))) as temporary:
        write(temporary)


@contextlib.contextmanager
def whole_folder(out: Path, *, last: str | None = None) -> Iterator[Path]:
    """A folder to fill, which is `out` once the block ends and nowhere if it fails.

    Where `out` is there, empty, it stays: it may be a mount point, a link or where somebody stands.
    Then what the folder holds is moved into it, `last` after the rest. ValueError, one line, if it
    holds anything; OSError, with a name, when the disk refuses.
    """
    out = Path(os.path.realpath(out))
    there = out.is_dir()
    unfinished = out / ".part" if there else out.with_name(f".{out.name}.part")
    if out.exists() and (not there or any(path != unfinished for path in out.iterdir())):
        raise ValueError(f"{out}: there already, and not an empty folder; name another one")
    if unfinished.exists():  # of a process that was killed
        shutil.rmtree(unfinished)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        if there:
            for path in sorted(unfinished.iterdir(), key=lambda path: (path.name == last, path)):
                os.replace(path, out / path.name)
        else:
            os.replace(unfinished, out)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a write does not say where
            raise OSError(error.errno, error.strerror, str(out)) from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and JSON metadata as safetensors, whole or not at all; else OSError."""
    # safetensors stores contiguous tensors; clone() also separates views that share memory.
    flat = {name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()}
    try:
        with _whole(path) as temporary:
            save_file(flat, str(temporary), {key: json.dumps(v) for key, v in metadata.items()})
            _sort_metadata(temporary)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None


def _sort_metadata(path: Path) -> None:
    """Sort the names of the metadata, which safetensors writes in an order of chance.

    So that what is equal is equal byte for byte.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            assert len(text) <= size, "the tensors begin where the header ends"
            file.seek(8)
            file.write(text.ljust(size))


def read_metadata(path: Path) -> dict[str, Any]:
    """The JSON metadata of a file written by `save_tensors`; ValueError if it is none."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not one of our safetensors files ({error})") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors on the CPU and the metadata; ValueError if the file is missing or damaged."""
    metadata = read_metadata(path)
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


def load_into(module: torch.nn.Module, tensors: dict[str, torch.Tensor], *, source: str) -> None:
    """Load a state dict strictly; a difference of names or shapes is one line of ValueError."""
    own = module.state_dict()
    wrong = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(t.shape)}"
        for name, t in own.items()
        if name in tensors and tensors[name].shape != t.shape
    ]
    missing = [f"{name} is missing" for name in own if name not in tensors]
    extra = [f"{name} is not of this network" for name in tensors if name not in own]
    problems = wrong + missing + extra
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ValueError(f"{source}: a checkpoint of another shape: {problems[0]}{more}")
    module.load_state_dict(tensors)


def select(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The entries below `prefix.`, with it removed."""
    return {k[len(prefix) + 1 :]: t for k, t in tensors.items() if k.startswith(f"{prefix}.")}


def with_prefix(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `select`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimiser's per-parameter state as `index.name` tensors; its options are configuration."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, entry in state.items()
        for name, value in entry.items()
        if value is not None
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:
            # Fused optimisers walk state and weights through memory side by side, so the state has
            # to lie as its weights do (channels_last); the file holds it contiguous.
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
