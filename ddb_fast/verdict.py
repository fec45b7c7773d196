"""Is there a bias at all? A verdict without bias labels, from what several networks predict.

An amplifier is wrong on some real images in any case, for its generator is not perfect. Those
errors differ from network to network, and a network trained on the real images makes few of them.
Errors that a shortcut makes are the same for every network that learnt it. So are those on images
whose class nobody can tell, and on mislabelled ones. But what breaks a shortcut shows its class
otherwise, so a network that meets such images more often learns to tell it; where nothing tells
the class, the best guess stays what it was, and a network that meets the exceptions more often can
only come to order images worse.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ddb_fast.metrics import wilson_interval

UNANIMOUS = 0.4
"""Up to a seventh of an amplifier's errors are unanimous on unbiased digits with right labels, more
where classes overlap (docs/verdict.md)."""
FEWEST = 5
"""Unanimous errors that make a bias: a handful is as likely to be mislabelled."""
GAIN = 2.0
"""Standard errors above 0 of what images at odds gain by being met more often; without a bias the
gain is negative, or next to nothing."""
SHARED = 0.5
"""Share of the ERM's errors that both amplifiers make too, above which no set is called unbiased:
up to .48 on unbiased digits with right labels (docs/verdict.md), while networks that learnt a
shortcut err alike."""
NONE = -1
"""In place of a class: the amplifiers name different ones."""
POOR = 0.14
"""By how much more often an amplifier may err on real images than the ERM, before the generator
says too little of them to call a set unbiased; half of what the ERM learnt, where that is less.
Unbiased digits whose generator served had up to .13 (docs/verdict.md)."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One of the things looked at: a `value` that is compared with `limit`, and what came of it."""

    name: str
    question: str
    value: float | None
    limit: float
    passed: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class Verdict:
    """found: None where nothing can be said, for want of training or of a good generator.

    at_odds: (N,) bool, the images on which it rests.
    """

    found: bool | None
    at_odds: Tensor
    checks: tuple[Check, ...]


def agreed(amplifier: Tensor, again: Tensor) -> Tensor:
    """The class that both amplifiers name, NONE where they differ; all (N,) int64."""
    return torch.where(amplifier == again, amplifier, NONE)


def at_odds(y: Tensor, taken: Tensor) -> Tensor:
    """Which images both amplifiers take for the same other class, (N,) bool; taken: of `agreed`."""
    return (taken != NONE) & (taken != y)


def standing(logits: Tensor, y: Tensor, taken: Tensor) -> Tensor:
    """How far up each image at odds stands among those it looks like: (N,) fp64, NaN for others.

    logits: (N, K) of one network. y: (N,) classes. taken: (N,), from `agreed`; an image is typical
    if its own class is there. The standing of one of class y taken for class t is the share of the
    typical images of t whose log-odds of y against t are lower, ties by half: the area under the
    ROC curve that this image contributes. NaN also where no image is typical of t.
    """
    result = torch.full(y.shape, torch.nan, dtype=torch.float64)
    odd = at_odds(y, taken)
    for other in taken[odd].unique().tolist():
        of_other = taken == other
        usual, unusual = logits[of_other & (y == other)], (of_other & odd).nonzero()[:, 0]
        for own in y[unusual].unique().tolist() if len(usual) else ():
            rows = unusual[y[unusual] == own]
            compared = _margin(usual, own, other).sort().values
            asked = _margin(logits[rows], own, other)
            below = torch.searchsorted(compared, asked)
            above = torch.searchsorted(compared, asked, right=True)
            result[rows] = (below + above).double() / (2 * len(compared))
    return result


def _margin(logits: Tensor, own: int, other: int) -> Tensor:
    return logits[:, own].double() - logits[:, other].double()


def judge(y: Tensor, *, amplifier: Tensor, again: Tensor, erm: Tensor, gain: Tensor) -> Verdict:
    """Judge whether what the amplifiers get wrong is a bias; all (N,).

    amplifier, again: int64 classes that two networks predict which were trained on the synthetic
    images from other first weights; erm: networks of the same kind trained on real images, each
    asked of images that it has not seen. gain: by how much higher an image at odds stands
    (`standing`) with networks which met images at odds as often as the others of their class than
    with erm; NaN for others.

    Nothing can be said unless the ERM learnt something: the upper 95 % Wilson bound of its errors
    is below what naming the largest class each time would give. A bias is found if, of the images
    that an amplifier gets wrong, the share for which both and the ERM name the same wrong class has
    a lower bound above .4, they are at least five, those on which the amplifiers agree are a
    minority, neither amplifier names about the same class each time (the mean over the classes of
    its recall's lower bound is above 1 / classes), and the mean of at least five gains is more than
    two of its standard errors above 0. To say that there is none takes unanimity to be missed, a
    generator whose worse amplifier errs on at most .14 of the images more than the ERM, and is
    nearer to it than to naming the largest class each time (amplifiers that guess say nothing,
    however little the ERM learnt), and an ERM most of whose errors may be its own: the lower bound
    of the share that is unanimous is at most .5.

    ValueError for other shapes.
    """
    said = {"amplifier": amplifier, "again": again, "erm": erm, "gain": gain}
    for name, values in said.items():
        if values.shape != y.shape or y.ndim != 1:
            raise ValueError(f"{name} {tuple(values.shape)} for y {tuple(y.shape)}: not (N,)")
    wrong, wrong_again = amplifier != y, again != y
    odd = at_odds(y, agreed(amplifier, again))
    errors = (wrong | wrong_again).sum().item()
    unanimous = (odd & (erm == amplifier)).sum().item()
    erm_errors, guessed = (erm != y).sum().item(), (y != y.mode().values).sum().item()
    excess = (max(wrong.sum().item(), wrong_again.sum().item()) - erm_errors) / len(y)
    poor = min(POOR, max(0, guessed - erm_errors) / len(y) / 2)
    gains = gain[~gain.isnan()].double()
    mean, limit = None, 0.0
    if len(gains) >= FEWEST:
        mean, limit = gains.mean().item(), GAIN * (gains.std() / len(gains) ** 0.5).item()
    checks = (
        Check(
            name="learnt",
            question="Does the network trained on the real images err less than who names the most "
            "frequent class each time?",
            value=erm_errors / len(y),
            limit=guessed / len(y),
            passed=wilson_interval(erm_errors, len(y))[1] < guessed / len(y),
        ),
        Check(
            name="unanimous",
            question="Do networks of other first weights, and one trained on the real images, make "
            "the same errors?",
            value=unanimous / errors if errors else None,
            limit=UNANIMOUS,
            passed=unanimous >= FEWEST
            and wilson_interval(unanimous, errors)[0] > UNANIMOUS
            and _tells_classes_apart(y, amplifier)
            and _tells_classes_apart(y, again)
            and 2 * odd.sum().item() < len(y),
        ),
        Check(
            name="separable",
            question="Does anything else tell their class: how much better are images at odds told "
            "from those they look like by networks that met them as often as the others?",
            value=mean,
            limit=limit,
            passed=mean is not None and mean > limit > 0,
        ),
        Check(
            name="generator",
            question="Is the generator good enough to say that there is none: how much more often "
            "do networks err that learnt from its images?",
            value=excess,
            limit=poor,
            passed=excess <= poor,
        ),
        Check(
            name="shared",
            question="Are errors of the network trained on the real images its own: how many of "
            "them do both that learnt from generated ones make too?",
            value=unanimous / erm_errors if erm_errors else None,
            limit=SHARED,
            passed=unanimous < FEWEST or wilson_interval(unanimous, erm_errors)[0] <= SHARED,
        ),
    )
    learnt, unanimity, separable, generator, shared = checks
    found = None
    if learnt.passed and unanimity.passed:
        found = True if separable.passed else None
    elif learnt.passed and generator.passed and shared.passed:
        found = False
    return Verdict(found=found, at_odds=odd, checks=checks)


def _tells_classes_apart(y: Tensor, predicted: Tensor) -> bool:
    """Each class counts alike: as often as the others, an amplifier has seen it."""
    counts = y.bincount()
    right = y[predicted == y].bincount(minlength=len(counts))
    pairs = zip(right.tolist(), counts.tolist(), strict=True)
    return sum(wilson_interval(k, n)[0] for k, n in pairs if n) > 1


def sentences(verdict: Verdict, count: int) -> list[str]:
    """The verdict on `count` training images, for a reader who is no expert."""
    odd = int(verdict.at_odds.sum())
    learnt, unanimous, separable, generator, shared = verdict.checks
    share = 100 * (unanimous.value or 0.0)
    if not learnt.passed:
        return [
            "Nothing can be said about a bias: too little was learnt.",
            f"A network trained on the real images errs on {100 * learnt.value:.0f} % of others, "
            "and who names the most frequent class each time errs on "
            f"{100 * learnt.limit:.0f} %.",
            "Train longer (--amplifier.images, --diffusion.images), or give it more images.",
        ]
    odds = f"{odd} of {count} training images ({100 * odd / count:.1f} %) are at odds with "
    odds += "what most images of their class look like."
    agree = (
        "Two networks that learnt from generated images alone take them for the same other class. "
        f"On {share:.0f} % of all images that either gets wrong, a network trained on the real "
        "images makes the same mistake as both."
    )
    if verdict.found:
        return [
            f"A bias was found: {odds}",
            agree,
            "They are told from that class the better the more often a network meets them, so "
            "something else shows what they are. Some may be mislabelled all the same: look at "
            "them.",
        ]
    if unanimous.passed and separable.value is not None and separable.value < -separable.limit:
        return [
            f"No bias is shown, though {odds}",
            agree,
            "But a network that meets them more often tells them from that class less well: as "
            "where labels are wrong, or where nothing tells the classes apart. Look at them.",
        ]
    if unanimous.passed:
        return [
            f"There may be a bias: {odds}",
            agree,
            "Whether a network that meets them more often tells them from that class better is not "
            "certain: they may be too few, or mislabelled, or of classes that nothing tells apart. "
            "Look at them.",
        ]
    if verdict.found is None and generator.passed:
        return [
            "There may be a bias; the generator is not good enough to tell.",
            "Of the images that a network trained on the real images gets wrong, "
            f"{100 * shared.value:.0f} % are taken for the same other class by two networks that "
            "learnt from generated images alone, as where all have learnt a shortcut; but of all "
            f"that either gets wrong only {share:.0f} % are, as where a generator is poor.",
            "Train it longer (--diffusion.images), and look at the images at odds.",
        ]
    if verdict.found is None:
        return [
            "Nothing can be said about a bias: the generator is too poor.",
            "Networks that learnt from its images err on real ones "
            f"{100 * generator.value:.0f} points more often than one trained on real images: for "
            "want of training, or for a shortcut.",
            "Look at the pictures; train it longer (--diffusion.images), or give it more images.",
        ]
    return [
        f"No bias was found among {count} training images.",
        "Networks that learnt from generated images alone err on some real ones, but on only "
        f"{share:.0f} % of these do they and a network trained on the real images agree.",
        "Not every shortcut would have been: one that only a few images break, or that few follow, "
        "may be missed, and one beside something that shows the class as plainly.",
    ]


def as_data(verdict: Verdict, y: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """The verdict as results.json holds it."""
    rows = [
        {
            "name": name,
            "count": int((y == label).sum()),
            "suspicious": int((verdict.at_odds & (y == label)).sum()),
        }
        for label, name in enumerate(classes)
    ]
    odd = int(verdict.at_odds.sum())
    return {
        "found": verdict.found,
        "sentences": sentences(verdict, len(y)),
        "checks": [asdict(check) for check in verdict.checks],
        "suspicious": {"count": odd, "share": odd / len(y)},
        "classes": rows,
    }
