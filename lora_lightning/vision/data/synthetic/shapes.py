"""Procedural shapes of everyday objects: each call of a maker draws an instance of its class."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from lora_lightning.vision.data.synthetic.solids import (
    Floats,
    Rng,
    Solid,
    ball,
    block,
    lathe,
    legs,
    ring,
    tube,
    turned,
)


def airplane(rng: Rng) -> list[Solid]:
    """An airliner or a jet: sweep, taper and up to two engines a side."""
    u, r = rng.uniform, rng.uniform(0.1, 0.17)
    taper, sweep, span, high = u(0.35, 0.9), u(-0.05, 0.5), u(0.75, 1.15), u(-0.08, 0.12)

    def panel(start: ArrayLike, chord: float, reach: ArrayLike) -> Floats:
        path = np.asarray(start) + np.linspace(0, 1, 5)[:, None] * np.asarray(reach)
        airfoil = ring((0, 0, 0), 0.5, 0.06, 12)  # thin along y: right for the fin
        if abs(np.asarray(reach)[1]) > abs(np.asarray(reach)[2]):
            airfoil = airfoil[:, [0, 2, 1]]
        chords = np.linspace(chord, chord * taper, 5)[:, None, None]
        return np.asarray(path[:, None] + chords * airfoil)

    body = lathe([(0, -1), (r * 0.6, -0.93), (r, -0.7), (r, 0.3), (r * 0.35, 1), (0, 1.02)], 18)
    pod = lathe([(0, -0.16), (0.07, -0.15), (0.06, 0.15), (0, 0.16)], 12)[..., [2, 0, 1]]
    fin = panel((0.85, 0, 0.05), 0.3, (0.18, 0, u(0.3, 0.45)))
    solids: list[Solid] = [(body[..., [2, 0, 1]], 0), (fin, 2)]
    chord, pods = u(0.28, 0.42), np.linspace(0.3, 0.6, rng.integers(0, 3))
    for side in (-1, 1):
        solids.append((panel((-0.15, 0, high), chord, (sweep, side * span, 0.06)), 1))
        solids.append((panel((0.85, 0, 0.05), 0.22, (sweep * 0.4, side * span * 0.38, 0.02)), 1))
        for at in pods:
            solids.append((np.add(pod, (sweep * at - 0.25, side * span * at, high - 0.06)), 2))
    return [(np.add(rings, (0, 0, 0.4)), slot) for rings, slot in solids]


def bottle(rng: Rng) -> list[Solid]:
    """Round or square, with or without label and cap."""
    u, r, h = rng.uniform, rng.uniform(0.22, 0.4), rng.uniform(0.75, 1.3)
    neck, length, power = r * u(0.25, 0.45), u(0.15, 0.45), rng.choice([2.0, 2.0, 2.0, 5.0])
    curve, drop = np.linspace(0, np.pi / 2, 6), u(0.1, 0.4)
    shoulder = [(neck + (r - neck) * np.cos(a), h + drop * np.sin(a)) for a in curve]
    top = h + drop + length
    lip = [(neck, top - 0.06), (neck * 1.25, top - 0.05), (neck * 1.25, top), (0, top)]
    solids: list[Solid] = [(lathe([(r * u(0.8, 1), 0), (r, 0.05), *shoulder, *lip], 28, power), 0)]
    if rng.random() < 0.6:
        low, high = h * u(0.1, 0.35), h * u(0.6, 0.95)
        solids.append((lathe([(r * 1.02, low), (r * 1.02, high)], 28, power), 1))
    if rng.random() < 0.6:
        solids.append((lathe([(neck * 1.35, top - 0.1), (neck * 1.3, top + 0.06)], 16), 2))
    return solids


def bowl(rng: Rng) -> list[Solid]:
    """Shallow to deep, round or square, with or without foot and band."""
    u, h, shape, thick = rng.uniform, rng.uniform(0.35, 0.75), rng.uniform(0.35, 0.8), 0.05
    t = np.linspace(0, 1, 9)
    out = np.stack([u(0.25, 0.5) + 0.6 * t**shape, h * t], 1)
    out[:, 0] *= 1 / out[-1, 0]
    inside = (out * (1 - thick, 1) + (0, thick))[::-1]
    inside[0, 1] = h
    foot = u(0, 0.12) * rng.integers(0, 2)
    profile = np.add(np.concatenate([out, inside, [(0, thick)]]), (0, foot))
    solids: list[Solid] = [(lathe(profile, 32, rng.choice([2.0, 2.0, 2.0, 4.0])), 0)]
    if foot:
        solids.append((lathe([(u(0.3, 0.5), 0), (0.35, foot + 0.03)], 24), 1))
    if rng.random() < 0.4:
        at = 6 + int(rng.integers(0, 2))
        band = out[at - 2 : at + 1] * (1.012, 1) + (0, foot)
        solids.append((lathe(band, 32), 2))
    return solids


def car(rng: Rng) -> list[Solid]:
    """A pickup, a saloon or an estate."""
    u, w, r = rng.uniform, rng.uniform(0.36, 0.48), rng.uniform(0.16, 0.24)
    deck, roof, nose = r + u(0.22, 0.34), u(0.24, 0.42), u(0.75, 1)
    lower = block((-1, -w, r * 0.7), (1, w, deck), (u(0.93, 1), 0.94))
    lower[..., 2] -= np.where(lower[..., 0] < -0.45, (1 - nose) * lower[..., 2], 0)  # the bonnet
    front, back = u(-0.5, -0.2), rng.choice([0.25, 0.6, 0.95])  # pickup, saloon, estate
    high, narrow = deck + roof, (u(0.6, 0.9), 0.8)
    cabin = block((front, -w * 0.92, deck - 0.03), (back, w * 0.92, high), narrow)
    top = block((front + 0.12, -w * 0.75, high - 0.02), (back - 0.1, w * 0.75, high + 0.04))
    solids: list[Solid] = [(lower, 0), (cabin, 1), (top, 0)]
    wheel = lathe([(r * 0.6, -0.07), (r, -0.07), (r, 0.07), (r * 0.6, 0.07)], 18)[..., [0, 2, 1]]
    hub = wheel * (0.5, 1.2, 0.5)
    for x in (-u(0.55, 0.68), u(0.55, 0.68)):
        for y in (-w, w):
            solids += [(np.add(part, (x, y, r)), slot) for part, slot in ((wheel, 2), (hub, 1))]
    return solids


def chair(rng: Rng) -> list[Solid]:
    """Four legs or an office star; a back of panel, slats or uprights."""
    u = rng.uniform
    w, d, seat = u(0.3, 0.42), u(0.3, 0.4), u(0.5, 0.75)
    high, lean, thick = u(0.45, 0.95), u(0, 0.15), u(0.025, 0.05)
    solids: list[Solid] = [(block((-w, -d, seat - u(0.05, 0.12)), (w, d, seat)), 0)]
    if rng.random() < 0.25:  # an office chair
        solids.append((tube([(0, 0, 0.08), (0, 0, seat)], 0.05), 1))
        for a in np.arange(5) * 2 * np.pi / 5 + u(0, 1):
            solids.append((tube([(0, 0, 0.1), (w * np.cos(a), w * np.sin(a), 0.03)], 0.035), 1))
    else:
        solids += legs(rng, w * 0.9, d * 0.9, seat - 0.03, thick)

    def rest(x: float, t: float) -> tuple[float, float, float]:  # a point of the leaning back
        return (x * w, d * 0.92 + lean * t, seat + high * t)

    style = rng.choice(["panel", "slats", "uprights"])
    if style == "panel":
        low = seat + high * u(0.05, 0.5)
        panel = block((-w, -0.03, low), (w, 0.03, seat + high))
        panel[..., 1] += d * 0.92 + lean * (panel[..., 2] - seat) / high
        solids.append((panel, 2))
    across = np.linspace(1, 0.35, rng.integers(2, 5)) if style == "slats" else [1]
    along = np.linspace(-0.9, 0.9, 2 if style != "uprights" else rng.integers(4, 7))
    solids += [(tube([rest(x, -0.05), rest(x, 1)], thick), 1) for x in along]
    solids += [(tube([rest(-0.9, t), rest(0.9, t)], 0.045), 2) for t in across]
    if rng.random() < 0.35:
        for x in (-w, w):
            arm = [(x, d * 0.92, seat + 0.25), (x, -d * 0.8, seat + 0.25), (x, -d * 0.8, seat)]
            solids.append((tube(arm, 0.035), 1))
    return solids


def house(rng: Rng) -> list[Solid]:
    """One or two floors under a gable or a hipped roof."""
    u, w, d, h = rng.uniform, rng.uniform(0.55, 0.9), rng.uniform(0.4, 0.65), rng.uniform(0.45, 1)
    eaves, ridge, hip = u(0.04, 0.14), u(0.3, 0.7), rng.choice([1, 1, 0.5])
    roof = block((-w - eaves, -d - eaves, h), (w + eaves, d + eaves, h + ridge), (hip, 0.02))
    solids: list[Solid] = [(block((-w, -d, 0), (w, d, h)), 0), (roof, 1)]
    door, floors = u(-0.7, 0.7) * w, 1 if h < 0.75 else 2
    solids.append((block((door - 0.09, -d - 0.02, 0), (door + 0.09, -d, 0.32)), 2))
    for z in 0.2 + 0.4 * np.arange(floors):
        for x in np.linspace(-w * 0.75, w * 0.75, rng.integers(2, 5)):
            if z > 0.3 or abs(x - door) > 0.2:
                solids.append((block((x - 0.08, -d - 0.02, z), (x + 0.08, -d, z + 0.17)), 2))
        for side in (-w - 0.02, w):
            solids.append((block((side, -0.1, z), (side + 0.02, 0.1, z + 0.17)), 2))
    if rng.random() < 0.7:
        x, y = u(-0.6, 0.6) * w * hip, u(0.1, 0.3) * d
        solids.append((block((x - 0.07, y - 0.07, h), (x + 0.07, y + 0.07, h + ridge * 1.15)), 2))
    return solids


def lamp(rng: Rng) -> list[Solid]:
    """A standing lamp, a globe or a desk lamp."""
    u = rng.uniform
    h, r, wide, base = u(0.7, 1.7), u(0.02, 0.05), u(0.28, 0.5), u(0.18, 0.32)
    foot = lathe([(base, 0), (base, 0.03), (base * u(0.3, 0.95), 0.07), (0, 0.08)])
    solids: list[Solid] = [(foot, 1)]
    tall, style = u(0.3, 0.6), rng.choice(["cone", "cone", "globe", "desk"])
    if style == "globe":
        globe = ball((0, 0, h + wide * 0.8), wide * 0.9)
        return [*solids, (tube([(0, 0, 0.05), (0, 0, h)], r), 1), (globe, 0)]
    top = wide * u(0.3, 0.95)
    shade = lathe([(wide, 0), (top, tall), (top * 0.93, tall), (wide * 0.93, 0)], 28)
    if style == "desk":  # a bent arm and a tilted head
        side, reach = rng.choice([-1, 1]), u(0.25, 0.5)
        elbow, end = (-side * reach * 0.6, 0, h * 0.55), (side * reach, 0, h)
        tilt = np.array([[0.8, 0, 0.6 * side], [0, 1, 0], [-0.6 * side, 0, 0.8]])
        head = (lathe([(wide * 0.8, -0.35), (wide * 0.3, 0), (0.05, 0.08), (0, 0.08)]) @ tilt) + end
        return [*solids, (tube([(0, 0, 0.05), elbow, end], r), 1), (head, 0)]
    if rng.random() < 0.4:  # a vase for a stem
        solids.append((ball((0, 0, h * 0.35), (base * 0.9, base * 0.9, h * 0.33)), 2))
    stem = tube([(0, 0, 0.05), (0, 0, h + 0.1)], r)
    return [*solids, (stem, 1), (np.add(shade, (0, 0, h - 0.15)), 0)]


def mug(rng: Rng) -> list[Solid]:
    """Straight, conical or bellied; a few have no handle."""
    u, h, foot, thick = rng.uniform, rng.uniform(0.9, 1.9), rng.uniform(0.6, 1), 0.07
    t, belly = np.linspace(0, 1, 7), u(-0.08, 0.2)
    out = np.stack([0.6 * (foot + (1 - foot) * t + belly * np.sin(np.pi * t)), h * t], 1)
    inside = (out - (thick, 0))[::-1]
    inside[-1, 1] = thick
    profile = np.concatenate([out, inside, [(0, thick)]])
    solids: list[Solid] = [(lathe(profile, 28, rng.choice([2.0, 2.0, 2.0, 4.0])), 0)]
    if rng.random() < 0.4:
        solids.append((lathe(out[2:5] * (1.02, 1)), 2))
    if rng.random() < 0.88:
        a = np.linspace(-1.45, 1.45, 9)
        size, power = u(0.25, 0.42) * h, u(0.5, 1)
        x = 0.52 + u(0.25, 0.5) * np.cos(a) ** power
        path = np.stack([x, 0 * a, h * u(0.48, 0.55) + size * np.sin(a)], 1)
        solids.append((tube(path, u(0.05, 0.09)), int(rng.integers(0, 2))))
    return turned(solids, rng.choice([0, 180]) + u(-30, 30))


def table(rng: Rng) -> list[Solid]:
    """Round or square, on four legs or a pedestal."""
    u, w, d, h = rng.uniform, rng.uniform(0.6, 1.1), rng.uniform(0.4, 0.65), rng.uniform(0.45, 0.95)
    thick, disc = u(0.03, 0.09), rng.random() < 0.4
    plate = block((-w, -d, 0), (w, d, thick))
    if disc:
        plate = lathe([(1, 0), (1, thick)], 32) * (w, d, 1)
    solids: list[Solid] = [(np.add(plate, (0, 0, h)), 0)]
    if rng.random() < (0.45 if disc else 0.1):
        solids.append((tube([(0, 0, 0.04), (0, 0, h)], [0.1, u(0.04, 0.1), 0.1]), 1))
        return [*solids, (lathe([(w * 0.5, 0), (w * 0.45, 0.05), (0.05, 0.08)]) * (1, d / w, 1), 1)]
    inset = 0.62 if disc else u(0.8, 0.95)
    solids += legs(rng, w * inset, d * inset, h + 0.01, u(0.03, 0.07))
    if not disc and rng.random() < 0.35:  # a drawer under the top
        solids.append((block((-w * 0.8, -d * 0.85, h - 0.15), (w * 0.8, d * 0.85, h)), 2))
    return turned(solids, u(-40, 40))


def tree(rng: Rng) -> list[Solid]:
    """A fir, a palm or a round crown."""
    u, h, r = rng.uniform, rng.uniform(0.5, 1.1), rng.uniform(0.05, 0.11)
    bend = np.array([u(-0.12, 0.12), u(-0.12, 0.12), h])
    trunk = tube([bend * 0, bend * (0.2, 0.2, 0.5), bend], [r * 1.4, r, r * 0.7])
    solids: list[Solid] = [(trunk, 1)]
    style, wide = rng.choice(["fir", "round", "round", "palm"]), u(0.4, 0.65)
    if style == "fir":
        levels = int(rng.integers(2, 6))
        for i in range(levels):
            size, z = wide * (1 - 0.65 * i / levels), h * 0.5 + i * u(0.26, 0.32)
            cone = lathe([(size, 0), (size * 0.55, 0.25), (0, 0.55)], 14)
            solids.append((np.add(cone, (0, 0, z)), 0))
    for a in np.linspace(0, 2 * np.pi, rng.integers(6, 10))[1:] if style == "palm" else []:
        t, out = np.linspace(0, 1, 6), np.array([np.cos(a + u(-0.2, 0.2)), np.sin(a), 0])
        leaf = bend + np.outer(t, out) * wide * 1.3
        leaf[:, 2] += 0.5 * t - u(0.7, 1.1) * t**2
        solids.append((tube(leaf, [0.04, 0.11, 0.09, 0.01], 6), 0))
    for _ in range(rng.integers(4, 11) if style == "round" else 0):
        at = bend + rng.normal(size=3) * wide * 0.42 + np.array([0, 0, wide * 0.5])
        solids += [(ball(at, u(0.5, 0.75, 3) * wide), 0), (tube([bend, at], r * 0.6), 1)]
    return solids


MAKERS: dict[str, Callable[[Rng], list[Solid]]] = {
    f.__name__: f for f in (airplane, bottle, bowl, car, chair, house, lamp, mug, table, tree)
}
