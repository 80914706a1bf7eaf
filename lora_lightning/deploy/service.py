"""`Service`: a base and a folder of adapters answer batches of requests, each by its own adapter.

No server is needed for it: what receives requests is in `lora_lightning.deploy.server`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_lightning.bank.adapter_bank import AdapterBank
from lora_lightning.deploy.adapter_folder import AdapterFolder
from lora_lightning.deploy.answers import Answers
from lora_lightning.deploy.intake import Job, Refused, no_adapter
from lora_lightning.report.sentences import sentence

log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """A status of HTTP, and what is said."""

    status: int
    body: dict[str, Any]


class _Known(NamedTuple):
    """An adapter's file as it was read; how its answers are named, or why it cannot be used."""

    version: tuple[int, ...]
    told: Any


class Service:
    """Answers requests.

    Before each batch the folder's files are followed: the adapters of the batch that are new or
    renewed are read, those that are gone are forgotten. A file that cannot be used is an answer in
    words to requests for it, and harms no others.

    Args:
        answers: The base.
        folder: Of the adapters.
        capacity: How many adapters are kept in memory; at least as many as a batch may have.
    """

    def __init__(self, answers: Answers, folder: AdapterFolder, capacity: int = 256):
        self.answers, self.folder = answers, folder
        answers.model.eval()
        self.bank = AdapterBank(answers.model, {}, capacity=capacity)
        self._known: dict[str, _Known] = {}

    @torch.inference_mode()
    def answer(self, jobs: Sequence[Job]) -> list[Answer]:
        """The answer to each request."""
        refused = self._follow({name for j in jobs if (name := j.asked.adapter) is not None})
        found = iter(self._run([job for job in jobs if job.asked.adapter not in refused]))
        return [_refusal(refused[n]) if (n := j.asked.adapter) in refused else next(found)
                for j in jobs]  # fmt: skip

    def _follow(self, names: set[str]) -> dict[str | None, Refused]:
        """Take what changed in the folder; those of these adapters that cannot be used, and why."""
        files = self.folder.files()
        if not names <= files.keys():
            files = self.folder.files(now=True)
        for name in self._known.keys() - files.keys():
            self._forget(name)
        for name in names & files.keys():
            known, file = self._known.get(name), files[name]
            if known is None or known.version != file.version:
                self._known[name] = _Known(file.version, self._loaded(name, file.path))
        told = {n: self._known[n].told if n in self._known else no_adapter(n) for n in names}
        return {name: why for name, why in told.items() if isinstance(why, Refused)}

    def _forget(self, name: str) -> None:
        del self._known[name]
        if name in self.bank:
            self.bank.remove(name)

    def _loaded(self, name: str, path: Path) -> Any:
        """Read an adapter into the bank; how its answers are named, or why it cannot be used."""
        try:
            self.bank.add({name: path}, overwrite=True)
            return self.answers.told(self.bank.read(name)[name])
        except Exception as error:  # whatever it is, the others of the batch are answered
            log.warning("adapter %r cannot be used: %s", name, error)
            said = (sentence(error) or type(error).__name__).replace(str(path), path.name)
            return Refused(500, f"the adapter {name!r} cannot be used: {said}")

    def _run(self, jobs: Sequence[Job]) -> list[Answer]:
        """The answers; where a batch fails, each request's by itself."""
        if not jobs:
            return []
        try:
            return self._together(jobs)
        except Exception as error:  # whatever a model's own forward raises
            if len(jobs) > 1:
                log.warning("a batch of %d is answered one by one: %s", len(jobs), error)
                return [answer for job in jobs for answer in self._run([job])]
            log.exception("a request could not be answered")
            why = sentence(error) or "the model failed; the server's log says more"
            why = why.replace(f"{self.folder.path}{os.sep}", "")
            return [_refusal(Refused(500, f"this could not be answered: {why}"))]

    def _together(self, jobs: Sequence[Job]) -> list[Answer]:
        outputs = dict(self._outputs(jobs))
        return [self._said(job, outputs[i]) for i, job in enumerate(jobs)]

    def _outputs(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        for group in self.answers.groups([job.item for job in jobs]):
            names = [jobs[i].asked.adapter for i in group]
            adapted = self.bank[names] if any(n is not None for n in names) else nullcontext()
            with adapted:
                outputs = self.answers.outputs([jobs[i].item for i in group])
            yield from zip(group, outputs, strict=True)

    def _said(self, job: Job, output: Any) -> Answer:
        name, top = job.asked
        told = self.answers.told({}) if name is None else self._known[name].told
        return Answer(200, {"adapter": name, **self.answers.said(output, told, top)})


def _refusal(why: Refused) -> Answer:
    return Answer(why.status, {"detail": str(why)})
