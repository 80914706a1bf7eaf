"""`AdapterFiles`: an adapter file beside each checkpoint of a fit, removed together with it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lora_lightning.training import checks, sharded

_SAVE, _REMOVE, _FILES = "save_checkpoint", "remove_checkpoint", "_adapter_files"
_NOTES = "lora_lightning_files"  # in a checkpoint


class AdapterFiles:
    """The files of one adapter, in one folder.

    Checkpoints are written and removed by the trainer's strategy, whose methods are followed while
    a fit runs. Only files that this fit wrote are removed, or the one that it resumes: a checkpoint
    holds their names, and when each was written.

    Args:
        name: Of the adapter.
        write: Writes a trainer's adapter to a path; called on every process that takes part.
    """

    def __init__(self, name: str, write: Callable[[Trainer, Path], Any]):
        self.name, self.write = name, write
        self.folder = Path()
        self._of: dict[str, str] = {}  # checkpoint → name of its file
        self._times: dict[str, int] = {}  # name → when it was written
        self._ready = False  # for the checkpoint that is being made

    @property
    def at_end(self) -> Path:
        """The file of the end of the fit."""
        return self.folder / f"{self.name}.safetensors"

    # ---- with checkpoints --------------------------------------------------------------------

    def follow(self, trainer: Trainer, folder: Path) -> None:
        """Follow the checkpoints of this trainer, until `put_back`."""
        self.folder, self._ready = folder, False
        strategy: Any = trainer.strategy
        all_files: dict[str, AdapterFiles] = vars(strategy).setdefault(_FILES, {})
        all_files[self.name] = self
        if _SAVE in vars(strategy):
            return
        save, remove = strategy.save_checkpoint, strategy.remove_checkpoint

        def saved(checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
            beside = list(all_files.values()) if is_fitting(trainer) else []
            for files in beside:
                if not files._ready:  # callbacks are not called for weights alone
                    files._write(trainer)
            save(checkpoint, filepath, storage_options=storage_options)
            for files in beside:
                files._ready = False
                files._replace(trainer, filepath, files._current(trainer))

        def removed(filepath: Any) -> None:
            remove(filepath)
            for files in all_files.values():
                files._replace(trainer, filepath, None)

        vars(strategy).update({_SAVE: saved, _REMOVE: removed})

    def _current(self, trainer: Trainer) -> str:
        return f"{self.name}-epoch={trainer.current_epoch}-step={trainer.global_step}.safetensors"

    def _write(self, trainer: Trainer) -> None:
        path = self.folder / self._current(trainer)
        if sharded.writes(trainer):
            self.write(trainer, path)
        if trainer.is_global_zero:
            if (time := self._times.get(path.name)) is not None:  # of another checkpoint's, as well
                os.utime(path, ns=(time, time))
            self._times[path.name] = path.stat().st_mtime_ns

    def _replace(self, trainer: Trainer, checkpoint: Any, file: str | None) -> None:
        """Give a checkpoint another file; the old one goes where no checkpoint has it."""
        old = self._of.pop(_key(checkpoint), None)
        if file is not None:
            self._of[_key(checkpoint)] = file
        if old is None or old in self._of.values() or not trainer.is_global_zero:
            return
        path = self.folder / old
        if path.is_file() and path.stat().st_mtime_ns == self._times.pop(old, None):
            path.unlink()

    # ---- resuming ----------------------------------------------------------------------------

    def to_checkpoint(self, trainer: Trainer, checkpoint: dict[str, Any], key: str) -> None:
        """Write the file, and store the names in the checkpoint that is being made."""
        self._write(trainer)
        self._ready = True
        notes = {"own": self._current(trainer), "of": dict(self._of), "times": dict(self._times)}
        checkpoint.setdefault(_NOTES, {})[key] = notes

    def from_checkpoint(self, trainer: Trainer, checkpoint: dict[str, Any], key: str) -> None:
        """Go on with the names that a checkpoint holds, and its own."""
        notes = checkpoint.get(_NOTES, {}).get(key)
        if notes is None or trainer.ckpt_path is None:
            return
        form = re.compile(re.escape(self.name) + r"-epoch=\d+-step=\d+\.safetensors")
        found = notes["of"] | {_key(trainer.ckpt_path): notes["own"]}
        self._of = {k: file for k, file in found.items() if form.fullmatch(file)}
        self._times = dict(notes["times"])

    # ---- at the end --------------------------------------------------------------------------

    def finish(self, trainer: Trainer, pruned: bool) -> Path | None:
        """Write the file of the end; returns that of the best, or nothing where the source is kept.

        Of an adapter whose ranks are pruned that of the end is the best: only it has them.
        """
        if checks.source_kept(trainer, self.at_end):
            return None
        if sharded.writes(trainer):
            self.write(trainer, self.at_end)
        trainer.strategy.barrier("adapter file")  # whoever asks for it finds it
        return self.at_end if pruned else self._best(trainer)

    def _best(self, trainer: Trainer) -> Path:
        """The file of the best checkpoint, where one is monitored; else that of the end.

        It is that of the end, too, where another callback then chooses among the epochs itself, or
        averages them: their checkpoints hold what it was before.
        """
        callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
        if any(hasattr(c, "keeps_source") or isinstance(c, checks.AVERAGES) for c in callbacks):
            return self.at_end
        monitors = [c for c in callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
        path = next((c.best_model_path for c in monitors if c.best_model_path), None)
        if path is None:
            return self.at_end
        file = self._of.get(_key(path))
        if file is None or (trainer.is_global_zero and not (self.folder / file).is_file()):
            rank_zero_warn(
                f"{path} is the best checkpoint, and its adapter file is not in {self.folder}: "
                f"adapter_path_ is that of the end of the fit, {self.at_end}"
            )
            return self.at_end
        return self.folder / file


def is_fitting(trainer: Trainer) -> bool:
    """Whether a fit runs, validation included."""
    return trainer.state.fn == TrainerFn.FITTING and trainer.state.stage is not None


def put_back(trainer: Trainer) -> None:
    """Undo `AdapterFiles.follow`, of all adapters."""
    for name in (_SAVE, _REMOVE, _FILES):
        vars(trainer.strategy).pop(name, None)


def _key(checkpoint: Any) -> str:
    return os.path.abspath(str(checkpoint))
