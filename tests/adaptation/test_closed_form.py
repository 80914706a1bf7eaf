"""Closed-form alignment: it undoes the shifts it is meant for, and equals its equation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_lightning.adaptation import closed_form
from lora_lightning.errors import ConfigError, DataError

METHODS = [
    closed_form.nearest_centroid,
    closed_form.subspace_alignment,
    closed_form.nmf_subspace,
    closed_form.coral,
]


def domains(seed=0, positive=False):
    """Three classes; the target is rotated within the plane that separates them, and shifted."""
    g = torch.Generator().manual_seed(seed)
    means = 4 * torch.eye(3, 12)
    labels = torch.arange(300) % 3
    source, target = (
        means[labels] + 0.3 * torch.randn(300, 12, generator=g) * torch.linspace(1, 3, 12)
        for _ in range(2)
    )
    target = 2 * target + 5
    return (source.abs(), labels, target.abs()) if positive else (source, labels, target)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("positive", [False, True])
def test_a_moved_and_scaled_target_is_recognised(method, positive):
    source, labels, target = domains(positive=positive)
    said = method(source, labels, target)
    assert said.shape == (300, 3)
    torch.testing.assert_close(said.sum(1), torch.ones(300))
    assert (said.argmax(1) == labels).float().mean() > 0.95
    torch.testing.assert_close(method(source, labels, target), said)


def test_subspace_alignment_is_its_equation():
    source, labels, target = domains()
    z = [(x - x.mean(0)) / x.std(0, correction=0) for x in (source.double(), target.double())]
    bases = [np.linalg.svd(x.numpy(), full_matrices=False)[2] for x in z]
    values = np.linalg.svd(z[0].numpy(), compute_uv=False) ** 2
    d = int((np.cumsum(values) / values.sum() < 0.9).sum()) + 1
    xs, xt = (b[:d].T for b in bases)
    s, t = z[0].numpy() @ xs @ xs.T @ xt, z[1].numpy() @ xt
    centres = np.stack([s[labels == k].mean(0) for k in range(3)])
    nearest = np.linalg.norm(t[:, None] - centres, axis=2).argmin(1)
    said = closed_form.subspace_alignment(source, labels, target).argmax(1)
    assert said.tolist() == nearest.tolist()


def test_coral_gives_the_source_the_targets_covariance():
    source, _, target = domains()
    mixed = target @ torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator())).Q
    s, t = closed_form._standardised(source), closed_form._standardised(mixed)
    moved = s @ closed_form._power(s, -0.5) @ closed_form._power(t, 0.5)
    inverse = np.linalg.inv(closed_form._power(s, 0.5))
    np.testing.assert_allclose(closed_form._power(s, -0.5), inverse, atol=1e-9)
    before = np.linalg.norm(np.cov(s.T) - np.cov(t.T))
    assert np.linalg.norm(np.cov(moved.T) - np.cov(t.T)) < 0.7 * before


def test_what_cannot_be_aligned_is_said():
    source, labels, target = domains()
    with pytest.raises(DataError, match="do not fit"):
        closed_form.coral(source, labels[:-1], target)
    with pytest.raises(DataError, match="do not fit"):
        closed_form.coral(source, labels, target[:, :-1])
    with pytest.raises(DataError, match="two classes"):
        closed_form.nearest_centroid(source, torch.zeros(300, dtype=torch.long), target)
    with pytest.raises(ConfigError, match="energy"):
        closed_form.subspace_alignment(source, labels, target, energy=1.5)
    constant = source.clone()
    constant[:, 0] = 1  # a dead unit
    assert closed_form.nmf_subspace(constant, labels, target).isfinite().all()
