"""The command ``lora-lightning``; what it can do is in the rooms' own ``cli.py``.

Modules that take long to import are imported by the command that needs them.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress

from lora_lightning.deploy import cli as deploy
from lora_lightning.deploy.commands import serve
from lora_lightning.report import streams
from lora_lightning.report.sentences import sentence
from lora_lightning.report.versions import installed
from lora_lightning.runner import cli as recipes
from lora_lightning.runner.memory import keep_freed_memory
from lora_lightning.speech import cli as speech
from lora_lightning.vision import cli as vision

EXAMPLES = """\
examples:
  lora-lightning run lighting
  lora-lightning run lighting --quick          a first, rougher table
  lora-lightning run lighting --help           every setting, with its default
  lora-lightning run lighting seeds=[0,1,2] out=runs/three
  lora-lightning run lighting data.root=photos data.source=day data.target=[night]
  lora-lightning sweep lighting --ranks 1 2 4 8
  lora-lightning sweep lighting lora.rank=1,2,4 train.lora.learning_rate=1e-3,1e-2
  lora-lightning adapt-images --model convnext_tiny --checkpoint mine.pth --images night/ \
      --out night.safetensors
  lora-lightning adapt-speaker --model spoken --enroll alice/ --out alice.safetensors
  lora-lightning transcribe --model spoken --adapter alice.safetensors message.wav
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    0: done; 1: some speaker or file of several failed; 2: an error; 130: Ctrl-C; 141: whoever read
    what is printed has closed the pipe, which ends the command.
    """
    arguments = _parsed(argv)
    arguments.typed = shlex.join(["lora-lightning", *(sys.argv[1:] if argv is None else argv)])
    # For OpenMP, which reads it when torch is imported: its threads spin while they wait, and on
    # two cores with another program at work that makes training 3 to 5 times slower. Sleeping
    # threads cost 2 % on a quiet machine (EfficientNet-Lite0, 112 pixels, 2026-11-23).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if arguments.command is not serve:  # which stays, and forks
        keep_freed_memory()
    streams.prepare()
    try:
        code = arguments.command(arguments) or 0
        streams.flush()
        return code
    except KeyboardInterrupt:
        _complain("stopped")
        return 130
    except BrokenPipeError:
        streams.discard()
        return 141  # as a program that SIGPIPE ends
    except Exception as error:
        if (said := sentence(error)) is None:  # a fault of ours: its traceback is of use
            raise
        _complain(f"error: {said}")
        with suppress(OSError):
            streams.flush()
        return 2


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; settings may follow options, where argparse would not look for them."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    settings = all("=" in x and not x.startswith("-") for x in rest)
    if rest and not (settings and hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _complain(message: str) -> None:
    from lora_lightning.report.console import PlainConsole

    PlainConsole(stderr=True).print(message, style="red", soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lora-lightning",
        description="Adapt speech and vision models to a new domain with low-rank adapters.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lora-lightning {installed()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    recipes.add_commands(commands)
    vision.add_commands(commands)
    speech.add_commands(commands)
    deploy.add_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
