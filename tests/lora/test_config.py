"""`LoRAConfig`: errors name the invalid value and the correction."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf
from torch import nn

from lora_lightning import LoRAConfig
from lora_lightning.errors import ConfigError, LoRALightningError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"rank": -3}, "got -3"),
        ({"rank": 2.5}, "got 2.5"),
        ({"rank": True}, "got True"),
        ({"alpha": 0}, "alpha must be a number above 0, got 0"),
        ({"alpha": float("nan")}, "alpha must be a number above 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"scaling": "alpha"}, r"scaling must be one of 'alpha/r', 'alpha/sqrt\(r\)'; got 'alpha'"),
        ({"init": "pissa?"}, "init must be one of"),
        ({"rank_pattern": {"qkv": 0}}, r"rank_pattern\['qkv'\] must be a whole number"),
        ({"alpha_pattern": {"qkv": -1}}, r"alpha_pattern\['qkv'\] must be a number above 0"),
        ({"rank_pattern": ["qkv"]}, "rank_pattern must map patterns to numbers"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": 3}, "target_modules must be a string, a class or a list"),
        ({"target_modules": [3]}, "target_modules holds 3"),
        ({"blocks": "0-3"}, "blocks must be a list of whole numbers"),
        ({"blocks": []}, "blocks must be a list of whole numbers"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"seed": 2**63}, "seed cannot be written to an adapter's file"),
        ({"target_modules": ["re:" + "a|" * 600]}, "target_modules cannot be .* at most 1000 char"),
        ({"rank_pattern": {"\x1b": 2}}, "rank_pattern cannot be written to an adapter's file"),
        ({"dora": "yes"}, "dora must be true or false, got 'yes'"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        LoRAConfig(**values)
    assert isinstance(caught.value, LoRALightningError)
    assert isinstance(caught.value, ValueError)


def test_unknown_key_suggests_the_nearest():
    with pytest.raises(ConfigError, match="unknown key 'targetmodules'; did you mean 'target_mo"):
        LoRAConfig.make({"targetmodules": "auto"})
    with pytest.raises(ConfigError, match="unknown key 'zzz'; known: alpha, alpha_pattern"):
        LoRAConfig.make(zzz=1)
    with pytest.raises(ConfigError, match="expected a LoRAConfig or a mapping, got int"):
        LoRAConfig.make(3)


def test_keywords_override_the_config():
    made = LoRAConfig.make(LoRAConfig(rank=4, alpha=2.0), rank=6)
    assert (made.rank, made.alpha) == (6, 2.0)
    assert LoRAConfig.make({"rank": 4}, rank=6).rank == 6
    assert LoRAConfig.make(None) == LoRAConfig()


def test_omegaconf_structured_there_and_back():
    schema = OmegaConf.structured(LoRAConfig)
    merged = OmegaConf.merge(schema, {"rank": 3, "target_modules": ["qkv"], "blocks": [0, -1]})
    made = LoRAConfig.make(merged)
    assert (made.rank, made.target_modules, made.blocks) == (3, ["qkv"], [0, -1])
    assert OmegaConf.to_object(merged) == made
    assert LoRAConfig.make(made.to_dict()) == made


def test_scaling_rules():
    assert LoRAConfig().scale(4, 8.0) == 2.0
    assert LoRAConfig(scaling="alpha/sqrt(r)").scale(4, 8.0) == 4.0


def test_classes_become_patterns():
    assert LoRAConfig(target_modules=nn.Linear).target_modules == [
        "type:torch.nn.modules.linear.Linear"
    ]
