"""Published figures to stand beside one's own, as printed: percent, mean ± standard deviation.

Plain data; the names of data sets are those of their listings, the names of metrics those of
results.json. `method` is the name that our own run of a method has, None where there is none.
Gaps are points below the in-distribution accuracy, positive = worse.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """A method's figures, one a column, None where the table is empty."""

    name: str
    method: str | None
    figures: tuple[str | None, ...]
    note: str | None = None


class Published(NamedTuple):
    """A table: source, the (metric, rho) of each column (None: the set has no rho), rows."""

    source: str
    columns: tuple[tuple[str, float | None], ...]
    rows: tuple[Row, ...]


_DDB = (
    "Diffusing DeBias (Ciranni et al., NeurIPS 2025, arXiv 2502.09564) and what it quotes; "
    "targets pretrained on ImageNet"
)
_JTT_BAR = (
    "JTT on BAR equals JTT on the split with 5 % conflicting images of another protocol, so that "
    "table mixes protocols: compare with its ERM, LfF and DDB rows"
)
_REAL = "the amplifier trained on the real images: the paper's own control, after 1 epoch"

PUBLISHED: dict[str, Published] = {
    "waterbirds": Published(
        _DDB,
        (("worst_group_accuracy", 0.95),),
        (
            Row("ERM", "erm", ("62.60 ± 0.30",)),
            Row("LfF", "lff", ("78.00",)),
            Row("JTT", "jtt", ("83.80 ± 1.20",)),
            Row("MoDAD", None, ("89.43 ± 1.69",)),
            Row("B2T + GroupDRO", None, ("90.70 ± 0.30",)),
            Row("GroupDRO, true groups", "group-dro", ("91.40 ± 1.10",)),
            Row("DDB-I", "ddb-i", ("90.81 ± 0.68",)),
            Row("DDB-I, error set", "ddb-i-error-set", ("90.34 ± 0.41",)),
            Row("DDB-II", "ddb-ii", ("91.56 ± 0.15",)),
            Row("Recipe I, amplifier on real images", "real-amplifier-i", ("79.43",), _REAL),
            Row("Recipe II, amplifier on real images", "real-amplifier-ii", ("78.45",), _REAL),
        ),
    ),
    "bar": Published(
        _DDB,
        (("average_accuracy", None),),
        (
            Row("ERM", "erm", ("51.85 ± 5.92",)),
            Row("LfF", "lff", ("62.98 ± 2.76",)),
            Row("JTT", "jtt", ("68.53 ± 3.29",), _JTT_BAR),
            Row("DebiAN", None, ("69.88 ± 2.92",)),
            Row("MoDAD", None, ("69.83 ± 0.72",)),
            Row("LWBC", None, ("62.03 ± 2.76",)),
            Row("DDB-I", "ddb-i", ("70.40 ± 1.41",)),
            Row("DDB-I, error set", "ddb-i-error-set", ("70.59 ± 0.19",)),
            Row("DDB-II", "ddb-ii", ("72.81 ± 1.02",)),
        ),
    ),
    "bffhq": Published(
        _DDB,
        (("conflicting_accuracy", 0.995), ("average_accuracy", 0.995)),
        (
            Row("ERM", "erm", ("60.13 ± 0.46", None)),
            Row("LfF", "lff", ("62.97 ± 3.22", None)),
            Row("JTT", "jtt", ("62.20 ± 1.34", None)),
            Row("DebiAN", None, ("62.80 ± 0.60", None)),
            Row("MoDAD", None, ("68.33 ± 2.89", None)),
            Row("ETF-Debias", None, ("73.60 ± 1.22", None)),
            Row("DDB-I", "ddb-i", ("74.67 ± 2.37", "81.27 ± 0.88")),
            Row("DDB-I, error set", "ddb-i-error-set", ("71.40 ± 0.92", "82.44 ± 0.64")),
            Row("DDB-II", "ddb-ii", ("70.93 ± 0.14", "83.15 ± 1.76")),
        ),
    ),
    "imagenet-9": Published(
        f"{_DDB}; accuracy on ImageNet-A, so only runs that had imagenet-a/ as test split compare",
        (("average_accuracy", None),),
        (
            Row("ERM", "erm", ("30.30",)),
            Row("LWBC", None, ("35.97 ± 0.49",)),
            Row("DDB-I", "ddb-i", ("39.80 ± 0.50",)),
            Row("DDB-I, error set", "ddb-i-error-set", ("38.12 ± 0.96",)),
            Row("DDB-II", "ddb-ii", ("37.53 ± 0.82",)),
        ),
    ),
    "urbancars": Published(
        _DDB,
        (
            ("adjusted_average_accuracy", None),
            ("background_gap", None),
            ("co_object_gap", None),
            ("both_gap", None),
        ),
        (
            Row("LfF", "lff", ("97.20", "11.60", "18.40", "63.20")),
            Row("JTT", "jtt", ("95.90", "8.10", "13.30", "40.10")),
            Row("EIIL", None, ("95.50", "4.20", "24.70", "44.90")),
            Row("DebiAN", None, ("98.00", "14.90", "10.50", "69.00")),
            Row("LLE, bias labels", None, ("96.70", "2.10", "2.70", "5.90")),
            Row("GroupDRO, true groups", "group-dro", ("91.60", "10.90", "3.60", "16.40")),
            Row("DDB-I", "ddb-i", ("86.39", "1.85", "0.52", "0.12")),
            Row("DDB-II", "ddb-ii", ("98.56", "2.30", "11.10", "46.70")),
        ),
    ),
    "colored-mnist": Published(
        "the literature on LfF's Colored MNIST (Nam et al. 2020) up to DeNetDM (NeurIPS 2024); "
        "accuracy on the unbiased test set, MLP, 100 epochs, pixels divided by 255 twice: only "
        "runs with pixel_norm double-255 compare",
        tuple(("unbiased_accuracy", rho) for rho in (0.995, 0.99, 0.98, 0.95)),
        (
            Row("ERM", "erm", ("35.34", "50.34", "62.29", "77.63")),
            Row("GroupDRO, true groups", "group-dro", ("59.67", "71.33", "76.30", "84.40")),
            Row("JTT", "jtt", ("53.03", "61.68", "74.23", "85.03")),
            Row("LfF", "lff", ("63.39", "74.01", "80.48", "85.39")),
            Row("DFA", None, ("59.12", "71.04", "82.86", "88.29")),
            Row("LC", None, ("63.48", "78.41", "83.63", "88.18")),
            Row("DeNetDM", None, ("74.72", "85.22", "89.29", "93.54")),
        ),
    ),
}
