"""The pictures of a recipe: a folder of the user's own, or rendered."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_lightning.runner.progress import Stages
from lora_lightning.vision.data.image_domains import ImageDomains
from lora_lightning.vision.settings import DataSettings


def read_pictures(
    domains: type[ImageDomains], settings: DataSettings, model: Mapping[str, Any], stages: Stages
) -> ImageDomains:
    """The pictures that the settings describe, read.

    Raises:
        DataError: they cannot be used.
    """
    data = domains(
        Path(settings.root) if settings.root else _rendered(settings),
        settings.source,
        settings.target,
        classes=settings.classes,
        size=settings.size,
        test_fraction=settings.test_fraction,
        seed=settings.seed,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        cache_mb=settings.cache_mb,
        horizontal_flip=settings.horizontal_flip,
        tick=stages.stage("reading pictures", "pictures"),
        **{key: model[key] for key in ("mean", "std") if key in model},
    )
    data.setup()
    stages.left_out("files are", data.skipped)
    return data


def _rendered(data: DataSettings) -> Path:
    """The rendered set that the settings describe, from the cache where it is there."""
    from lora_lightning.vision.data.synthetic.rendered import render_domains, worlds_of

    number = data.render
    source = {"train": number.source_train, "test": number.source_test}
    target = {"train": number.target_train, "test": number.target_test}
    wanted = (
        [d for d in worlds_of(number.shift) if d != data.source]
        if data.target is None
        else data.target
    )
    domains = {data.source: source, **{name: target for name in wanted if name != data.source}}
    side = ImageDomains(".", size=data.size).stored_side
    return render_domains(number.cache, domains, shift=number.shift, size=side, seed=data.seed)
