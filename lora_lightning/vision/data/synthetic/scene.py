"""Rendering of lit objects; panda3d's software renderer does the rasterisation only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_lightning.errors import MissingDependencyError
from lora_lightning.lora.values import check_count
from lora_lightning.vision.data.synthetic.backgrounds import TILE, Background, tile
from lora_lightning.vision.data.synthetic.lighting import (
    GAMMA,
    Lighting,
    ShadowMap,
    illuminate,
    sense,
)
from lora_lightning.vision.data.synthetic.meshes import Material, Part, face_corners, flat_texture
from lora_lightning.vision.data.synthetic.solids import Floats, Rng

Bytes = NDArray[np.uint8]
_CORNER = [("vertex", "<f4", 3), ("colour", "u1", 4), ("uv", "<f4", 2)]
_UP, _FRONT = np.eye(3, dtype=np.float32)[2], -np.eye(3, dtype=np.float32)[1]
FOG = 0.85  # its grey
_QUIET = "notify-level error\naudio-library-name null"


@dataclass(frozen=True)
class Camera:
    """The viewer's position; the object spans `fill` of the image."""

    azimuth: float = 20.0
    elevation: float = 20.0
    fov: float = 35.0
    fill: float = 0.7
    shift: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def random(
        cls,
        rng: Rng,
        azimuth: tuple[float, float] = (-35, 35),
        elevation: tuple[float, float] = (10, 35),
    ) -> Camera:
        """Draw a view within these ranges; by default a modest change around the front."""
        u = rng.uniform
        shift = (u(-0.08, 0.08), u(-0.08, 0.08))
        return cls(u(*azimuth), u(*elevation), u(25, 45), u(0.6, 0.82), shift)

    @property
    def axes(self) -> Floats:
        """The viewer's right, forward and up, as rows; the object is turned, not the viewer."""
        c, s = np.cos(np.radians(self.elevation)), np.sin(np.radians(self.elevation))
        return np.array([[1, 0, 0], [0, c, -s], [0, s, c]], np.float32)

    def place(self, points: Floats) -> Floats:
        """Return the viewer's position from which the points fill the image."""
        target, distance, half = points.mean(0), 5.0, np.tan(np.radians(self.fov / 2))
        for _ in range(4):
            seen = (points - target) @ self.axes.T
            flat = seen[:, [0, 2]] / (distance + seen[:, [1]]) / half  # -1 to 1 in the image
            low, high = flat.min(0), flat.max(0)
            target = target + ((low + high) / 2 - self.shift) * distance * half @ self.axes[[0, 2]]
            distance *= float((high - low).max()) / (2 * self.fill)
        return np.asarray(target - distance * self.axes[1], np.float32)


class Renderer:
    """Off-screen renderer of square images of `size` pixels; any number may coexist.

    Raises:
        ConfigError: the size is too small.
        MissingDependencyError: the extra `demo` is not installed.
    """

    def __init__(self, size: int, supersample: int = 2):
        check_count("size", size, 16, unit="pixels")
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
        """Make an off-screen buffer; its camera is at the origin and looks along y."""
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
        pixels = tile(material.pattern, material.colour, material.accent, rng)
        texture = core.Texture()
        texture.setup2dTexture(TILE, TILE, core.Texture.TUnsignedByte, core.Texture.FRgb)
        texture.setRamImage((pixels[..., ::-1] * 255).astype(np.uint8).tobytes())
        return texture

    def render(
        self,
        parts: Sequence[Part],
        camera: Camera,
        lighting: Lighting,
        background: Background,
        rng: Rng,
        fog: float = 0.0,
        cover: Floats | None = None,
    ) -> Bytes:
        """Return a (size, size, 3) image; `rng` draws the textures and the sensor's noise.

        At the object's distance exp(-fog) of the contrast remains, behind it less. `cover`
        (size, size, 4), with opacity, is in front of everything.
        """
        corners, normals, flat = face_corners(parts)
        a = np.radians(camera.azimuth)
        turn = np.array([[np.cos(a), np.sin(a), 0], [-np.sin(a), np.cos(a), 0], [0, 0, 1]], "f4")
        turned, normals = corners.reshape(-1, 3) @ turn, normals.reshape(-1, 3) @ turn
        shadow = self._shadow(turned, lighting)
        light = illuminate(turned, normals, shadow, lighting)
        shades = np.clip(light, 0, 1) ** (1 / GAMMA)
        eye = camera.place(turned[::3])
        uv = flat_texture(corners, flat)
        pieces = self._pieces(parts, (turned - eye) @ camera.axes.T, uv, shades, rng)
        self._eye[2].setFov(camera.fov)
        n = self.supersample
        fine = self._shoot(self._eye, pieces).astype(np.float32)
        drawn = np.zeros((self.size, self.size, 4), np.float32)
        for i, j in np.ndindex(n, n):
            drawn += fine[i::n, j::n] / (255 * n * n)
        behind, far = self._behind(background, camera, eye, shadow, lighting)
        if fog:
            near = float(np.linalg.norm(eye - turned[::3].mean(0)))
            drawn[..., :3] = _fogged(drawn[..., :3], drawn[..., 3:], fog)
            behind = _fogged(behind, 1, fog * np.maximum(far / near, 1)[..., None])
        picture = drawn[..., :3] + behind * (1 - drawn[..., 3:])
        if cover is not None:
            picture = picture * (1 - cover[..., 3:]) + cover[..., :3] * cover[..., 3:]
        return sense(picture, lighting, rng)

    def _shadow(self, points: Floats, lighting: Lighting) -> ShadowMap:
        """Render the object as seen from the light, with its depth as grey value."""
        shadow = ShadowMap(lighting, (points.min(0) + points.max(0)) / 2)
        seen = shadow.project(points)
        corners = np.zeros(len(points), _CORNER)
        corners["vertex"] = seen * (1, -1, 1) + (0, 3, 0)
        corners["colour"] = (127.5 * (seen[:, [1, 1, 1, 1]] + 1)).clip(0, 255)
        corners["colour"][:, 3] = 255  # alpha marks the object
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
        shadow: ShadowMap,
        lighting: Lighting,
    ) -> tuple[Floats, Floats]:
        """Return the lit background, with the object's shadow, and the distance of each point."""
        at = (np.arange(self.size, dtype=np.float32) + 0.5) / self.size * 2 - 1
        x, y = np.meshgrid(at, -at)
        half = np.tan(np.radians(camera.fov / 2))
        flat = np.stack([x * half, np.ones_like(x), y * half], -1)
        colour, place, ground = background.look(eye, (flat @ camera.axes).astype(np.float32))
        normals = np.where(ground[..., None], _UP, _FRONT)
        light = illuminate(place, normals, shadow, lighting)
        lit = np.asarray(colour * np.clip(light, 0, 1) ** (1 / GAMMA))
        return lit, np.linalg.norm(place - eye, axis=-1)


def _fogged(colour: Floats, opacity: Any, fog: Any) -> Floats:
    """Colours, already weighted by their opacity, behind this much fog."""
    clear = np.exp(-fog)
    return np.asarray(colour * clear + FOG * opacity * (1 - clear))
