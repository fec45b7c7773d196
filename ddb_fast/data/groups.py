"""The groups of a labelled set: every (class, bias attribute) pair, as one object.

Loss, sampler, metrics and report all number, count and name groups through it, so that they cannot
disagree. Evaluation builds it from true bias labels; DDB-I from pseudo labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


def _labels(
    name: str, values: Tensor | Sequence[int], limit: int, *, size: int | None = None
) -> Tensor:
    tensor = torch.as_tensor(values)
    if tensor.ndim != 1 or (size is not None and len(tensor) != size):
        expected = "(N,)" if size is None else f"({size},)"
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(f"{name} must hold integers, got {tensor.dtype}")
    outside = tensor[(tensor < 0) | (tensor >= limit)]
    if len(outside) > 0:
        raise ValueError(f"{name} has {len(outside)} values outside 0..{limit - 1}: {outside[0]}")
    return tensor.long()


def majority_bias(
    y: Tensor | Sequence[int], a: Tensor | Sequence[int], *, num_classes: int, num_biases: int
) -> Tensor:
    """Return the bias attribute that most images of each class have, the lowest one on a tie.

    y, a: (N,) integers. Returns (num_classes,) int64; 0 for a class without images. ValueError for
    labels outside their range or of different lengths.
    """
    y = _labels("y", y, num_classes)
    a = _labels("a", a, num_biases, size=len(y))
    ids = y * num_biases + a
    counts = torch.bincount(ids, minlength=num_classes * num_biases)
    return counts.view(num_classes, num_biases).argmax(dim=1)


@dataclass(frozen=True, eq=False)
class Groups:
    """N samples with class y and bias attribute a; group g = y * num_biases + a.

    y, a: (N,) int64. aligned_bias: (num_classes,) int64, the attribute that makes a sample of the
    class bias-aligned. Build it with `from_labels`, and a further split of the same data with
    `with_labels`. ValueError for labels outside their range, lengths or names that do not fit.
    """

    y: Tensor
    a: Tensor
    class_names: tuple[str, ...]
    bias_names: tuple[str, ...]
    aligned_bias: Tensor

    def __post_init__(self) -> None:
        y = _labels("y", self.y, self.num_classes)
        a = _labels("a", self.a, self.num_biases, size=len(y))
        aligned = _labels("aligned_bias", self.aligned_bias, self.num_biases, size=self.num_classes)
        for name, tensor in (("y", y), ("a", a), ("aligned_bias", aligned)):
            object.__setattr__(self, name, tensor.to(y.device))

    @classmethod
    def from_labels(
        cls,
        y: Tensor | Sequence[int],
        a: Tensor | Sequence[int],
        *,
        num_classes: int | None = None,
        num_biases: int | None = None,
        class_names: Sequence[str] | None = None,
        bias_names: Sequence[str] | None = None,
        aligned_bias: Tensor | Sequence[int] | None = None,
    ) -> "Groups":
        """Build the groups of labels y and a; what is not given is read off the labels.

        y, a: (N,) integers. Names default to the numbers. aligned_bias defaults to y itself where
        there are as many attributes as classes, as in the benchmarks, and otherwise to each class's
        majority attribute among these labels (pass `majority_bias(...)` to ask for that in every
        case). ValueError as for the class, and for a set without samples and without counts.
        """
        y, a = torch.as_tensor(y), torch.as_tensor(a)
        class_names = _names("class", y, num_classes, class_names)
        bias_names = _names("bias", a, num_biases, bias_names)
        sizes = {"num_classes": len(class_names), "num_biases": len(bias_names)}
        if aligned_bias is None:
            square = len(class_names) == len(bias_names)
            aligned_bias = (
                torch.arange(len(class_names)) if square else majority_bias(y, a, **sizes)
            )
        return cls(y, a, class_names, bias_names, torch.as_tensor(aligned_bias))

    def with_labels(self, y: Tensor | Sequence[int], a: Tensor | Sequence[int]) -> "Groups":
        """Return the groups of other samples, with the classes, names and alignment of these."""
        return replace(self, y=torch.as_tensor(y), a=torch.as_tensor(a))

    def __len__(self) -> int:
        return len(self.y)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_biases(self) -> int:
        return len(self.bias_names)

    @property
    def num_groups(self) -> int:
        return self.num_classes * self.num_biases

    @cached_property
    def ids(self) -> Tensor:
        """Group of each sample, (N,) int64."""
        return self.y * self.num_biases + self.a

    @cached_property
    def counts(self) -> Tensor:
        """Samples in each group, (num_groups,) int64."""
        return torch.bincount(self.ids, minlength=self.num_groups)

    @cached_property
    def bias_aligned(self) -> Tensor:
        """Whether each sample has its class's aligned attribute, (N,) bool."""
        return self.a == self.aligned_bias[self.y]

    @property
    def y_of(self) -> Tensor:
        """Class of each group, (num_groups,) int64."""
        return torch.arange(self.num_groups, device=self.y.device) // self.num_biases

    @property
    def a_of(self) -> Tensor:
        """Bias attribute of each group, (num_groups,) int64."""
        return torch.arange(self.num_groups, device=self.y.device) % self.num_biases

    @property
    def names(self) -> tuple[str, ...]:
        """One name a group, such as `y=landbird a=water`."""
        return tuple(f"y={y} a={a}" for y in self.class_names for a in self.bias_names)


def training_groups(
    y: Tensor,
    a: Tensor,
    *,
    class_names: Sequence[str],
    bias_names: Sequence[str],
    aligned_bias: Sequence[int] | None,
) -> Groups:
    """The groups of training images, aligned as told, else as most images of each class are.

    Numbers of y and a need not correspond, so there is no other default.
    """
    if aligned_bias is None:
        sizes = {"num_classes": len(class_names), "num_biases": len(bias_names)}
        aligned_bias = majority_bias(y, a, **sizes)
    return Groups.from_labels(
        y, a, class_names=class_names, bias_names=bias_names, aligned_bias=aligned_bias
    )


def _names(
    kind: str, labels: Tensor, count: int | None, names: Sequence[str] | None
) -> tuple[str, ...]:
    if count is None:
        if names is None and labels.numel() == 0:
            raise ValueError(f"no samples: give the number of {kind} labels or their names")
        count = len(names) if names is not None else max(int(labels.max()) + 1, 1)
    if count < 1 or (names is not None and len(names) != count):
        raise ValueError(f"{count} {kind} labels and the names {names} do not fit")
    return tuple(str(i) for i in range(count)) if names is None else tuple(names)
