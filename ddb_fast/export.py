"""`ddb-fast export`: one model of a run as a folder that goes without the run.

`pretrained` is what `from_pretrained` reads. `torch-export` and `onnx` hold the classifier or the
amplifier as a program, for places without this package; a program is read back and compared with
the model before its folder takes its name.
"""

import copy
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ddb_fast.checkpoint import whole_folder, write_atomically
from ddb_fast.data.pixels import value_range
from ddb_fast.pretrained import DESCRIPTION, BiasAmplifier, Classifier, Generator

PROGRAMS = {"torch-export": "model.pt2", "onnx": "model.onnx"}
TOLERANCE = 1e-5
"""Largest difference of a logit, in units of the largest logit where that exceeds 1."""


class _Program(nn.Module):
    """What is exported: RGB pixels in [0, 1], (N, 3, S, S) of the network's size -> logits fp32."""

    def __init__(self, model: Classifier | BiasAmplifier) -> None:
        super().__init__()
        # Both formats store plain rows of numbers, for which channels_last weights are views.
        self.network = copy.deepcopy(model.network).to(memory_format=torch.contiguous_format)
        # `normalise` as what it does to black and white: its kept statistics must not be traced.
        black, white = value_range(model.config.pixel_norm)
        self.register_buffer("black", black)
        self.register_buffer("span", white - black)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images * self.span + self.black).float()


def _examples(model: Classifier | BiasAmplifier, count: int) -> Tensor:
    size, generator = model.config.image_size, torch.Generator().manual_seed(count)
    return torch.rand((count, 3, size, size), generator=generator)


def torch_program(model: Classifier | BiasAmplifier) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    """The model as a `torch.export` program: the file, and what comes of reading it again."""
    program = torch.export.export(
        _Program(model), (_examples(model, 2),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
    )
    program.example_inputs = None  # they would be stored as a pickle
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # places on this machine
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue(), torch.export.load(io.BytesIO(file.getvalue())).module()


def onnx_program(
    model: Classifier | BiasAmplifier,
) -> tuple[bytes, Callable[[Tensor], Tensor] | None]:
    """The model as ONNX, input `images`, output `logits`: the file, and what onnxruntime makes.

    None in its place where onnxruntime is not installed; ValueError where the exporter is not.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"format onnx needs {' and '.join(missing)}: pip install onnx onnxscript")
    program = torch.onnx.export(
        _Program(model),
        (_examples(model, 2),),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    proto = program.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # places on this machine
    file = proto.SerializeToString()
    if importlib.util.find_spec("onnxruntime") is None:
        return file, None
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return file, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.inference_mode()
def largest_difference(
    model: Classifier | BiasAmplifier, program: Callable[[Tensor], Tensor]
) -> float:
    """Compare a program with its model on batches of other sizes than it was made with.

    Returns the largest difference of a logit; ValueError where it exceeds the tolerance.
    """
    largest = 0.0
    for count in (1, 5):
        images = _examples(model, count)
        expected, found = model(images), program(images)
        if found.shape != expected.shape:
            raise ValueError(f"the program answers {tuple(found.shape)}, not {expected.shape}")
        difference = (found - expected).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            raise ValueError(
                f"the program's logits differ from the model's by {difference:.2g}, more than "
                f"{TOLERANCE:g}; nothing was written"
            )
        largest = max(largest, difference)
    return largest


def export(model: Classifier | BiasAmplifier | Generator, out: Path, *, format: str) -> str:
    """Write a folder, as `whole_folder` does; return a line that says what was checked.

    model: on the CPU, in eval mode. out: a folder that is empty or not there. ValueError for
    another one, for a generator in another format than pretrained, and for a program that does not
    compute what the model does.
    """
    if format in PROGRAMS and isinstance(model, Generator):
        raise ValueError(f"format {format}: only classifier and amplifier; use pretrained")
    with whole_folder(out, last=DESCRIPTION) as unfinished:
        return _write(model, unfinished, format)


def _write(model: Classifier | BiasAmplifier | Generator, folder: Path, format: str) -> str:
    if format == "pretrained":
        model.save_pretrained(folder)
        return f"{type(model).__name__}.from_pretrained reads it"
    file, program = (torch_program if format == "torch-export" else onnx_program)(model)
    said = "not checked: onnxruntime is not installed"
    if program is not None:
        said = f"largest difference to the model's logits: {largest_difference(model, program):.2g}"
    name = PROGRAMS[format]
    write_atomically(folder / name, file)
    write_atomically(folder / "README.md", str(model.generate_model_card(file=name)))
    model.save_description(folder)
    return said
