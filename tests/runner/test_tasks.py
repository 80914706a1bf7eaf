"""Many tasks at once: processes that die, what is the same as in turn, Ray."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_lightning.cli import main
from lora_lightning.errors import ConfigError, TaskError
from lora_lightning.runner.jobs import Jobs
from lora_lightning.runner.loading import KINDS
from lora_lightning.runner.tasks import run_tasks
from tests.helpers.jobs import answer
from tests.runner.test_experiment import PointsExperiment, recipe  # noqa: F401  # a fixture

no_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason='Ray is not installed: pip install "ray"'
)
TWO = [Jobs(2), pytest.param(Jobs(2, "ray"), marks=[no_ray, pytest.mark.slow])]


@pytest.mark.filterwarnings("default")  # Ray's own
@pytest.mark.parametrize("jobs", TWO, ids=["processes", "ray"])
def test_a_process_that_dies_costs_its_task_alone(tmp_path, jobs):
    items = [1, "dies", "dies once", "raises", "a lambda", 5, 6]
    done = {d.index: d for d in run_tasks(answer, items, tmp_path, jobs)}
    assert sorted(done) == list(range(7))
    assert [done[i].value for i in (0, 2, 5, 6)] == [1, "the second time", 25, 36]
    assert done[6].said == "said 6\n"
    assert [type(done[i].error) for i in (1, 3, 4)] == [TaskError, ValueError, TaskError]
    assert "and so did a second one" in str(done[1].error)
    assert str(done[3].error) == "a reason"
    # In turn, in this process.
    alone = [d.value for d in run_tasks(answer, [1, 5, 6], tmp_path)]
    assert alone == [1, 25, 36]


def test_tasks_are_read_as_there_is_room_and_end_with_the_driver(tmp_path):
    taken = []
    tasks = run_tasks(answer, (taken.append(i) or i for i in range(1000)), tmp_path, Jobs(2))
    next(tasks)
    assert len(taken) <= 4
    tasks.close()
    # A driver that is killed takes its processes with it, at work or not.
    code = f"""if 1:
        from pathlib import Path
        from lora_lightning.runner.jobs import Jobs
        from lora_lightning.runner.tasks import run_tasks
        from tests.helpers.jobs import answer
        list(run_tasks(answer, ["waits"] * 2, Path({str(tmp_path)!r}), Jobs(2)))
    """
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    limit = time.monotonic() + 60
    while len(found := list(tmp_path.glob("pid-*"))) < 2 and time.monotonic() < limit:
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    pids = [int(path.name[4:]) for path in found]
    assert len(pids) == 2
    while any(map(alive, pids)) and time.monotonic() < limit:
        time.sleep(0.01)
    assert not any(map(alive, pids))


def alive(pid):
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--jobs", "0"], "at least 1"),
        (["--address", "auto"], "add --engine ray"),
        pytest.param(["--engine", "ray"], "lora-lightning[ray]", marks=pytest.mark.skipif(
            importlib.util.find_spec("ray") is not None, reason="Ray is installed")),
    ],
)  # fmt: skip
def test_mistakes(recipe, capsys, options, said):  # noqa: F811
    out = f"out={recipe / 'out'}"
    assert main(["run", str(recipe), "seeds=[0,1]", "methods=[source_only]", out, *options]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def files(folder):
    """Of a run, without what a clock decides: seconds, and the page that shows them."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".yaml"):
            found[path.relative_to(folder)] = path.read_bytes()
        elif path.suffix == ".json":
            lines = path.read_text().replace(str(folder), "").splitlines()
            found[path.relative_to(folder)] = [x for x in lines if '"seconds"' not in x]
    return {k: v.replace(str(folder).encode(), b"") if isinstance(v, bytes) else v
            for k, v in found.items()}  # fmt: skip


COMMANDS = {
    "seeds": ["run", "seeds=[0,1,3]", "methods=[source_only,label_free,lora]"],
    "ranks": ["sweep", "--ranks", "1", "2"],
    "cells": ["sweep", "lora.rank=1,2", "train.lora.learning_rate=1e-3,1e-2"],
    "sources": ["sweep", "train.source.epochs=1,2"],
}


@pytest.mark.slow  # each process imports torch and Lightning
@pytest.mark.parametrize("name", COMMANDS)
def test_the_files_are_those_of_one_after_the_other(recipe, undrawn, name):  # noqa: F811
    command, *rest = COMMANDS[name]
    for out, more in (("turn", []), ("once", ["--jobs", "2"])):
        assert main([command, str(recipe), f"out={recipe / out}", *rest, *more]) == 0
    assert files(recipe / "turn") == files(recipe / "once")
    assert not (recipe / "once/parts").exists()


class Killed(PointsExperiment):
    """Its second seed kills its process while a file says so."""

    def before_methods(self):
        if self.seed == 1 and (Path(self.config.out).parent / "kill").exists():
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_seed_whose_process_dies_is_run_by_the_next_command(recipe, undrawn, capsys):  # noqa: F811
    config = KINDS.get("points").config
    KINDS._known["points"] = type(KINDS.get("points"))(config, Killed)
    command = ["run", str(recipe), "seeds=[0,1,3]", "methods=[source_only,lora]"]
    assert main([*command, f"out={recipe / 'turn'}"]) == 0
    (recipe / "kill").touch()
    out = recipe / "once"
    assert main([*command, "--jobs", "2", f"out={out}"]) == 2
    assert "1 of 3 parts failed (seed 1, source_only, lora: its process ended by SIGKILL" in (
        " ".join(capsys.readouterr().err.split())
    )
    kept = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    assert [path.name for path in sorted(kept)] == ["seed0-0.pt", "seed3-0.pt"]
    (recipe / "kill").unlink()
    assert main([*command, "--jobs", "2", f"out={out}"]) == 0
    assert files(recipe / "turn") == files(out)


def test_an_engine_is_named():
    with pytest.raises(ConfigError, match="expected one of processes, ray"):
        Jobs(2, "threads")
