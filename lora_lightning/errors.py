"""The exceptions that lora-lightning raises.

    LoRALightningError
    ├── ConfigError(ValueError)            a setting is unknown, out of range or contradictory
    ├── TargetError(ValueError)            a target matches nothing, or cannot be adapted
    ├── AdapterError(RuntimeError)         the adapters of a model are not in the state asked for
    │   ├── AdapterNotFoundError           no adapter (of that name) on this model
    │   └── AdapterExistsError             that name is taken by an adapter that differs
    ├── VerificationError(RuntimeError)    an adapter is dead, without effect, or not mergeable
    ├── WeightWriteError(RuntimeError)     a write that would have been lost
    ├── AdapterFileError(ValueError)       a file is damaged, foreign, or does not fit the model
    │   └── BaseMismatchError              the file was made for another base model
    ├── DecompositionError(ValueError)     a matrix cannot be decomposed as asked
    ├── TaskError(RuntimeError)            a task's process died, or its result cannot be sent
    ├── DataError(ValueError)              a dataset cannot be used as it is
    │   └── DataNotFoundError(FileNotFoundError)
    └── MissingDependencyError(ImportError) an optional extra is not installed

Each descends from the built-in that fits as well, so `except ValueError` works
for those who do not want to import ours. A message says what was given, what was
expected and what to do about it.
"""


class LoRALightningError(Exception):
    """Base of all errors of this package (the tree is drawn in the module's docstring)."""


class ConfigError(LoRALightningError, ValueError):
    """A setting is unknown, out of range or contradicts another."""


class TargetError(LoRALightningError, ValueError):
    """A target matches nothing, or names something that cannot be adapted."""


class AdapterError(LoRALightningError, RuntimeError):
    """The adapters of a model are not in the state that the call needs."""


class AdapterNotFoundError(AdapterError):
    """The model holds no adapter, or none of that name."""


class AdapterExistsError(AdapterError):
    """The name is taken by an adapter with another configuration."""


class VerificationError(LoRALightningError, RuntimeError):
    """An adapter is dead, without effect, or changes the output when merged."""


class WeightWriteError(LoRALightningError, RuntimeError):
    """A write went to a temporary effective weight and would have been lost."""


class AdapterFileError(LoRALightningError, ValueError):
    """An adapter file is damaged, foreign, or does not fit the model."""


class BaseMismatchError(AdapterFileError):
    """An adapter file was made for another base model."""


class DecompositionError(LoRALightningError, ValueError):
    """A matrix is empty, not finite, or has no such rank."""


class TaskError(LoRALightningError, RuntimeError):
    """A task's process died, or what it returned or raised cannot be sent."""


class DataError(LoRALightningError, ValueError):
    """A dataset cannot be used as it is."""


class DataNotFoundError(DataError, FileNotFoundError):
    """A dataset's folder or file does not exist."""


class MissingDependencyError(LoRALightningError, ImportError):
    """An optional extra is needed and not installed."""


def first_line(error: Exception) -> str:
    """The first line that another package's error says, shortened; its kind where it says none."""
    return next((x for x in str(error).splitlines() if x.strip()), repr(error))[:300]
