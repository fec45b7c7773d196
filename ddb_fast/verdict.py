"""Is there a bias at all? A verdict without bias labels, from what several networks predict.

An amplifier is wrong on some real images in any case: its generator is not perfect and some images
are hard. Those errors differ from network to network, a network trained on the real images makes
few of them, and stronger guidance makes no more of them. Errors that a shortcut makes are the same
for every network that learnt it, and guidance, which strengthens what is typical of a class, makes
more of them where they were few.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ddb_fast.metrics import wilson_interval

UNANIMOUS = 0.4
"""Without a bias a tenth to a sixth of an amplifier's errors are unanimous (docs/verdict.md)."""
FEWEST = 5
"""Unanimous errors that make a bias: a handful is as likely to be mislabelled."""
P_VALUE = 0.01
"""Of as much growth by chance; without a bias guidance takes errors away (docs/verdict.md)."""


POOR = 0.2
"""By how much more often amplifiers without guidance may err on real images than the ERM, before
the generator says too little of them to call a set unbiased."""


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
    """found: None where nothing was found and the generator is too poor to say that there is none.

    at_odds: (N,) bool, the images on which it rests.
    """

    found: bool | None
    at_odds: Tensor
    checks: tuple[Check, ...]


def judge(
    y: Tensor, *, guided: Tensor, again: Tensor, plain: Tensor, plain_again: Tensor, erm: Tensor
) -> Verdict:
    """Judge whether what the amplifiers get wrong is a bias; all (N,) int64 classes.

    guided, again: what two amplifiers predict that were trained on guided synthetic images from
    other first weights; plain, plain_again: the same two on images without guidance; erm: networks
    of the same kind trained on real images, each asked of images it has not seen.

    A bias is found if either holds. Unanimous: of the images that a guided amplifier gets wrong,
    the share for which both and the ERM name the same wrong class has a lower 95 % Wilson bound
    above .4, and they are at least five. Grown: images that both guided ones give the same wrong
    class and both plain ones get right outnumber the reverse, by a one-sided sign test (guided and
    plain exchanged at random) at p < .01. Where neither does, it takes a generator whose plain
    amplifiers err on at most a fifth of the images more than the ERM to say that there is none.

    ValueError for other shapes.
    """
    said = {"guided": guided, "again": again, "plain": plain, "plain_again": plain_again}
    for name, classes in {**said, "erm": erm}.items():
        if classes.shape != y.shape or y.ndim != 1:
            raise ValueError(f"{name} {tuple(classes.shape)} for y {tuple(y.shape)}: not (N,)")
    wrong = {name: classes != y for name, classes in said.items()}
    at_odds = wrong["guided"] & (guided == again)
    before = wrong["plain"] & (plain == plain_again)
    errors = (wrong["guided"] | wrong["again"]).sum().item()
    unanimous = (at_odds & (erm == guided)).sum().item()
    share = unanimous / errors if errors else None
    grown = (at_odds & ~wrong["plain"] & ~wrong["plain_again"]).sum().item()
    shrunk = (before & ~wrong["guided"] & ~wrong["again"]).sum().item()
    chance = sign_test(grown, shrunk)
    plain_errors = (wrong["plain"].double().mean() + wrong["plain_again"].double().mean()) / 2
    excess = (plain_errors - (erm != y).double().mean()).item()
    checks = (
        Check(
            name="unanimous",
            question="Do networks of other first weights, and one trained on the real images, make "
            "the same errors?",
            value=share,
            limit=UNANIMOUS,
            passed=unanimous >= FEWEST and wilson_interval(unanimous, errors)[0] > UNANIMOUS,
        ),
        Check(
            name="grown",
            question="Does guidance make more of them than chance explains?",
            value=chance,
            limit=P_VALUE,
            passed=chance < P_VALUE,
        ),
        Check(
            name="generator",
            question="Is the generator good enough to say that there is none: how much more often "
            "do networks err that learnt from its images?",
            value=excess,
            limit=POOR,
            passed=excess <= POOR,
        ),
    )
    found = checks[0].passed or checks[1].passed or (False if checks[2].passed else None)
    return Verdict(found=found, at_odds=at_odds, checks=checks)


def sign_test(more: int, fewer: int) -> float:
    """P(X >= more) for X binomial of more + fewer fair coins: 1 where both are 0."""
    n = more + fewer
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
        for k in range(more, n + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, logs)))


def sentences(verdict: Verdict, count: int) -> list[str]:
    """The verdict on `count` training images, for a reader who is no expert."""
    odd = int(verdict.at_odds.sum())
    unanimous, grown, generator = verdict.checks
    share = 100 * (unanimous.value or 0.0)
    if verdict.found is None:
        return [
            "Nothing can be said about a bias: the generator is too poor.",
            "Networks that learnt from its images err on real ones "
            f"{100 * generator.value:.0f} points more often than one trained on real images, and "
            "the images on which they err tell nothing.",
            "Train it longer (--diffusion.images), or give it more images.",
        ]
    if not verdict.found:
        return [
            f"No bias was found among {count} training images.",
            "Networks that learnt from generated images alone err on some real ones, but on only "
            f"{share:.0f} % of these do they and a network trained on the real images agree, and "
            "guidance makes no more of them than chance explains.",
            "A shortcut that only a few images break, or none, leaves too little to be found.",
        ]
    lines = [
        f"A bias was found: {odd} of {count} training images ({100 * odd / count:.1f} %) are at "
        "odds with what most images of their class look like."
    ]
    if unanimous.passed:
        lines.append(
            "Networks that learnt from generated images alone take them for another class, and a "
            f"network trained on the real images agrees in {share:.0f} % of all such errors."
        )
    else:
        lines.append(
            "The more the generator exaggerates what is typical of a class, the more of them are "
            f"taken for another class (chance: p = {grown.value:.0e})."
        )
    lines.append(
        "Some of them may be mislabelled rather than unusual: look at them before you act."
    )
    return lines


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
