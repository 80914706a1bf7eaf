"""`Shift`: the result of `shift`, and its verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lora_lightning.adaptation.shift.distances import Interval

if TYPE_CHECKING:
    from rich.table import Table

NEAR, FAR = 0.05, 0.4  # expected loss of accuracy; measured, see docs/shift.md
SPREAD = 1.0  # Fréchet distance in units of the source's whole variance
NAMES = ("near", "adaptable", "too far")
_WORDS = {
    "near": "The target is near: the source model should serve as it is.",
    "adaptable": "The target has moved, and can be adapted to.",
    "too far": "The target may be too far to adapt to without labels: label some items, or refuse.",
}
CONFIDENCE = "how sure the model is, a weak sign"
STEADINESS = "how sure the model is and how steady the answers are"
_OUTSIDE = (
    "No accuracy can be told for it: its features lie outside of what the source model knows."
)


@dataclass(frozen=True)
class Shift:
    """The measures of `shift`; intervals of distances are of 95 %.

    Attributes:
        verdict: ``"near"``, ``"adaptable"`` or ``"too far"``, see `verdict`.
        expected_drop: Accuracy that the source model is expected to lose from source to target.
        expected_accuracy: Of the source model on the target; None where the source's labels are
            unknown, or the Fréchet distance is 1 or more.
        source_accuracy: On the source's items, likewise.
        nuclear_norm: Of the predictions on the target, see `lora_lightning.adaptation.validators`.
        proxy_a: Proxy A-distance, 0 (a classifier cannot separate the domains) to 2.
        mmd: Squared maximum mean discrepancy.
        coral: CORAL distance.
        frechet: Fréchet distance; 1 is the source's total variance.
        layers: Fréchet distance of each block's features.
        items: Of the source's sample and of the target.
        agreement: Where the model has an active adapter: the part of the target's items that it
            labels as the source model does. Otherwise None.
        expected_adapted: Its expected accuracy on the target, likewise.
        way: The basis of the expected accuracy, as text.
        expected_interval: Least and most of `expected_accuracy`; holds 90 % of the time.
    """

    verdict: str
    expected_drop: float
    expected_accuracy: float | None
    source_accuracy: float | None
    nuclear_norm: float
    proxy_a: Interval
    mmd: Interval
    coral: Interval
    frechet: Interval
    layers: dict[str, float]
    items: tuple[int, int]
    agreement: float | None = None
    expected_adapted: float | None = None
    way: str = CONFIDENCE
    expected_interval: tuple[float, float] | None = None

    @property
    def entry(self) -> str | None:
        """The first block whose features shifted at least half as far as the most shifted one's.

        Adapting the blocks before it can change little. None where the model has no blocks.
        """
        most = max(self.layers.values(), default=0.0)
        return next((name for name, x in self.layers.items() if x >= most / 2), None)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found = asdict(self)
        for name in ("proxy_a", "mmd", "coral", "frechet"):
            found[name] = getattr(self, name)._asdict()
        return {**found, "entry": self.entry}

    def table(self) -> Table:
        """A rich table."""
        from rich import box
        from rich.table import Table

        table = Table(
            title=f"shift: {self.verdict}", caption=self.sentence(), box=box.SIMPLE_HEAD,
            title_justify="left", caption_justify="left", caption_style="", show_edge=False,
        )  # fmt: skip
        table.add_column("measure")
        table.add_column("value", justify="right")
        table.add_column("95 % interval", justify="right")
        names = {"proxy_a": "proxy A-distance (0 to 2)", "mmd": "MMD", "coral": "CORAL"}
        for name, shown in {**names, "frechet": "Fréchet"}.items():
            value, low, high = getattr(self, name)
            table.add_row(shown, f"{value:.3g}", f"{low:.3g} to {high:.3g}")
        for name, value in self.layers.items():
            mark = "  ← enters here" if name == self.entry and self.verdict != NAMES[0] else ""
            table.add_row(f"  Fréchet at {name}", f"{value:.3g}", mark)
        return table

    def sentence(self) -> str:
        """The verdict in words, with its basis and its caveat."""
        sentences = [_WORDS[self.verdict], self._expected()]
        if self.entry and self.verdict != NAMES[0]:
            first = self.entry == next(iter(self.layers))
            sentences.append(
                f"The shift enters at {self.entry}, the first block: adapt every layer, the stem "
                'too (target_modules="all").'
                if first
                else f"The shift enters at {self.entry}, what is before it hardly moved: adapt the "
                "blocks from there on first."
            )
        if self.agreement is not None:
            told = None if self.verdict == NAMES[2] else self.expected_adapted
            expected = "" if told is None else f", expected accuracy {100 * told:.0f} %"
            sentences.append(
                f"The adapter keeps {100 * self.agreement:.0f} % of the source model's answers"
                f"{expected}."
            )
        return " ".join([*sentences, self.caveat])

    @property
    def caveat(self) -> str:
        """The basis of the verdict, and that it can be wrong."""
        return f"Judged without labels, by {self.way}: it can be wrong (docs/shift.md)."

    def _expected(self) -> str:
        if self.source_accuracy is None:
            drop = 100 * self.expected_drop
            return f"The model is {drop:.0f} points less steady or sure than on the source."
        if self.expected_accuracy is None:
            return _OUTSIDE
        within = "" if self.expected_interval is None else (
            " ({:.0f} to {:.0f})".format(*(100 * x for x in self.expected_interval))
        )  # fmt: skip
        return (
            f"Expected accuracy {100 * self.expected_accuracy:.0f} %{within}, on the source "
            f"{100 * self.source_accuracy:.0f} %."
        )

    def __str__(self) -> str:
        from lora_lightning.report.console import PlainConsole

        console = PlainConsole(width=80, no_color=True)
        with console.capture() as capture:
            console.print(self.table())
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


def verdict(drop: float, frechet: float = 0.0) -> str:
    """The verdict, one of `NAMES`.

    Args:
        drop: The accuracy (or confidence) that the source model is expected to lose.
        frechet: Fréchet distance. From 1 on the target is too far whatever the drop: its features
            lie outside the source's spread, where a model's confidence means nothing.
    """
    if drop >= FAR or frechet >= SPREAD:
        return NAMES[2]
    return NAMES[0] if drop < NEAR else NAMES[1]
