"""A run of adaptation of a speech recogniser: recordings, source model, methods, report.

Reading order: `run`, then `lora_lightning.speech.methods`, where each line of the table
is a function.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import soundfile
from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf

from lora_lightning.errors import ConfigError
from lora_lightning.report.results import Run, Transcript
from lora_lightning.report.write import write_report
from lora_lightning.runner.progress import Stages, Ticks, interruptible, quiet_lightning
from lora_lightning.runner.sweep import method_of
from lora_lightning.runner.trainer import check_plan, make_trainer, threads, versions
from lora_lightning.speech import methods as speech_label_free
from lora_lightning.speech.data.audio import read_audio
from lora_lightning.speech.data.speech_data import SpeechData
from lora_lightning.speech.domains import Domain, Recordings, recordings
from lora_lightning.speech.experiment import Context
from lora_lightning.speech.methods import METHODS
from lora_lightning.speech.settings import Config
from lora_lightning.speech.tasks.ctc import CTCRecognition, spec_augment
from lora_lightning.speech.tasks.recognisers import ConformerCTC, load_recogniser, save_recogniser
from lora_lightning.training.lora_callback import LoRACallback

PLAYED = 8  # held-out recordings of a target that are kept as audio, where it is transformed


def run(given: DictConfig) -> Run:
    """Run every stage for every seed; the results lie in ``config.out`` afterwards.

    Raises:
        ConfigError: a value that no type could catch, before anything is spoken or trained.
        DataError: the recordings cannot be used.
    """
    with quiet_lightning(), interruptible(), threads(given.threads):
        config = _checked(given)
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(given, out / "config.yaml")
        return _run(config, given)


def _run(config: Config, given: DictConfig) -> Run:
    source = None if config.model.checkpoint is None else load_recogniser(config.model.checkpoint)
    with Stages() as stages:
        rate = 16000 if source is None else source.sample_rate
        heard = recordings(config, rate, source is None, stages)
        _say_skipped(heard, stages)
        if source is None:
            source = _trained(config, heard, stages)
        # An adapter is of use together with the model that it was made for only.
        save_recogniser(source, Path(config.out, "source.safetensors"))
        result = _empty(config, given, heard, source)
        for seed in config.seeds:
            stages.console.print(f"[bold]seed {seed}[/bold]") if len(config.seeds) > 1 else None
            context = Context(config, heard, source, seed, stages, result)
            for name in config.methods:
                result.rows += method_of(name, METHODS)(context)
            result.transcripts += _transcripts(context)
            write_report(result, Path(config.out))
    return result


def _trained(config: Config, heard: Recordings, stages: Stages) -> ConformerCTC:
    """A source model, trained on the source's recordings."""
    seed_everything(config.data.seed, verbose=False)
    m, settings = config.model, config.train.source
    model = ConformerCTC(
        dim=m.dim,
        num_layers=m.num_layers,
        num_heads=m.num_heads,
        ffn_dim=m.ffn_dim,
        kernel_size=m.kernel_size,
        dropout=m.dropout,
        augment=spec_augment(),
    )
    module = CTCRecognition(
        model, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay
    )
    data = SpeechData(
        train=heard.source, batch_seconds=config.data.batch_seconds, seed=config.data.seed
    )
    tick = stages.stage("training the source model", "batches")
    trainer = make_trainer(config, [Ticks(tick)], settings.epochs, gradient_clip_val=5.0)
    trainer.fit(module, datamodule=data)
    # Rounded as the file rounds them: the model that is measured is the one that is kept.
    return model.half().float()


def _transcripts(context: Context) -> list[Transcript]:
    """The held-out recordings before and after adaptation, at the headline's size if it was run."""
    config = context.config
    named = [f"LoRA, {config.headline} target labels"]
    named += [f"{speech_label_free.NAME}, {s} s" for s in reversed(config.unlabelled)]
    known = {method for method, _ in context.hypotheses}
    adapted = next((name for name in named if name in known), "")
    found = []
    for domain in context.recordings.domains:
        before = context.hypotheses.get(("source only", domain.name))
        after = context.hypotheses.get((adapted, domain.name))
        if before is None or after is None:
            continue
        sounds = _sounds(domain, config, context.source.sample_rate)
        for index, item in enumerate(domain.held_out):
            found.append(
                Transcript(
                    item=item.path.name,
                    domain=domain.name,
                    reference=context.source.labels.normalise(item.text or ""),
                    source=before[index],
                    adapted=after[index],
                    seed=context.seed,
                    audio=sounds[index] if index < len(sounds) else None,
                )
            )
    return found


def _sounds(domain: Domain, config: Config, sample_rate: int) -> list[str]:
    """Audio files of the held-out recordings, as the model hears them."""
    if domain.transform is None:
        return [str(item.path) for item in domain.held_out]
    folder = Path(config.out, "audio", domain.name)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for item in domain.held_out[:PLAYED]:
        path = folder / f"{item.path.parent.name}-{item.path.stem}.flac"
        waveform = domain.transform(read_audio(item.path, sample_rate), item)
        soundfile.write(path, waveform.clamp(-1, 1).numpy(), sample_rate)
        paths.append(str(path))
    return paths


def _checked(given: DictConfig) -> Config:
    config: Any = OmegaConf.to_object(given)
    assert isinstance(config, Config)
    check_plan(config.methods, config.seeds, METHODS)
    sizes = config.enrolment
    if not sizes or min(sizes) < 1 or sorted(set(sizes)) != sizes:
        raise ConfigError(f"enrolment must be sizes in rising order, at least 1; got {sizes}")
    if config.headline not in sizes:
        raise ConfigError(f"headline must be one of enrolment={sizes}, got {config.headline}")
    for name in ("lora", "full"):
        steps = getattr(config.train, name).steps
        if len(steps) != len(sizes) or min(steps) < 1:
            raise ConfigError(
                f"train.{name}.steps must hold a number of steps for each size of "
                f"enrolment={sizes}, got {steps}"
            )
    if config.data.test < 1:
        raise ConfigError(f"data.test must be at least 1, got {config.data.test}")
    speech_label_free.check(config)
    # Both check what they are given; better now than after the source model's training.
    LoRACallback(config.lora, batch_norm=config.batch_norm)
    make_trainer(config)
    return config


def _say_skipped(heard: Recordings, stages: Stages) -> None:
    if heard.skipped:
        stages.console.print(f"[yellow]{len(heard.skipped)} recordings are left out:")
        for path, reason in heard.skipped[:5]:
            stages.console.print(f"  {path}: {reason}", markup=False)


def _empty(config: Config, given: DictConfig, heard: Recordings, source: ConformerCTC) -> Run:
    plain: Any = OmegaConf.to_container(given)
    what = "environment" if config.data.environments else "speaker"
    notes = [
        f"One adapter for each {what} and size of enrolment; {config.data.test} held-out "
        f"recordings of each of {len(heard.domains)} {what}s, which no training hears.",
        "Every method starts from the same source model, with the same enrolment.",
    ]
    return Run(
        name=config.name,
        title=config.title,
        metric="WER",
        rows=[],
        predictions=[],
        classes=[],
        spectra={},
        config=plain,
        data_root=Path(config.data.target or config.out),
        versions=versions("torchaudio"),
        skipped=heard.skipped,
        notes=notes,
        read_audio=read_audio,
    )
