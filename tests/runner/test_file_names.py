"""Names of files and adapters from what people call speakers and domains."""

import pytest

from lora_lightning.lora.values import check_adapter_name
from lora_lightning.runner.file_names import adapter_name, file_names

ODD = [
    "José", "Jose\u0301", "李明", "", "train", "x" * 300, "明" * 300, "Anna", "anna", "con", "a/b",
    "..", ".hidden", "-rf", "a\x1b[31m", "[/]", "a\\b", "C:", "\ud800", "  ", "nul.txt", "ﬁ", "fi",
]  # fmt: skip


def test_file_names_are_safe_distinct_and_stay(tmp_path):
    names = file_names(ODD)
    assert len({n.casefold() for n in names.values()}) == len(ODD)
    for name, stem in names.items():
        (tmp_path / f"{stem}.safetensors").touch(exist_ok=False)
        assert file_names([name, "other"])[name] in (stem, name)
        check_adapter_name(adapter_name(name))
    assert len({adapter_name(n) for n in ODD}) == len(ODD)
    assert (names["李明"], names["train"]) == ("李明", "train")
    assert all("José" in names[n] for n in ODD[:2])


@pytest.mark.parametrize("name", ["anna", "p225", "José", "李明", "anna b", "a.b", "X_1-2"])
def test_a_name_that_can_stay_stays(name):
    assert file_names([name, "other"])[name] == name


@pytest.mark.parametrize("name", ["anna", "dutch-5-no-labels", "adapter_rank_64-seed3"])
def test_an_adapters_name_that_can_stay_stays(name):
    assert adapter_name(name) == name
