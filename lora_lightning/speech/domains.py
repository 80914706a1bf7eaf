"""The targets of a speech run: each speaker, or each acoustic environment, with its recordings."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
from torch import Tensor

from lora_lightning.errors import DataError
from lora_lightning.runner.file_names import file_names
from lora_lightning.runner.progress import Stages
from lora_lightning.speech.data.audio import checked, counted, read_audio
from lora_lightning.speech.data.manifests import load_utterances
from lora_lightning.speech.data.synthetic.acoustics import environment
from lora_lightning.speech.data.synthetic.espeak import Voice
from lora_lightning.speech.data.synthetic.spoken import LISTING, spoken_set
from lora_lightning.speech.data.synthetic.voices import source_voices, target_voices
from lora_lightning.speech.data.utterances import Utterance, by_speaker
from lora_lightning.speech.enrolment import few
from lora_lightning.speech.settings import Config, SpeechDataSettings
from lora_lightning.speech.tasks.labels import Labels
from lora_lightning.speech.tasks.transcripts import spelt_out, told

Transform = Callable[[Tensor, Utterance], Tensor]
PLAYED = 8  # held-out recordings of a target that are saved as audio, where it is transformed


@dataclass(frozen=True)
class Domain:
    """A target."""

    name: str  # of the speaker or the environment
    pool: list[Utterance]  # recordings to enrol with
    held_out: list[Utterance]  # recordings to measure on; no method sees them
    transform: Transform | None = None  # the environment's effect on a recording; None: none

    def enrolment(self, count: int, seed: int) -> list[Utterance]:
        """`count` recordings of the pool; a larger enrolment holds a smaller one's."""
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        return [self.pool[i] for i in rng.permutation(len(self.pool))[:count]]

    def unlabelled(self, seconds: float, seed: int) -> list[Utterance]:
        """Recordings of the pool with this total length, or all; in `enrolment`'s order."""
        found, total = [], 0.0
        for utterance in self.enrolment(len(self.pool), seed):
            if total >= seconds:
                break
            found.append(utterance)
            total += utterance.seconds
        return found

    def sounds(self, out: Path, sample_rate: int) -> list[str]:
        """Audio files of held-out recordings as given to the model; a few, where transformed."""
        if self.transform is None:
            return [str(item.path) for item in self.held_out]
        folder, paths = out / "audio" / self.name, []
        folder.mkdir(parents=True, exist_ok=True)
        for item in self.held_out[:PLAYED]:
            name = f"{item.path.parent.name}-{item.path.stem}"
            path = folder / f"{file_names([name])[name]}.flac"
            waveform = self.transform(read_audio(item.path, sample_rate), item)
            soundfile.write(path, waveform.clamp(-1, 1).numpy(), sample_rate)
            paths.append(str(path))
        return paths


@dataclass
class Recordings:
    """All recordings of a run."""

    domains: list[Domain]  # the targets
    # Training data of the source model; empty where it is not trained
    source: list[Utterance] = field(default_factory=list)
    # (path, reason) of each recording that was left out
    skipped: list[tuple[str, str]] = field(default_factory=list)


def recordings(config: Config, sample_rate: int, train: bool, stages: Stages) -> Recordings:
    """Find, or synthesise, the recordings of the run, and check every file.

    Raises:
        DataError: there are too few recordings, or none.
    """
    data = config.data
    skipped: list[tuple[str, str]] = []

    def listen(path: Path, title: str) -> list[Utterance]:
        tick = stages.stage(title, "files")
        found = load_utterances(path)
        found = spelt_out(found, data.numbers) if data.numbers else found
        kept, bad = checked(found, data.min_seconds, data.max_seconds, tick)
        skipped.extend(bad)
        if unlabelled := [u for u in kept if not u.text]:
            raise DataError(
                f"{path}: {len(unlabelled)} recordings have no transcript, such as "
                f"{unlabelled[0].path.name}; this run measures with them"
            )
        return kept

    source = listen(_source(config, sample_rate), "reading the source") if train else []
    target = listen(_target(config, sample_rate), "reading the target")
    return Recordings(_domains(config, target, sample_rate), source, skipped)


def notices(found: Recordings, labels: Labels, config: Config) -> list[str]:
    """What was rewritten in transcripts, what was left out, and too small an enrolment."""
    every = [u for d in found.domains for u in (*d.pool, *d.held_out)] + found.source
    said = [told(labels.changes(u.text for u in every))]
    if found.skipped:
        said.append(f"{counted(found.skipped)}.")
    if config.data.target and (few_said := few(min(config.enrolment))):
        said.append(f"The smallest enrolment: {few_said}.")
    return [notice for notice in said if notice]


def _source(config: Config, sample_rate: int) -> Path:
    data, spoken = config.data, config.data.spoken
    if data.source:
        return Path(data.source)
    voices = source_voices(spoken.source_voices)
    return _spoken(data, voices, spoken.source_utterances, sample_rate, data.seed)


def _target(config: Config, sample_rate: int) -> Path:
    data, spoken = config.data, config.data.spoken
    if data.target:
        return Path(data.target)
    needed = max(config.enrolment) + data.test
    if not data.environments:
        return _spoken(data, target_voices(spoken.target_voices), needed, sample_rate, data.seed)
    # The source's own speakers with new sentences: only the acoustics change.
    voices = source_voices(spoken.environment_voices)
    each = -(-needed // len(voices))
    return _spoken(data, voices, each, sample_rate, data.seed + 1_000_003)


def _spoken(
    data: SpeechDataSettings, voices: dict[str, Voice], each: int, sample_rate: int, seed: int
) -> Path:
    folder = spoken_set(
        data.spoken.cache and Path(data.spoken.cache, f"{len(voices)}-voices-{each}-{seed}"),
        speakers=voices,
        utterances=each,
        sample_rate=sample_rate,
        seed=seed,
    )
    return folder / LISTING


def _domains(config: Config, target: Sequence[Utterance], sample_rate: int) -> list[Domain]:
    data = config.data
    if not data.environments:
        return [_split(config, name, own) for name, own in by_speaker(target).items()]
    return [
        _split(config, name, target, environment(name, sample_rate, data.seed))
        for name in data.environments
    ]


def _split(
    config: Config, name: str, own: Sequence[Utterance], transform: Transform | None = None
) -> Domain:
    needed = max(config.enrolment) + config.data.test
    if len(own) < needed:
        raise DataError(
            f"{name} has {len(own)} usable recordings, but {needed} are needed: "
            f"{max(config.enrolment)} to enrol and {config.data.test} held out; "
            "set enrolment or data.test lower"
        )
    # The held-out ones do not depend on the run's seed, so that all seeds are comparable.
    order = np.random.default_rng([config.data.seed, zlib.crc32(name.encode())])
    shuffled = [own[i] for i in order.permutation(len(own))]
    return Domain(name, shuffled[config.data.test :], shuffled[: config.data.test], transform)
