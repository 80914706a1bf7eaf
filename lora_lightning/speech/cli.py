"""The commands ``adapt-speaker`` and ``transcribe``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lightning.errors import DataError
from lora_lightning.lora.values import SEEDS, check_count, check_number
from lora_lightning.runner.jobs import add_jobs, given
from lora_lightning.runner.options import add_accelerator, add_options, add_training

if TYPE_CHECKING:
    from lora_lightning.speech.data.utterances import Utterance
    from lora_lightning.speech.tasks.lexicon import Lexicon

_MODEL = (
    "the recogniser: spoken (the small one that comes with the package), a recipe's "
    "source.safetensors, or a bundle of torchaudio.pipelines, such as WAV2VEC2_ASR_BASE_960H"
)

_COLUMNS = ("speaker", "learnt\nfrom", "held\nout", "WER %\nbefore", "WER %\nafter")


def add_commands(commands: Any) -> None:
    """Add both to the command's parser."""
    _add_adapt(commands)
    _add_transcribe(commands)


def _add_adapt(commands: Any) -> None:
    adapt = commands.add_parser("adapt-speaker", help="learn an adapter for each speaker")
    _add_model(adapt)
    adapt.add_argument(
        "--enroll", required=True, type=Path, metavar="DIR|MANIFEST",
        help="recordings, best with transcripts: a folder (a .txt beside each), or a .csv, .tsv "
        "or .jsonl with the columns path, text and, for many speakers, speaker",
    )  # fmt: skip
    adapt.add_argument(
        "--out", required=True, type=Path, metavar="FILE|DIR",
        help="the adapter file (.safetensors); a folder for many speakers, a file for each",
    )  # fmt: skip
    add_training(adapt, 2, "all", "all")
    add_options(
        adapt,
        ("held-out", float, 0.2, "part that decides if it is kept; below ten: thirds; 0: none"),
        ("steps", int, None, "optimizer steps for each speaker (150; without transcripts 200)"),
        ("learning-rate", float, None, "peak learning rate (0.004; without transcripts 0.008)"),
        ("batch", int, None, "recordings in a batch, at most (4; without transcripts 8)"),
    )
    adapt.add_argument(
        "--untranscribed", action="store_true",
        help="learn from no transcript; those that are there decide whether the adapter is kept. A "
        "speaker who has none is learnt so anyway",
    )  # fmt: skip
    adapt.add_argument(
        "--no-guard", dest="guard", action="store_false",
        help="without transcripts, adapt even where the guard says that it does harm",
    )  # fmt: skip
    _add_lexicon(
        adapt, "words that may be said: learnt by speakers without transcripts, and judged"
    )
    _add_numbers(adapt)
    add_accelerator(adapt)
    add_jobs(adapt, "speakers")
    adapt.set_defaults(command=_adapt)


def _add_transcribe(commands: Any) -> None:
    transcribe = commands.add_parser("transcribe", help="write down what recordings say")
    _add_model(transcribe)
    transcribe.add_argument("--adapter", type=Path, metavar="FILE", help="a speaker's adapter")
    transcribe.add_argument("--beam", type=int, metavar="N", help="prefix beam search; else greedy")
    _add_lexicon(transcribe, "the only words that may be written")
    _add_numbers(transcribe)
    transcribe.add_argument("--json", action="store_true", help="a JSON object a line")
    transcribe.add_argument("files", nargs="+", type=Path, metavar="FILE|DIR|MANIFEST")
    transcribe.set_defaults(command=_transcribe)


def _add_lexicon(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--lexicon", metavar="FILE",
        help=f"{what}: a word a line, or sentences; spoken: of the model of that name",
    )  # fmt: skip


def _add_numbers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--numbers", metavar="LANGUAGE",
        help="spell out digits in transcripts, by num2words: en, de, …; else they are an error",
    )  # fmt: skip


def _lexicon(given: str | None) -> Lexicon | None:
    from lora_lightning.speech.tasks.lexicon import Lexicon, spoken_lexicon

    if given is None:
        return None
    return spoken_lexicon() if given == "spoken" else Lexicon.read(given)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=_MODEL)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a bundle's local weights")


def _adapt(arguments: argparse.Namespace) -> int:
    from lora_lightning.lora.config import LoRAConfig
    from lora_lightning.runner.each_target import adapter_files, each_apart, shown
    from lora_lightning.runner.progress import Stages, interruptible
    from lora_lightning.speech.enrolment import SpeakerSettings
    from lora_lightning.speech.speakers import adapt_speakers, job
    from lora_lightning.speech.tasks.named_recogniser import named_recogniser
    from lora_lightning.speech.tasks.transcripts import told

    check_number("--seed", arguments.seed, SEEDS)
    check_number("--held-out", arguments.held_out, "[0, 1)")
    for name in ("steps", "batch"):
        if (count := getattr(arguments, name)) is not None:
            check_count(f"--{name}", count)
    settings = SpeakerSettings(
        LoRAConfig(
            rank=arguments.rank, alpha=arguments.alpha, target_modules=arguments.target_modules
        ),
        arguments.steps,
        arguments.batch,
        arguments.learning_rate,
        arguments.held_out,
        arguments.seed,
        arguments.accelerator,
        arguments.untranscribed,
        _lexicon(arguments.lexicon),
        arguments.guard,
    )
    jobs, again = given(arguments), arguments.overwrite
    with Stages() as stages, interruptible():
        speakers = _speakers(arguments.enroll, stages, arguments.numbers)
        files = adapter_files(arguments.out, speakers, "speakers")
        base = named_recogniser(arguments.model, arguments.checkpoint)
        texts = (u.text for each in speakers.values() for u in each)
        if said := told(base.labels.changes(texts)):
            stages.console.print(said, style="yellow")
        if jobs.serial:
            stage = lambda name: stages.stage(name, "steps")  # noqa: E731
            outcomes = adapt_speakers(base, speakers, files, settings, stage, again)
        else:
            items = {name: (name, speakers[name], files[name]) for name in speakers}
            common = base, settings
            outcomes = each_apart(base.model, files, job, items, common, jobs, stages, again)
        return shown(outcomes, stages, _COLUMNS, files)


def _speakers(path: Path, stages: Any, numbers: str | None) -> dict[str, list[Utterance]]:
    """Name → usable recordings; one nameless speaker where the manifest names none."""
    from lora_lightning.speech.data.audio import checked
    from lora_lightning.speech.data.utterances import by_speaker

    found, skipped = checked(_spelt(path, numbers), tick=stages.stage("reading", "files"))
    stages.left_out("recordings are", skipped)
    if not found:
        raise DataError(f"{path}: none of the {len(skipped)} recordings can be used")
    named = [u.speaker for u in found]
    return by_speaker(found) if any(named) else {path.stem: found}


def _spelt(path: Path, numbers: str | None) -> list[Utterance]:
    from lora_lightning.speech.data.manifests import load_utterances
    from lora_lightning.speech.tasks.transcripts import spelt_out

    found = load_utterances(path)
    return found if numbers is None else spelt_out(found, numbers)


def _transcribe(arguments: argparse.Namespace) -> int:
    from lora_lightning.report.console import visible
    from lora_lightning.speech.enrolment import transcribed
    from lora_lightning.speech.tasks.named_recogniser import named_recogniser

    base = named_recogniser(arguments.model, arguments.checkpoint, arguments.adapter)
    lexicon = _lexicon(arguments.lexicon)
    said, heard, failed = [], [], 0
    utterances = _utterances(arguments.files, arguments.numbers)
    base.labels.changes(u.text for u in utterances)  # what cannot be compared is said first
    for utterance in utterances:
        try:
            (_, text), = transcribed(base, [utterance], arguments.beam, lexicon)  # fmt: skip
        except DataError as error:
            print(visible(f"left out: {error}"), file=sys.stderr)
            failed += 1
            continue
        row = {"path": str(utterance.path), "text": text}
        line = json.dumps(row, ensure_ascii=False) if arguments.json else "\t".join(row.values())
        print(visible(line))
        if utterance.text:
            said.append(base.labels.normalise(utterance.text))
            heard.append(text)
    if said:
        from torchmetrics.functional.text import word_error_rate

        rate = 100 * float(word_error_rate(heard, said))
        print(f"WER {rate:.1f} % of {len(said)} recordings with a transcript", file=sys.stderr)
    return int(failed > 0)


def _utterances(paths: Sequence[Path], numbers: str | None) -> list[Utterance]:
    from lora_lightning.speech.data.manifests import AUDIO
    from lora_lightning.speech.data.utterances import Utterance

    found: list[Utterance] = []
    for path in paths:
        sound = path.suffix.lower() in AUDIO and not path.is_dir()
        found += [Utterance(path)] if sound else _spelt(path, numbers)
    return found
