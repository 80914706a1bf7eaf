"""From a request to what a model is given; a request that cannot be answered is refused in words.

Plain functions, without a server. No text of a request is used as a path: the name of an adapter
is looked up among those that the folder listed, and a body is decoded in memory.
"""

from __future__ import annotations

import io
from collections.abc import AsyncIterable, Container, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from numpy.typing import NDArray
from PIL import UnidentifiedImageError

from lora_lightning.errors import DataError
from lora_lightning.registry import unknown
from lora_lightning.report.metrics import si

if TYPE_CHECKING:
    from lora_lightning.vision.data.pictures import Preparation

# Others of Pillow's run programs (EPS), or are of no use in a photograph.
PICTURES = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
MOST_PIXELS = 50_000_000
LEAST_SECONDS = 0.1


class Refused(Exception):  # an answer
    """A request that gets a status and a sentence in place of an answer."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


class Asked(NamedTuple):
    """What a request's query asks for: an adapter (None: the source), and how many classes."""

    adapter: str | None = None
    top: int = 1


class Job(NamedTuple):
    """A request that can be answered: what it asks for, and its picture or recording."""

    asked: Asked
    item: NDArray[Any]

    def __repr__(self) -> str:  # what somebody sent is in no log
        return f"{type(self).__name__}({self.asked})"


class Intake(Protocol):
    """How the body of a request is read."""

    @property
    def classes(self) -> int | None:
        """How many classes can be asked for; None: it answers with a text."""

    def read(self, body: bytes) -> NDArray[Any]:
        """The item that a body holds.

        Raises:
            Refused: it cannot be read, or is too large.
        """


@dataclass(frozen=True)
class PictureIntake:
    """Reads pictures.

    Args:
        prepared: How they are prepared.
        classes: Of the classifier.
    """

    prepared: Preparation
    classes: int | None

    def read(self, body: bytes) -> NDArray[Any]:
        """The picture (3, side, side) that a body holds, uint8."""
        try:
            found = self.prepared.read(io.BytesIO(body), formats=PICTURES, most_pixels=MOST_PIXELS)
        except DataError as error:
            if isinstance(error.__cause__, UnidentifiedImageError):
                kinds = ", ".join(PICTURES[:-1])
                raise Refused(422, f"the body is no {kinds} or {PICTURES[-1]} picture") from error
            raise Refused(422, f"picture refused: {error}") from error
        pixels: NDArray[Any] = found.numpy()
        return pixels


@dataclass(frozen=True)
class RecordingIntake:
    """Reads recordings, of any format that libsndfile knows.

    Not those that FFmpeg alone reads: among its formats are lists of other files, which it opens.

    Args:
        sample_rate: To which they are resampled, in Hz.
        most_seconds: A longer one is refused.
    """

    sample_rate: int
    most_seconds: float
    classes: int | None = None

    def read(self, body: bytes) -> NDArray[Any]:
        """The recording (T,) that a body holds, float32."""
        from lora_lightning.speech.data.audio import read_audio

        try:
            found = read_audio(io.BytesIO(body), self.sample_rate, LEAST_SECONDS, self.most_seconds)
        except DataError as error:
            raise Refused(422, f"recording refused: {error}") from error
        samples: NDArray[Any] = found.numpy()
        return samples


def asked(
    query: Iterable[tuple[str, str]], adapters: Container[str], classes: int | None = None
) -> Asked:
    """What a query asks for.

    Args:
        query: Its keys and values.
        adapters: The names that there are.
        classes: Of the classifier; None: of a recogniser.

    Raises:
        Refused: an unknown key or adapter, a key twice, or not so many classes.
    """
    known = ("adapter",) if classes is None else ("adapter", "top")
    given: dict[str, str] = {}
    for key, value in query:
        if key not in known:
            raise Refused(422, unknown("parameter", key[:100], known))
        if key in given:
            raise Refused(422, f"the parameter {key} is given twice")
        given[key] = value
    name = given.get("adapter")
    if name is not None and name not in adapters:
        raise no_adapter(name)
    return Asked(name, _top(given.get("top", "1"), classes or 1))


def no_adapter(name: str) -> Refused:
    """The refusal of a name; others are not told, as they may be people's."""
    return Refused(404, f"there is no adapter {name[:100]!r}")


def _top(text: str, most: int) -> int:
    number = int(text) if text.isdecimal() and len(text) < 10 else 0
    if not 1 <= number <= most:
        raise Refused(422, f"top must be a whole number from 1 to {most}, got {text[:20]!r}")
    return number


async def body_of(
    chunks: AsyncIterable[bytes], most: int, content_type: str = "", length: str = ""
) -> bytes:
    """The body of a request, which is read no further than it may be long.

    Args:
        chunks: Its parts.
        most: How many bytes it may have.
        content_type: As the request's head has it.
        length: As its head has it, "" where it says none.

    Raises:
        Refused: it is empty, too large, or a form.
    """
    if content_type.startswith("multipart/"):
        raise Refused(
            415, "the body must be the file itself (curl --data-binary @FILE), not a form"
        )
    too_large = Refused(413, f"the body is too large: at most {si(most, 'B')} are accepted")
    if length.isdecimal() and len(length) < 20 and int(length) > most:
        raise too_large
    found = bytearray()
    async for chunk in chunks:
        found += chunk
        if len(found) > most:
            raise too_large
    if not found:
        raise Refused(422, "the body is empty: it must be the file (curl --data-binary @FILE)")
    return bytes(found)
