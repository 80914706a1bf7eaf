"""Names become things: the nearest ones in errors, and packages that add to them."""

from __future__ import annotations

import textwrap

import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, inject
from lora_lightning.adaptation.objectives import OBJECTIVES, Objective
from lora_lightning.errors import ConfigError
from lora_lightning.lora.initialisation import METHODS, initialisation
from lora_lightning.model.state import named_factors
from lora_lightning.registry import Registry
from lora_lightning.vision.methods import METHODS as ROWS


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """From a name and its code: an installed package, with this module as its entry point."""
    monkeypatch.setattr(Registry, "_plugins_are_loaded", False)
    for table in (METHODS, OBJECTIVES, ROWS):
        monkeypatch.setattr(table, "_known", dict(table._known))

    def install(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
        about = tmp_path / f"{name}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[lora_lightning.plugins]\n{name} = {name}\n")
        monkeypatch.syspath_prepend(tmp_path)

    return install


@pytest.fixture
def colours() -> Registry[int]:
    made: Registry[int] = Registry("colour")
    for i, name in enumerate(("red", "green", "blue")):
        made.register(name)(i)
    return made


def test_order_is_that_of_registration(colours):
    assert list(colours) == ["red", "green", "blue"]
    assert list(colours.items()) == [("red", 0), ("green", 1), ("blue", 2)]
    assert len(colours) == 3
    assert colours["green"] == colours.get("green") == 1


def test_unknown_names_get_the_nearest_ones(colours):
    with pytest.raises(ConfigError, match="unknown colour 'gren'; did you mean 'green' or"):
        colours.get("gren")
    with pytest.raises(ConfigError, match="unknown colour 'x'; known: blue, green, red"):
        colours["x"]
    for name in (5, None, ["green"]):  # from YAML
        with pytest.raises(ConfigError, match=r"unknown colour .*(known|did you mean)"):
            colours.get(name)


def test_a_name_is_taken_once(colours):
    with pytest.raises(ConfigError, match="there is another colour called 'red'"):
        colours.register("red")(7)
    assert colours["red"] == 0


def test_a_notebook_cell_may_run_again():
    cell = """
@Registry.register(rules, "double")
def double(x): return {factor} * x
@initialisation("mine")
def mine(setting): return setting.matrix
"""
    rules: Registry = Registry("rule")
    known = {"__name__": "__main__", "rules": rules, "Registry": Registry}
    known["initialisation"] = initialisation
    try:
        for factor in (2, 3):
            exec(cell.format(factor=factor), known)
        assert rules["double"](1) == 3
        assert METHODS["mine"].start is known["mine"]
        with pytest.raises(ConfigError, match="another rule"):
            rules.register("double")(lambda x: x)
    finally:
        METHODS._known.pop("mine", None)


def test_a_decorator_leaves_its_function_as_it_is():
    rules: Registry = Registry("rule")

    @rules.register("double")
    def double(x: int) -> int:
        return 2 * x

    assert double(2) == 4
    assert rules["double"] is double


def test_plugins_are_loaded_on_the_first_miss_and_once(plugin, colours, tmp_path):
    log = tmp_path / "log"
    plugin("counting", f"with open({str(log)!r}, 'a') as log: log.write('loaded ')")
    assert "red" in colours
    assert not log.exists()
    for _ in range(2):
        assert "pink" not in colours
        assert "spotted" not in METHODS
    assert log.read_text() == "loaded "


def test_a_plugin_that_cannot_be_imported_is_named_and_hides_nothing(plugin, colours):
    plugin("broken_one", "raise OSError('no such device')")
    plugin("in_order", "from lora_lightning.lora.initialisation import initialisation, uniform\n"
           "initialisation('same')(uniform)")  # fmt: skip
    with (
        pytest.warns(UserWarning, match="plugin 'broken_one' .*no such device"),
        pytest.raises(ConfigError, match="did you mean 'red'"),
    ):
        colours.get("rad")
    assert "same" in METHODS


def test_a_plugin_that_takes_a_name_is_told_so(plugin, colours):
    plugin("taker", """
        from lora_lightning.lora.initialisation import initialisation, uniform
        initialisation("pissa")(uniform)
    """)  # fmt: skip
    with pytest.warns(UserWarning, match="another initialisation called 'pissa'"):
        list(colours)


def test_a_plugin_adds_an_initialisation(plugin):
    plugin("halves", """
        from lora_lightning.lora.initialisation import initialisation

        @initialisation("halves", moves=True)
        def halves(s):
            return s.matrix[: s.rank] / 2, s.matrix[:, : s.rank] / 2
    """)  # fmt: skip
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    x, weight = torch.randn(4, 6), model[0].weight.detach().clone()
    before = model(x)
    inject(model, rank=2, target_modules=["0"], init="halves")
    assert torch.equal(named_factors(model, "default")["0.weight"].lora_A, weight[:2] / 2)
    assert torch.allclose(model(x), before)
    with pytest.raises(ConfigError, match=r"init must be one of 'zero', .*'corda', 'halves'; got"):
        LoRAConfig(init="half")


def test_a_plugin_adds_an_objective_and_a_recipe_row(plugin):
    plugin("both", """
        from lora_lightning.adaptation.objectives import OBJECTIVES, Objective
        from lora_lightning.vision.methods import METHODS
        @OBJECTIVES.register("stillness")
        class Stillness(Objective):
            def __call__(self, logits, indices): return logits.square().mean()
        @METHODS.register("nothing")
        def nothing(experiment): return []
    """)  # fmt: skip
    assert OBJECTIVES.get("stillness")(None, 1.0, 4)(torch.ones(2, 3), torch.arange(2)) == 1
    assert issubclass(OBJECTIVES.get("stillness"), Objective)
    assert ROWS.get("nothing")(None) == []
    assert "nothing" in list(ROWS)
