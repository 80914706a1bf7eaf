"""Recordings with the transcripts of the round, as `PseudoTranscriptCallback` trains on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader

from lora_lightning.data.speech import SpeechData
from lora_lightning.data.utterances import Utterance


class LabelledSpeech(SpeechData):
    """`SpeechData` of the recordings that have a label now; the others wait.

    Args:
        recordings: All of them.
        **settings: Of `SpeechData`.

    Attributes:
        labels: path → what is learnt for it; replaced in each round.
    """

    def __init__(self, recordings: Sequence[Utterance], **settings: Any):
        super().__init__(train=recordings, **settings)
        self.labels: dict[str, str] = {}

    def train_dataloader(self) -> DataLoader[Any]:
        """Those that the round learns."""
        self.setup()
        every = self.items["train"]
        paths = [(u, str(u.path)) for u in every]
        known = [replace(u, text=self.labels[path]) for u, path in paths if path in self.labels]
        self.items["train"] = known or every
        try:
            return super().train_dataloader()
        finally:
            self.items["train"] = every

    def everything(self) -> DataLoader[Any]:
        """All recordings, in order."""
        self.setup()
        self.items["test"] = self.items["train"]
        return self.test_dataloader()
