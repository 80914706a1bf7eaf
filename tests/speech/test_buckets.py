"""`BucketSampler`: each recording once, within the budget, shared by processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lora_lightning.errors import ConfigError
from lora_lightning.speech.data.buckets import BucketSampler

lengths = st.lists(st.floats(0.01, 100.0), max_size=80)
options = st.fixed_dictionaries(
    {
        "batch_seconds": st.floats(0.1, 200.0),
        "max_batch": st.integers(1, 12),
        "shuffle": st.booleans(),
        "seed": st.integers(0, 3),
    }
)


def flat(batches):
    return [index for batch in batches for index in batch]


@settings(max_examples=200, deadline=None)
@given(lengths, options, st.integers(0, 5))
def test_each_once_and_within_the_budget(seconds, given, epoch):
    sampler = BucketSampler(seconds, **given)
    count = len(sampler)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == count == len(sampler)
    assert sorted(flat(batches)) == list(range(len(seconds)))
    for batch in batches:
        assert 1 <= len(batch) <= given["max_batch"]
        longest = max(seconds[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= given["batch_seconds"]


@settings(max_examples=100, deadline=None)
@given(lengths, options, st.integers(1, 4), st.booleans())
def test_processes_share_all_batches(seconds, given, world, drop_last):
    def shares(epoch):
        samplers = [
            BucketSampler(seconds, **given, drop_last=drop_last, num_replicas=world, rank=rank)
            for rank in range(world)
        ]
        [s.set_epoch(epoch) for s in samplers]
        return samplers, [list(s) for s in samplers]

    samplers, parts = shares(1)
    assert {len(part) for part in parts} == {len(samplers[0])}
    together = {tuple(batch) for part in parts for batch in part}
    everything = {tuple(batch) for batch in samplers[0].batches()}
    if drop_last:
        assert together <= everything
        assert len(together) == len(everything) // world * world  # none comes twice
    else:
        assert together == everything


def test_unshuffled_is_sorted_and_stable():
    seconds = [3.0, 1.0, 2.0, 1.0, 3.0, 2.0]
    sampler = BucketSampler(seconds, 6.0, 32)
    assert list(sampler) == [[1, 3], [2, 5], [0, 4]]
    assert list(sampler) == list(sampler)
    assert list(BucketSampler([5.0, 99.0, 4.0], 10.0, 32)) == [[2, 0], [1]]


def test_the_order_given_can_be_kept():
    seconds = [3.0, 1.0, 2.0, 1.0, 30.0, 2.0, 2.0]
    sampler = BucketSampler(seconds, 6.0, 3, by_length=False)
    assert list(sampler) == [[0, 1], [2, 3], [4], [5, 6]]
    with pytest.raises(ConfigError, match="needs shuffle=False"):
        BucketSampler(seconds, 6.0, 3, shuffle=True, by_length=False)


def test_epochs_mix_and_depend_on_the_seed_only():
    seconds = np.random.default_rng(0).uniform(1, 15, 200).tolist()

    def epoch(number, seed=0):
        sampler = BucketSampler(seconds, 60.0, 32, shuffle=True, seed=seed)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(1) == epoch(1)
    together = [{frozenset(batch) for batch in epoch(n, seed)} for n, seed in ((0, 0), (1, 0))]
    assert len(together[0] & together[1]) <= 2  # other company, not only another order
    assert epoch(0, seed=1) != epoch(1, seed=0) != epoch(0)


def test_little_is_padding():
    seconds = np.random.default_rng(0).uniform(1, 15, 2000).tolist()
    batches = list(BucketSampler(seconds, 60.0, 64, shuffle=True))
    padded = sum(len(batch) * max(seconds[i] for i in batch) for batch in batches)
    assert sum(seconds) / padded > 0.95
    assert padded / len(batches) > 0.85 * 60  # and batches are full


def test_drop_last_leaves_out_what_fills_no_batch():
    sampler = BucketSampler([1.0] * 10, 4.0, 32, shuffle=True, drop_last=True)
    seen = set()
    for epoch in range(6):
        sampler.set_epoch(epoch)
        assert [len(batch) for batch in sampler] == [4, 4]
        seen |= set(flat(sampler))
    assert len(seen) == 10  # not always the same ones


def test_as_a_batch_sampler():
    sampler = BucketSampler([1.0, 2.0, 3.0, 4.0], 8.0, 2)
    loader = DataLoader(torch.arange(4), batch_sampler=sampler)
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("bad", [float("nan"), 0.0, -1.0, float("inf")])
def test_lengths_must_be_known(bad):
    with pytest.raises(ConfigError, match=r"seconds\[1\] must be a length in seconds"):
        BucketSampler([1.0, bad], 10.0, 4)


def test_mistakes_in_settings():
    for name, value in (("batch_seconds", 0), ("max_batch", 0), ("seed", -1)):
        with pytest.raises(ConfigError, match=f"{name} must be"):
            BucketSampler([1.0], **{"batch_seconds": 9.0, "max_batch": 4, name: value})
    with pytest.raises(ConfigError, match="rank must be one of 0 to 1, got 2"):
        BucketSampler([1.0], 9.0, 4, num_replicas=2, rank=2)


def test_the_processes_are_those_of_torch_distributed(monkeypatch):
    for name, value in (("is_initialized", True), ("get_world_size", 3), ("get_rank", 2)):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda value=value: value)
    sampler = BucketSampler([1.0] * 7, 1.0, 1)
    assert list(sampler) == [[2], [5], [1]]


TWO = """
import sys, warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import soundfile

from lora_lightning.speech.data.speech_data import SpeechData
from lora_lightning.speech.data.utterances import Utterance
from tests.helpers.training import trainer
from tests.speech.test_speech_data import Listener


class Both(Listener):
    def on_train_epoch_end(self):
        out = Path(sys.argv[1], f"{self.current_epoch}-{self.global_rank}.txt")
        out.write_text(" ".join(self.heard))
        self.heard.clear()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    for i in range(7):
        soundfile.write(folder / f"{i}.flac", np.random.default_rng(i).normal(0, 0.1, 1600), 8000)
    items = [Utterance(folder / f"{i}.flac") for i in range(7)]
    data = SpeechData(train=items, validation=items, sample_rate=8000, max_batch=1)
    trainer(folder, devices=2, strategy="ddp").fit(Both(), datamodule=data)
"""


@pytest.mark.slow
def test_two_real_processes(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, script, tmp_path], check=True, timeout=300, env=env)
    heard = [[(tmp_path / f"{e}-{r}.txt").read_text().split() for r in (0, 1)] for e in (0, 1)]
    for parts in heard:
        assert [len(part) for part in parts] == [4, 4]
        assert set(flat(parts)) == set("0123456")
    assert heard[0] != heard[1]
