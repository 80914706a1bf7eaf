"""Objects under a light: panda3d's software renderer, and the lights that make the domains.

Light is computed here, at the vertices, in linear units; panda3d only rasterises. The
picture is kept at full exposure until the sensor step, so that a dim scene loses its
detail to noise, as in a camera, and not to eight-bit arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_lightning.data.meshes import Floats, Material, Part, Rng
from lora_lightning.errors import ConfigError, MissingDependencyError

Bytes = NDArray[np.uint8]
GAMMA = 2.2
CREASE = 0.8  # cosine of the angle between faces above which a surface looks smooth
REACH = 1.3  # half the width of the shadow map; objects lie within a unit ball
_CORNER = [("vertex", "<f4", 3), ("colour", "u1", 4), ("uv", "<f4", 2)]
_UP, _FRONT = np.eye(3, dtype=np.float32)[2], -np.eye(3, dtype=np.float32)[1]
_QUIET = "notify-level error\naudio-library-name null"


@dataclass(frozen=True)
class Lighting:
    """A light and the sensor that sees by it; angles in degrees, as the viewer sees them.

    Azimuth 0 shines from the viewer, -90 from the left; elevation 90 from above.
    The lamp stands `distance` away (an object's half diagonal is 1), never below the
    ground; what is nearer to it is brighter. `ambient` is the share of the light that
    comes from everywhere, in its own colour. `noise` is the sensor's standard deviation
    against a fully lit white; `exposure` multiplies what it caught, noise included.
    """

    azimuth: float = 0.0
    elevation: float = 40.0
    intensity: float = 1.25
    ambient: float = 0.45
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0)
    ambient_colour: tuple[float, float, float] = (1.0, 1.0, 1.0)
    distance: float = 8.0
    exposure: float = 1.0
    noise: float = 0.001
    vignette: float = 0.1

    def jittered(self, rng: Rng) -> Lighting:
        """Return a light near this one: no two pictures of a domain are lit alike."""
        tint = np.array(self.colour) * np.exp(rng.normal(0, 0.04, 3))
        return replace(
            self,
            azimuth=self.azimuth + rng.uniform(-14, 14),
            elevation=self.elevation + rng.uniform(-6, 6),
            intensity=self.intensity * float(np.exp(rng.normal(0, 0.12))),
            colour=tuple(tint.tolist()),
        )

    def lamp(self, centre: Floats) -> Floats:
        """Return where the lamp stands, for an object around `centre`."""
        place = centre + self.distance * self.direction
        place[2] = max(place[2], 0.05)
        return np.asarray(place, np.float32)

    @property
    def direction(self) -> Floats:
        """The unit vector towards the light."""
        a, e = np.radians([self.azimuth, self.elevation])
        toward = [np.sin(a) * np.cos(e), -np.cos(a) * np.cos(e), np.sin(e)]
        return np.array(toward, np.float32)


LIGHTINGS: dict[str, Lighting] = {
    "source": Lighting(),
    "dim-1": Lighting(intensity=0.18, noise=0.003),
    "dim-2": Lighting(intensity=0.1, noise=0.004),
    "dim-3": Lighting(intensity=0.06, noise=0.0045),
    "low-1": Lighting(25, 5, ambient=0.15, distance=2.5, intensity=1, noise=0.002),
    "low-2": Lighting(35, -8, ambient=0.05, distance=1.6, intensity=0.6, noise=0.004),
    "low-3": Lighting(45, -15, ambient=0.015, distance=1.15, intensity=0.4, noise=0.006),
    "side-1": Lighting(-70, 25, ambient=0.15, distance=4, intensity=1, noise=0.002),
    "side-2": Lighting(-100, 18, ambient=0.04, distance=2.5, intensity=0.6, noise=0.003),
    "side-3": Lighting(-125, 12, ambient=0.015, distance=2, intensity=0.6, noise=0.005),
    "coloured-1": Lighting(colour=(1, 0.45, 0.2), ambient_colour=(0.8, 0.4, 0.4), noise=0.002),
    "coloured-2": Lighting(
        40, intensity=0.5, colour=(1, 0.12, 0.2), ambient_colour=(0.1, 0.15, 1), noise=0.0035
    ),
    "coloured-3": Lighting(
        60, intensity=0.42, colour=(1, 0, 0.08), ambient_colour=(0, 0.05, 1), noise=0.004
    ),
}


@dataclass(frozen=True)
class Camera:
    """Where the viewer stands; the object spans `fill` of the picture."""

    azimuth: float = 20.0
    elevation: float = 20.0
    fov: float = 35.0
    fill: float = 0.7
    shift: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def random(cls, rng: Rng) -> Camera:
        """Draw a modest change of view."""
        u = rng.uniform
        shift = (u(-0.08, 0.08), u(-0.08, 0.08))
        return cls(u(-35, 35), u(10, 35), u(25, 45), u(0.6, 0.82), shift)

    @property
    def axes(self) -> Floats:
        """The viewer's right, forward and up, as rows; the object is turned, not the viewer."""
        c, s = np.cos(np.radians(self.elevation)), np.sin(np.radians(self.elevation))
        return np.array([[1, 0, 0], [0, c, -s], [0, s, c]], np.float32)

    def place(self, points: Floats) -> Floats:
        """Return where the viewer stands so that the points fill the picture."""
        target, distance, half = points.mean(0), 5.0, np.tan(np.radians(self.fov / 2))
        for _ in range(4):
            seen = (points - target) @ self.axes.T
            flat = seen[:, [0, 2]] / (distance + seen[:, [1]]) / half  # -1 to 1 in the picture
            low, high = flat.min(0), flat.max(0)
            target = target + ((low + high) / 2 - self.shift) * distance * half @ self.axes[[0, 2]]
            distance *= float((high - low).max()) / (2 * self.fill)
        return np.asarray(target - distance * self.axes[1], np.float32)


def pattern(kind: str, size: int, rng: Rng) -> Floats:
    """Return a tile of values from 0 to 1 that repeats without a seam."""
    x, y = np.meshgrid(np.arange(size) / size, np.arange(size) / size)
    if kind == "plain":
        return np.zeros((size, size))
    if kind == "checks":
        n = int(rng.integers(2, 5))
        return np.asarray((np.floor(x * 2 * n) + np.floor(y * 2 * n)) % 2)
    slope = {"noise": 1.3, "foliage": 0.8, "blobs": 2.5, "stripes": 2.0, "speckles": 0.4}[kind]
    rows, columns = np.fft.fftfreq(size)[:, None] * size, np.fft.rfftfreq(size) * size
    spectrum = np.fft.rfft2(rng.normal(size=(size, size)))
    field = np.fft.irfft2(spectrum / np.maximum(np.hypot(rows, columns), 1) ** slope, (size, size))
    field = (field - field.mean()) / field.std()
    if kind == "stripes":  # the grain of a plank
        return np.asarray(0.5 + 0.5 * np.sin(2 * np.pi * rng.integers(3, 8) * x + 0.8 * field))
    if kind == "speckles":
        return np.asarray(field > 1.2, dtype=float)
    return np.asarray(np.clip(0.5 + field * 0.3, 0, 1))


def _tile(kind: str, first: Floats, second: Floats, rng: Rng) -> Floats:
    tile = first + (second - first) * pattern(kind, 64, rng)[..., None]
    return np.asarray(tile, np.float32)


@dataclass(frozen=True, eq=False)
class Background:
    """Two textured planes: the ground, up to `depth` behind the object, and a wall or sky."""

    ground: Floats
    wall: Floats
    depth: float
    scale: float
    fade: float

    @classmethod
    def random(cls, rng: Rng) -> Background:
        """Draw a room, an open ground under a sky, or a mere backdrop."""
        kinds = ("noise", "blobs", "foliage", "stripes", "checks", "plain", "speckles")
        tiles = []
        for _ in range(2):  # of related colours: real grounds are rarely of two hues
            base = rng.uniform(0.35, 1) * (1 - rng.uniform(0, 0.5) * rng.uniform(0, 1, 3))
            other = np.clip(base * rng.uniform(0.6, 1.3) + rng.normal(0, 0.05, 3), 0.05, 1)
            tiles.append(_tile(str(rng.choice(kinds)), base, other, rng))
        depth = float(rng.choice([rng.uniform(0.9, 3), 60, -60], p=[0.55, 0.25, 0.2]))
        return cls(tiles[0], tiles[1], depth, rng.uniform(0.15, 0.5), rng.uniform(-0.25, 0.25))

    def look(self, eye: Floats, rays: Floats) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """Return colours, places and which pixels are ground; rays are (h, w, 3)."""
        down = np.minimum(rays[..., 2], -1e-6)
        ground = (rays[..., 2] < 0) & (eye[1] - eye[2] / down * rays[..., 1] < self.depth)
        to_wall = (max(abs(self.depth), 1.2) - eye[1]) / np.maximum(rays[..., 1], 0.1)
        along = np.where(ground, -eye[2] / down, to_wall)
        place = eye + along[..., None] * rays
        u, v = (
            place[..., 0] * self.scale,
            np.where(ground, place[..., 1], place[..., 2]) * self.scale,
        )
        if abs(self.depth) > 10:  # far away: a sky keeps its pattern's size in the picture
            far = ~ground
            u, v = np.where(far, rays[..., 0], u), np.where(far, rays[..., 2], v)
        row, column = (np.floor(v * 64).astype(int) % 64, np.floor(u * 64).astype(int) % 64)
        colour = np.where(ground[..., None], self.ground[row, column], self.wall[row, column])
        slope = 1 + self.fade * (rays[..., 2:] - rays[..., 2:].mean()) * 2
        return np.clip(colour * slope, 0, 1), place, ground


def _corners(parts: Sequence[Part]) -> tuple[Floats, Floats, Floats]:
    """Return the corners of all faces (n, 3, 3), their normals, and the faces' own normals.

    A corner takes the mean normal of the faces that meet there, but for an edge.
    """
    counts = [0, *np.cumsum([len(part.mesh.vertices) for part in parts])]
    vertices = np.concatenate([np.asarray(part.mesh.vertices, np.float32) for part in parts])
    pairs = list(zip(parts, counts[:-1], strict=True))
    faces = np.concatenate([np.asarray(part.mesh.faces) + start for part, start in pairs])
    smooth = np.repeat([p.material.smooth for p in parts], [len(p.mesh.faces) for p in parts])
    corners = vertices[faces]
    flat = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    spread, index = np.repeat(flat, 3, 0), faces.ravel()
    total: Floats = np.stack([np.bincount(index, axis, len(vertices)) for axis in spread.T], 1)
    flat, mean = _unit(flat), _unit(total.astype(np.float32))[faces]
    curved = (_dot(mean, flat[:, None]) > CREASE) & smooth[:, None]
    return corners, np.where(curved[..., None], mean, flat[:, None]), flat


def _unit(vectors: Floats) -> Floats:
    length = np.sqrt(_dot(vectors, vectors))
    return np.asarray(vectors / np.maximum(length, 1e-12)[:, None])


def _dot(a: Floats, b: Floats) -> Floats:
    return np.asarray(np.einsum("...i,...i->...", a, b))  # several times as fast as a sum


class _ShadowMap:
    """How near to the light the object reaches, seen from the light."""

    def __init__(self, lighting: Lighting, centre: Floats):
        light = lighting.lamp(centre) - centre
        light /= np.linalg.norm(light)
        right = np.cross((0, 0, 1), light)
        right /= np.linalg.norm(right)
        axes = np.stack([right, light, np.cross(light, right)])
        self.axes, self.centre = axes.astype(np.float32), centre.astype(np.float32)
        self.lamp = lighting.lamp(self.centre)
        self.depth: Floats = np.zeros((1, 1))

    def project(self, points: Floats) -> Floats:
        return np.asarray((points - self.centre) @ self.axes.T / REACH)

    def lit(self, points: Floats) -> Floats:
        """Return which share of the light reaches the points, softened at the edges."""
        seen, n = self.project(points), self.depth.shape[0]
        inside = np.maximum(np.abs(seen[..., 0]), np.abs(seen[..., 2])) < 0.95
        column, row = ((seen[..., i].clip(-0.95, 0.95) + 1) * n / 2 for i in (0, 2))
        lit = np.zeros(seen.shape[:-1])
        for dx, dy in ((0, 0), (-1.2, 0), (1.2, 0), (0, -1.2), (0, 1.2)):
            found = self.depth[(row + dy).astype(int), (column + dx).astype(int)]
            lit += found < seen[..., 1] + 0.04
        return np.where(inside, lit / 5, 1.0)


class Renderer:
    """Draws square pictures of `size` pixels without a window; any number may coexist.

    Raises:
        ConfigError: the size is too small.
        MissingDependencyError: the extra `demo` is not installed.
    """

    def __init__(self, size: int, supersample: int = 2):
        if size < 16:
            raise ConfigError(f"size must be at least 16 pixels, got {size}")
        try:
            from panda3d import core
        except ImportError as error:
            raise MissingDependencyError(
                'rendered objects need panda3d: pip install "lora-lightning[demo]"'
            ) from error
        core.loadPrcFileData("", _QUIET)
        self.size, self.supersample, self._core = size, supersample, core
        selection = core.GraphicsPipeSelection.getGlobalPtr()
        self._pipe = selection.makePipe("TinyOffscreenGraphicsPipe", "p3tinydisplay")
        self._engine = core.GraphicsEngine()
        self._eye = self._view(size * supersample, core.PerspectiveLens())
        self._light = self._view(96, core.OrthographicLens())
        self._light[2].setFilmSize(2, 2)

    def _view(self, pixels: int, lens: Any) -> tuple[Any, Any, Any]:
        """Make an off-screen picture; its camera stands at the origin and looks along y."""
        core = self._core
        lens.setNearFar(0.02, 50)
        shape = core.FrameBufferProperties()
        shape.setRgbaBits(8, 8, 8, 8)
        shape.setDepthBits(24)
        window, refuse = (
            core.WindowProperties.size(pixels, pixels),
            core.GraphicsPipe.BFRefuseWindow,
        )
        buffer = self._engine.makeOutput(self._pipe, "view", 0, shape, window, refuse)
        picture, root = core.Texture(), core.NodePath("root")
        buffer.addRenderTexture(picture, core.GraphicsOutput.RTMCopyRam)
        buffer.setClearColor((0, 0, 0, 0))
        buffer.setActive(False)
        buffer.makeDisplayRegion().setCamera(root.attachNewNode(core.Camera("eye", lens)))
        root.setTwoSided(True)
        return (buffer, picture), root, lens

    def _shoot(self, view: tuple[Any, Any, Any], pieces: Sequence[tuple[Any, Any]]) -> Bytes:
        """Rasterise (corners, texture) pieces; return RGBA, the top row first."""
        core, ((buffer, picture), root, _) = self._core, view
        nodes = []
        for corners, texture in pieces:
            data = core.GeomVertexData(
                "part", core.GeomVertexFormat.getV3c4t2(), core.Geom.UHStatic
            )
            data.uncleanSetNumRows(len(corners))
            memoryview(data.modifyArray(0)).cast("B")[:] = corners.tobytes()
            triangles = core.GeomTriangles(core.Geom.UHStatic)
            triangles.addConsecutiveVertices(0, len(corners))
            geometry, node = core.Geom(data), core.GeomNode("part")
            geometry.addPrimitive(triangles)
            node.addGeom(geometry)
            nodes.append(root.attachNewNode(node))
            # By default panda3d draws in the order of addresses: faces in one plane would flicker.
            nodes[-1].setBin("fixed", len(nodes))
            if texture is not None:
                nodes[-1].setTexture(texture)
        buffer.setActive(True)
        self._engine.renderFrame()
        buffer.setActive(False)
        for node in nodes:
            node.removeNode()
        side = picture.getXSize()
        raw = np.frombuffer(picture.getRamImageAs("RGBA"), np.uint8)
        return raw.reshape(side, side, 4)[::-1]

    def _texture(self, material: Material, rng: Rng) -> Any:
        core = self._core
        tile = _tile(material.pattern, material.colour, material.accent, rng)
        texture = core.Texture()
        texture.setup2dTexture(64, 64, core.Texture.TUnsignedByte, core.Texture.FRgb)
        texture.setRamImage((tile[..., ::-1] * 255).astype(np.uint8).tobytes())
        return texture

    def render(
        self,
        parts: Sequence[Part],
        camera: Camera,
        lighting: Lighting,
        background: Background,
        rng: Rng,
    ) -> Bytes:
        """Return a (size, size, 3) picture; `rng` draws the textures and the sensor's noise."""
        corners, normals, flat = _corners(parts)
        a = np.radians(camera.azimuth)
        turn = np.array([[np.cos(a), np.sin(a), 0], [-np.sin(a), np.cos(a), 0], [0, 0, 1]], "f4")
        turned, normals = corners.reshape(-1, 3) @ turn, normals.reshape(-1, 3) @ turn
        shadow = self._shadow(turned, lighting)
        light = _light(turned, normals, shadow, lighting)
        shades = np.clip(light, 0, 1) ** (1 / GAMMA)
        eye = camera.place(turned[::3])
        uv = _flat_texture(corners, flat)
        pieces = self._pieces(parts, (turned - eye) @ camera.axes.T, uv, shades, rng)
        self._eye[2].setFov(camera.fov)
        n = self.supersample
        fine = self._shoot(self._eye, pieces).astype(np.float32)
        drawn = np.zeros((self.size, self.size, 4), np.float32)
        for i, j in np.ndindex(n, n):
            drawn += fine[i::n, j::n] / (255 * n * n)
        behind = self._behind(background, camera, eye, shadow, lighting)
        return _sense(drawn[..., :3] + behind * (1 - drawn[..., 3:]), lighting, rng)

    def _shadow(self, points: Floats, lighting: Lighting) -> _ShadowMap:
        """Draw the object as the light sees it, its grey telling how near each place is."""
        shadow = _ShadowMap(lighting, (points.min(0) + points.max(0)) / 2)
        seen = shadow.project(points)
        corners = np.zeros(len(points), _CORNER)
        corners["vertex"] = seen * (1, -1, 1) + (0, 3, 0)
        corners["colour"] = (127.5 * (seen[:, [1, 1, 1, 1]] + 1)).clip(0, 255)
        drawn = self._shoot(self._light, [(corners, None)])[::-1]
        shadow.depth = np.where(drawn[..., 3] > 127, drawn[..., 0] / 127.5 - 1, -np.inf)
        return shadow

    def _pieces(
        self, parts: Sequence[Part], seen: Floats, uv: Floats, shades: Floats, rng: Rng
    ) -> list[tuple[Any, Any]]:
        """Return textured corners as the viewer sees them, one piece for each material."""
        corners = np.zeros(len(seen), _CORNER)
        corners["vertex"], corners["uv"], corners["colour"] = seen, uv, 255
        corners["colour"][:, :3] = np.round(255 * shades)
        counts = [3 * len(part.mesh.faces) for part in parts]
        owner = np.repeat([id(part.material) for part in parts], counts)
        pieces = []
        for material in {id(part.material): part.material for part in parts}.values():
            own = corners[owner == id(material)]
            own["uv"] *= material.scale
            pieces.append((own, self._texture(material, rng)))
        return pieces

    def _behind(
        self,
        background: Background,
        camera: Camera,
        eye: Floats,
        shadow: _ShadowMap,
        lighting: Lighting,
    ) -> Floats:
        """Return the lit background, with the object's shadow on ground and wall."""
        at = (np.arange(self.size, dtype=np.float32) + 0.5) / self.size * 2 - 1
        x, y = np.meshgrid(at, -at)
        half = np.tan(np.radians(camera.fov / 2))
        flat = np.stack([x * half, np.ones_like(x), y * half], -1)
        colour, place, ground = background.look(eye, (flat @ camera.axes).astype(np.float32))
        normals = np.where(ground[..., None], _UP, _FRONT)
        light = _light(place, normals, shadow, lighting)
        return np.asarray(colour * np.clip(light, 0, 1) ** (1 / GAMMA))


def _flat_texture(corners: Floats, flat: Floats) -> Floats:
    """Lay textures on from the front, the side or the top, whichever a face looks to most."""
    planes = np.array([(1, 2), (0, 2), (0, 1)])[np.abs(flat).argmax(1)]
    return np.take_along_axis(corners, planes[:, None], 2).reshape(-1, 2)


def _light(points: Floats, normals: Floats, shadow: _ShadowMap, lighting: Lighting) -> Floats:
    """Return the light at each point: from everywhere, more of it from above, and the lamp's."""
    way = shadow.lamp - points
    far = np.sqrt(_dot(way, way)) + 0.1  # a lamp is no point: nothing is infinitely bright
    middle = np.linalg.norm(shadow.lamp - shadow.centre) + 0.1
    facing = (_dot(normals, way) / far).clip(0) * (middle / far) ** 2
    facing *= shadow.lit(points + 0.03 * normals) * (1 - lighting.ambient)
    around = lighting.ambient * (0.7 + 0.3 * normals[..., 2])
    key, fill = (np.array(c, np.float32) for c in (lighting.colour, lighting.ambient_colour))
    return np.asarray(facing[..., None] * key + around[..., None] * fill)


def _sense(picture: Floats, lighting: Lighting, rng: Rng) -> Bytes:
    """Return what the sensor makes of a fully exposed picture under the given light."""
    at = np.linspace(-1, 1, len(picture))
    corner = 1 - lighting.vignette * (at[:, None] ** 2 + at**2)
    light = (corner[..., None] * lighting.intensity).astype(np.float32)
    linear = picture.astype(np.float32) ** GAMMA * light
    grain = lighting.noise * np.sqrt(1 + 10 * linear)  # of the electronics and of the light
    noise = rng.standard_normal(picture.shape, np.float32)
    caught = lighting.exposure * (linear + grain * noise)
    return np.asarray(np.round(255 * np.clip(caught, 0, 1) ** (1 / GAMMA)), dtype=np.uint8)
