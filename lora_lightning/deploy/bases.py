"""The base of a command for deployment, by its name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_lightning.deploy.answers import Answers
    from lora_lightning.speech.tasks.named_recogniser import NamedRecogniser
    from lora_lightning.vision.named_classifier import NamedClassifier


def named(
    name: str, checkpoint: Path | None, adapter: Path | None = None, **of_classifier: Any
) -> NamedClassifier | NamedRecogniser:
    """The model of a name, with an adapter on it.

    Args:
        name: As `named_recogniser` has it, or else `named_classifier`.
        checkpoint: Its weights.
        adapter: An adapter file, which is loaded.
        of_classifier: Other arguments of `named_classifier`.
    """
    from lora_lightning.speech.tasks.named_recogniser import named_recogniser, names_recogniser

    if names_recogniser(name):
        return named_recogniser(name, checkpoint, adapter)
    from lora_lightning.vision.named_classifier import named_classifier

    return named_classifier(name, checkpoint, adapter=adapter, **of_classifier)


def answers(name: str, checkpoint: Path | None, **of_classifier: Any) -> Answers:
    """What is served by a name; arguments as of `named`."""
    from lora_lightning.speech.tasks.named_recogniser import names_recogniser

    base: Any = named(name, checkpoint, **of_classifier)
    if names_recogniser(name):
        from lora_lightning.deploy.recogniser_answers import RecogniserAnswers

        return RecogniserAnswers(base)
    from lora_lightning.deploy.classifier_answers import ClassifierAnswers

    return ClassifierAnswers(base)
