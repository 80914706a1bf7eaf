"""README, docs and the recipes' pages: code runs, links resolve, names and commands exist.

In a page of docs/, the ```python blocks are run one after the other, as one script. What a
reader need not see stands in ``<!-- test: setup … -->``. A block that cannot run is tagged
```py, and the line above it says why: ``<!-- not run: reason -->``.
"""

from __future__ import annotations

import functools
import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest
import timm

import lora_lightning
from lora_lightning import cli
from lora_lightning.adaptation.objectives import OBJECTIVES
from lora_lightning.lora import layers
from lora_lightning.lora.initialisation import METHODS
from lora_lightning.report.plots import PLOTS
from lora_lightning.runner import loading
from lora_lightning.vision.methods import METHODS as ROWS

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
RECIPES = sorted((ROOT / "recipes").glob("*/README.md"))
STUBS = sorted((ROOT / "lora_lightning").glob("*/**/__init__.pyi"))
ROOMS = [".".join(stub.parent.relative_to(ROOT).parts) for stub in STUBS]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")),
    *DOCS,
    *RECIPES,
]

# They show figures of test_vit as timm has it; tests/conftest.py gives others a smaller one.
AS_IT_IS = ("docs/choose-targets.md", "docs/tutorial.md")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_RUN = re.compile(
    r"^```python\n(?P<shown>.*?)^```$|^<!-- test: setup\n(?P<hidden>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)


def named(pages: list[Path]) -> dict[str, Path]:
    return {str(page.relative_to(ROOT)): page for page in pages}


def code(page: Path) -> str:
    """A page's Python as one script, each line where it stands in the page."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * text.count("\n")
    for block in _RUN.finditer(text):
        part = "shown" if block["shown"] is not None else "hidden"
        start = text.count("\n", 0, block.start(part))
        body = block[part].splitlines()
        lines[start : start + len(body)] = body
    return "\n".join(lines)


def commands(page: Path) -> list[list[str]]:
    """Arguments of every ``lora-lightning …`` in the page's sh blocks and inline code."""
    text = page.read_text(encoding="utf-8")
    shells = [body for tag, body in _FENCE.findall(text) if tag == "sh"]
    lines = "\n".join(shells).replace("\\\n", " ")
    parts = re.split(r"\n|&&", lines) + re.findall(r"`(lora-lightning [^`\n]+)`", text)
    return [shlex.split(p, comments=True)[1:] for p in parts if p.strip().startswith("lora-light")]


# ---- code ----------------------------------------------------------------------------------


def test_the_readme_examples_have_twelve_lines_and_six():
    blocks = [body for tag, body in _FENCE.findall(PAGES[0].read_text()) if tag == "python"]
    assert [sum(map(bool, body.split("\n"))) for body in blocks] == [12, 6]


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.parametrize("name", [n for n, p in named(PAGES).items() if code(p).strip()])
def test_python_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for registry in (METHODS, OBJECTIVES, PLOTS, ROWS):  # what a page adds goes with it
        monkeypatch.setattr(registry, "_known", dict(registry._known))
    monkeypatch.setattr(layers, "_KINDS", dict(layers._KINDS))
    if name in AS_IT_IS:
        known = timm.models._registry._model_entrypoints
        monkeypatch.setitem(known, "test_vit", known["test_vit"].func)
    exec(compile(code(ROOT / name), name, "exec"), {"__name__": f"page_{Path(name).stem}"})


@pytest.mark.parametrize("name", named(PAGES))
def test_every_block_says_what_it_is(name):
    text = (ROOT / name).read_text()
    assert text.count("```") == 2 * len(_FENCE.findall(text)), "a fence is not closed"
    tags = {tag for tag, _ in _FENCE.findall(text)}
    assert tags <= {"python", "py", "sh", "text", "yaml"}
    unexplained = re.findall(r"^(?!<!-- not run: ).*\n```py$", text, re.MULTILINE)
    assert not unexplained, "say above a ```py block why it is not run"


# ---- names, files, links ---------------------------------------------------------------------


@pytest.mark.parametrize("room", ROOMS)
def test_every_name_of_a_room_is_in_the_api_page_sorted(room):
    page = (ROOT / "docs/api.md").read_text()
    shown = re.findall(rf"^::: {re.escape(room)}\.(\w+)$", page, re.MULTILINE)
    assert shown == importlib.import_module(room).__all__
    assert f"From `{room}`:" in page


def test_every_public_name_is_in_the_api_page_sorted():
    page = (ROOT / "docs/api.md").read_text()
    assert (
        re.findall(r"^\[`(\w+)`\]\[lora_lightning\.", page, re.MULTILINE) == lora_lightning.__all__
    )
    linked = set(re.findall(r"\]\[(lora_lightning[\w.]+)\]", page))
    errors = {name for name in linked if name.startswith("lora_lightning.errors.")}
    assert linked - errors <= set(re.findall(r"^::: (\S+)$", page, re.MULTILINE))


@pytest.mark.parametrize("name", named(PAGES))
def test_relative_links_resolve(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{name} links to {target}"
        if anchor and not anchor.startswith("lora_lightning."):
            assert anchor in anchors(file), f"{name} links to {target}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w]+", "-", re.sub(r"[`,.]", "", h).lower()).strip("-") for h in headings}


@pytest.mark.parametrize("name", named(PAGES))
def test_files_named_exist(name):
    text = re.sub(r"^```.*?^```$", "", (ROOT / name).read_text(), flags=re.MULTILINE | re.DOTALL)
    folders = r"(?:lora_lightning|benchmarks|docs|examples|recipes|tests|\.ci)/"
    found = re.findall(rf"`({folders}[^`*…\s]*)(?: [^`]*)?`", text)
    missing = [path for path in found if not (ROOT / path.partition("::")[0]).exists()]
    assert not missing


def test_every_conformance_test_is_in_the_table_and_exists():
    page = (ROOT / "docs/conformance.md").read_text()
    rows = re.findall(r"\| `(?:([\w/.]+)::)?(test_\w+)` \|$", page, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| (?!case|---)", page, re.MULTILINE))
    named_here = {name for file, name in rows if not file}
    assert named_here == defined_tests(ROOT / "tests/test_conformance.py")
    for file, name in rows:
        assert not file or name in defined_tests(ROOT / file)


def defined_tests(file: Path) -> set[str]:
    return set(re.findall(r"^def (test_\w+)\(", file.read_text(), re.MULTILINE))


def test_the_navigation_names_every_page():
    nav = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(nav) == [page.name for page in DOCS]


def test_the_picture_of_the_rooms_has_a_word_for_each():
    drawing = runpy.run_path(str(ROOT / "docs/_rooms.py"))
    rooms = [room for floor in drawing["floors"]()[2:] for room in floor]
    assert sorted(drawing["PURPOSE"]) == sorted(rooms)


def test_nothing_is_fetched_by_a_page():
    site = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in site
    assert "extra_javascript" not in site
    # The theme asks GitHub for the number of stars where it knows a repository.
    assert "repo_url" not in site
    for page in DOCS:
        text = page.read_text()
        assert not re.search(r"<(script|link|iframe)|!\[[^]]*\]\(https?:", text), page.name


# ---- commands --------------------------------------------------------------------------------


def test_the_two_lines_of_the_readme():
    shells = [body.strip() for tag, body in _FENCE.findall(PAGES[0].read_text()) if tag == "sh"]
    assert shells[:2] == [
        'pip install -e ".[demo]" && lora-lightning run lighting',
        'pip install -e ".[dev]" && pytest',
    ]


@pytest.mark.parametrize("name", [n for n, p in named(PAGES).items() if commands(p)])
def test_commands_parse(name):
    for arguments in commands(ROOT / name):
        if len(arguments) == 1 and arguments[0] in {"inspect", "merge", "copy"}:
            continue  # spoken of, not typed
        parsed = cli._parser().parse_args(arguments)
        if arguments[0] == "run" and Path(parsed.name).name == "lighting":
            loading.apply_overrides(settings(), parsed.overrides)


@functools.cache
def settings():
    return loading.load_recipe("lighting")


def test_the_reader_of_commands_sees_them_all():
    found = [c[0] for page in PAGES for c in commands(page)]
    assert {"run", "list", "copy", "inspect", "merge"} <= set(found)
