"""How far each target of a run lies from its source, and the file to ask it of other targets by."""

from __future__ import annotations

from pathlib import Path

from lora_lightning.runs.context import Context
from lora_lightning.shifts import shift
from lora_lightning.source_statistics import FEWEST, SourceStatistics
from lora_lightning.verdicts import NAMES, Shift

REPEATS = 20  # of the bootstrap


def measure_shifts(context: Context) -> None:
    """Save the source's statistics beside the source model, and measure every target by them.

    The source is looked at on held-out pictures, each target on its training pictures, without
    labels.
    """
    data = context.data.on(test=[context.data.source])
    items = data.held_out()
    if len(items) < FEWEST:
        context.run.notes.append(
            f"The source has {len(items)} held-out pictures: with fewer than {FEWEST} it is not "
            "measured how far the targets are."
        )
        return
    model = context.fresh()
    pictures = data.predict_dataloader().dataset
    size = 2 * data.batch_size
    source = SourceStatistics.of(model, pictures, context.labels(items), batch_size=size)
    source.save(Path(context.config.out) / f"{context.named('source_statistics')}.safetensors")
    tick = context.stages.stage("how far are the targets?", "domains")
    found = {}
    for done, domain in enumerate(data.target, start=1):
        target = data.on(train=[domain]).unlabelled()
        found[domain] = shift(model, source, target, batch_size=size, repeats=REPEATS)
        tick(done, len(data.target))
    context.run.shifts[context.seed] = {name: s.as_dict() for name, s in found.items()}
    if far := {name: s for name, s in found.items() if s.verdict == NAMES[-1]}:
        _warn(context, far)


def _warn(context: Context, far: dict[str, Shift]) -> None:
    where = "" if context.first else f" (seed {context.seed})"
    text = (
        f"May be too far to adapt to without labels{where}: {', '.join(far)}. Label some items, or "
        f"do not answer there. {next(iter(far.values())).caveat}"
    )
    context.run.notes.append(text)
    context.stages.console.print(text, style="yellow", markup=False)
