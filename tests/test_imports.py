"""What importing costs, and which module may import which."""

from __future__ import annotations

import ast
import functools
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_lightning

PACKAGE = Path(lora_lightning.__file__).parent

# Lowest first: a module may import those of earlier lines, never its own line or a later one.
# Modules on one line know nothing of each other; those of one folder do, without circles. Imports
# inside a function count as well, imports for type checkers do not.
LAYERS = (
    # What an adapter is.
    "family_tables tree",
    "errors parametrized producers summary thin units wording",
    "plan",
    "ops",
    "conv_ops",
    "decompose distances fitting",
    "nmf ranks streaming",
    "initialize",
    "config factors guard patterns",
    "pruning",
    "layers xs",
    "adapter",
    # What is done with it.
    "merging probe shortcuts structure",
    "families fingerprint",
    "targets",
    "state",
    "compression optim",
    "checkpoints",
    "gathering switching",
    "starting",
    "rank_choice",
    "injection verification",
    "combination shrinkage",
    "fileformat",
    "files loading",
    "bank",
    # Lightning.
    "batchnorm first_batch trainer_pruning trainer_start",
    "trainer_checks",
    "save_hook",
    "callback held_out prefix",
    "cross_fitting fit_guard",
    # Recipes: data, tasks and reports, what runs them, the command.
    "data results",
    "averages",
    "tasks transcripts",
    "listen plots",
    "transduction",
    "features verdicts",
    "second_opinion",
    "source_statistics",
    "shifts",
    "html",
    "report",
    "runs",
    "recipe",
    "cli_speech",
    "cli",
)
# Packages that only some modules need: whoever imports lora_lightning does not pay for them.
HEAVY = {
    "PIL", "direct", "espeakng_loader", "jiwer", "matplotlib", "omegaconf", "panda3d",
    "pyroomacoustics", "rich", "safetensors", "scipy", "sklearn", "soundfile", "timm",
    "torchaudio", "torchmetrics", "torchvision", "trimesh",
}  # fmt: skip


@functools.cache
def modules() -> dict[str, Path]:
    """Name below lora_lightning → file; packages without code in them left out."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(p for p in parts if p != "__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if name and not all(isinstance(node, ast.Expr) for node in tree.body):
            found[name] = path
    return found


def imports(source: str) -> Iterator[str]:
    """Modules below lora_lightning that this source imports, type checking left out."""
    for node in _walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name[15:] for a in node.names if a.name.startswith("lora_lightning."))
        elif isinstance(node, ast.ImportFrom) and node.module == "lora_lightning":
            yield from (lora_lightning._HOME.get(a.name, a.name) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_lightning."):
            yield str(node.module)[15:]


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        test = getattr(child, "test", None)
        if isinstance(child, ast.If) and isinstance(test, ast.Name) and test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from _walk(child)


def violations(name: str, source: str) -> list[str]:
    """The imports of this module that the order does not allow."""
    level = {module: i for i, line in enumerate(LAYERS) for module in line.split()}
    wrong = []
    for other in set(imports(source)):
        own, known = name.partition(".")[0], other.partition(".")[0]
        if known == own or known not in level:
            continue  # of one folder, or a name of the package itself, such as __version__
        if own not in level or level[known] >= level[own]:
            wrong.append(f"{name} imports {other}, which is not below it in LAYERS")
    return wrong


def test_every_module_has_its_place():
    listed = " ".join(LAYERS).split()
    assert len(listed) == len(set(listed))
    assert set(listed) == {name.partition(".")[0] for name in modules()}


def test_there_is_no_circle():
    sources = {name: path.read_text(encoding="utf-8") for name, path in modules().items()}
    graph = {
        name: {o for o in imports(source) if o in sources and o != name}
        for name, source in sources.items()
    }
    assert list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


@pytest.mark.parametrize("name", modules())
def test_modules_import_only_what_is_below_them(name):
    assert not violations(name, modules()[name].read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "line",
    [
        "from lora_lightning.callback import LoRACallback",
        "import lora_lightning.callback",
        "from lora_lightning import callback as c",
        "from lora_lightning import LoRACallback",
        "def f():\n    from lora_lightning.adapter import adapt",
    ],
)
def test_the_check_can_fail(line):
    assert violations("layers", line)


def test_the_check_lets_pass_what_it_should():
    assert not violations("layers", "from lora_lightning.factors import Factors\nimport torch")
    typing_only = "if TYPE_CHECKING:\n    from lora_lightning.callback import LoRACallback"
    assert not violations("layers", typing_only)


STAGES = {
    "the package": "import lora_lightning",
    "torch and lightning": "import torch, lightning.pytorch",
    "every public name": "from lora_lightning import *",
    "recipes": "import lora_lightning.recipe",
}


@pytest.fixture(scope="module")
def brought() -> dict[str, set[str]]:
    """Stage → top-level packages that it brought into a fresh process."""
    lines = ["import json, sys; t = []"]
    lines += [f"{s}; t.append(sorted(sys.modules))" for s in STAGES.values()]
    program = "\n".join([*lines, "print(json.dumps(t))"])
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], check=True, capture_output=True, text=True
    )
    found: dict[str, set[str]] = {}
    before: set[str] = set()
    for stage, names in zip(STAGES, json.loads(out.stdout.splitlines()[-1]), strict=True):
        now = {name.partition(".")[0] for name in names}
        found[stage], before = now - before, now
    return found


def test_importing_the_package_imports_next_to_nothing(brought):
    assert not brought["the package"] & (HEAVY | {"torch", "lightning"})


def test_importing_every_public_name_imports_nothing_heavy(brought):
    # What torch and lightning themselves bring along is not ours.
    assert not brought["every public name"] & HEAVY


def test_the_test_of_imports_can_fail(brought):
    assert "omegaconf" in brought["recipes"]


def test_public_names_are_sorted_and_exist():
    assert lora_lightning.__all__ == sorted(lora_lightning.__all__)
    assert sorted(lora_lightning._HOME) == lora_lightning.__all__
    for name in lora_lightning.__all__:
        assert getattr(lora_lightning, name) is not None
    assert set(lora_lightning.__all__) <= set(dir(lora_lightning))
    with pytest.raises(AttributeError, match="no attribute 'lora'"):
        lora_lightning.lora  # noqa: B018


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()
