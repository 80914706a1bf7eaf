"""What receives requests: checks them, decodes them, asks for the key, and counts."""

# No `from __future__ import annotations`: FastAPI reads those of `received`.
import asyncio
import hmac
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import HTTPException, Request
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from lora_lightning.deploy.adapter_folder import AdapterFolder
from lora_lightning.deploy.intake import Intake, Job, Refused, asked, body_of

log = logging.getLogger(__name__)
PATH = "/predict"
KEY, BATCH = b"x-api-key", b"x-batch"  # headers
DECODING = 2  # bodies that are decoded at a time


class Desk:
    """Receives requests.

    Args:
        intake: How bodies are read.
        folder: Of the adapters.
        most: Bytes of a body.
    """

    def __init__(self, intake: Intake, folder: AdapterFolder, most: int):
        self.intake, self.folder, self.most = intake, folder, most
        self._threads = ThreadPoolExecutor(DECODING)

    async def job(self, request: Any) -> Job:
        """What a request asks for.

        Raises:
            HTTPException: it cannot be answered.
        """
        told = request.headers
        try:
            wanted = asked(
                request.query_params.multi_items(), self.folder.files(), self.intake.classes
            )
            body = await body_of(
                request.stream(),
                self.most,
                told.get("content-type", ""),
                told.get("content-length", ""),
            )
            here = asyncio.get_running_loop()
            return Job(wanted, await here.run_in_executor(self._threads, self._read, body))
        except Refused as error:
            raise HTTPException(error.status, str(error)) from None
        except ClientDisconnect:
            raise HTTPException(400, "the connection ended within the body") from None

    def _read(self, body: bytes) -> NDArray[Any]:
        try:
            return self.intake.read(body)
        except Refused:
            raise
        except Exception as error:  # whatever a decoder raises for bytes that are none of its kind
            log.warning("a body cannot be decoded: %r", error)
            raise Refused(422, "the body cannot be decoded") from error


async def received(request: Request) -> Job:
    """The request, checked and decoded."""
    job: Job = await request.app.state.desk.job(request)
    return job


class Metrics:
    """Counts for Prometheus.

    Args:
        folder: Of the adapters.
    """

    def __init__(self, folder: AdapterFolder):
        self.registry = CollectorRegistry()
        own: Any = {"namespace": "lora_lightning", "registry": self.registry}
        self.running = Gauge("requests_in_progress", "requests not yet answered", **own)
        self._answered = Counter("requests", "requests answered", ["status"], **own)
        self._seconds = Histogram("request_seconds", "until a request is answered", **own)
        sizes = (1, 2, 4, 8, 16, 32, 64, 128)
        self._batch = Histogram("batch", "requests in an answer's batch", buckets=sizes, **own)
        adapters = Gauge("adapters", "adapter files in the folder", **own)
        adapters.set_function(lambda: len(folder.files()))

    def count(self, head: dict[str, Any], seconds: float) -> None:
        """Count a request.

        Args:
            head: Of its response, as ASGI has it.
            seconds: That it took.
        """
        self._answered.labels(head.get("status", 499)).inc()
        self._seconds.observe(seconds)
        for name, value in head.get("headers", ()):
            if name == BATCH:
                self._batch.observe(int(value))

    def page(self) -> Response:
        """All of them, as text."""
        return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4")


_NO_KEY = JSONResponse({"detail": "give the server's key in the header X-API-Key"}, 401)


class Gate:
    """Middleware that asks for the key, where there is one, and counts.

    Args:
        app: What is behind it.
        metrics: Where it counts.
        key: That each request but one for ``/health`` must have.
    """

    def __init__(self, app: Any, metrics: Metrics, key: str | None):
        self.app, self.metrics = app, metrics
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle a request."""
        app = self.app if self._may(scope) else _NO_KEY
        if scope["type"] == "lifespan" or scope["path"] != PATH:
            await app(scope, receive, send)
            return
        head: dict[str, Any] = {}

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                head.update(message)
            await send(message)

        start = time.perf_counter()
        with self.metrics.running.track_inprogress():
            try:
                await app(scope, receive, sent)
            finally:
                self.metrics.count(head, time.perf_counter() - start)

    def _may(self, scope: Any) -> bool:
        if self._key is None or scope["type"] == "lifespan" or scope["path"] == "/health":
            return True
        return hmac.compare_digest(dict(scope["headers"]).get(KEY, b""), self._key)
