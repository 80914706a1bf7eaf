"""`InjectionReport`: the adapted tensors, their ranks and parameters."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lora_lightning.lora.module_tree import join

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One adapted tensor."""

    module: str
    tensor: str
    kind: str
    path: str  # "factorised" or "effective"
    rank: int
    alpha: float
    parameters: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class InjectionReport:
    """The result of `inject`.

    Attributes:
        name: the adapter's name.
        rows: one `Row` for each adapted tensor.
        extras: name → number of elements of each parameter trained in full.
        total_parameters: parameters of the base.
        left_out: path → why, of layers that ``"auto"`` or ``"all"`` could not adapt.
    """

    name: str
    rows: tuple[Row, ...]
    extras: dict[str, int] = field(default_factory=dict)
    total_parameters: int = 0
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def factor_parameters(self) -> int:
        """Trainable elements of the factors."""
        return sum(row.parameters for row in self.rows)

    @property
    def trainable_parameters(self) -> int:
        """Trainable elements of factors and of parameters trained in full."""
        return self.factor_parameters + sum(self.extras.values())

    def table(self) -> Table:
        """A rich table: module, path taken, rank, parameters; the sums at its foot."""
        from rich.table import Table

        share = 100 * self.trainable_parameters / max(self.total_parameters, 1)
        table = Table(
            title=f"adapter {self.name!r}: {len(self.rows)} tensors",
            caption=f"{self.trainable_parameters:,} trainable, {share:.2f} % of the base's "
            f"{self.total_parameters:,}",
        )
        table.add_column("module", overflow="fold")
        table.add_column("kind")
        table.add_column("path")
        for column in ("rank", "parameters"):
            table.add_column(column, justify="right")
        for r in self.rows:
            where = r.module if r.tensor == "weight" else join(r.module, r.tensor)
            table.add_row(where, r.kind, r.path, str(r.rank), f"{r.parameters:,}")
        for name, size in self.extras.items():
            table.add_row(name, "—", "in full", "—", f"{size:,}")
        for name, why in self.left_out.items():
            kind, _, reason = why.partition(": ")
            table.add_row(name, kind, f"left out: {reason.split(';')[0]}", "—", "—")
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        from lora_lightning.report.console import PlainConsole

        console = PlainConsole(width=80, no_color=True)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()
