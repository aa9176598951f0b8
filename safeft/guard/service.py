"""A guard as a small HTTP service: requests share batches, bodies and queues have limits.

Requests and answers have the form of OpenAI's moderation end point, so that clients of that work
unchanged. No text is logged. Bodies are read and checked by hand, not by a schema: what a client
did wrong is said in one sentence.
"""

import asyncio
import json
import logging
import math
import time
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safeft.errors import ConfigError, SafeftError
from safeft.guard.guards import Score, Scorer

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

logger = logging.getLogger(__name__)

_TIMES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


@dataclass(frozen=True)
class Limits:
    """What a service takes on.

    Attributes:
        body: Bytes of a request.
        texts: Texts of a request.
        characters: Of one text.
        waiting: Texts that wait; above it requests are turned away (503).
        batch: Texts a pass.
        gather: Seconds to wait for more texts to share a pass with.
        receive: Seconds for a request's body to arrive.
    """

    body: int = 1 << 20
    texts: int = 64
    characters: int = 100_000
    waiting: int = 1024
    batch: int = 32
    gather: float = 0.005
    receive: float = 10.0

    def __post_init__(self) -> None:
        """Refuse limits under which no request could be served."""
        for name, value in vars(self).items():
            if value <= 0 and name != "gather":
                raise ConfigError(f"{name}={value}: with this limit nothing could be served.")
        if self.waiting < self.texts:
            raise ConfigError(
                f"waiting={self.waiting} is below texts={self.texts}: a full request would always "
                "be turned away. Raise `waiting`."
            )


class Refused(Exception):
    """A request that is not served, with status and sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


@dataclass
class Meter:
    """Counts since the start."""

    answered: Counter[int] = field(default_factory=Counter)
    texts: int = 0
    flagged: int = 0
    passes: int = 0
    seconds: Counter[float] = field(default_factory=Counter)
    total_seconds: float = 0.0

    def took(self, seconds: float) -> None:
        """Count one request's time."""
        self.total_seconds += seconds
        self.seconds[next((t for t in _TIMES if seconds <= t), math.inf)] += 1

    def text(self, waiting: int) -> str:
        """As Prometheus reads it."""
        rows = ["# TYPE safeft_guard_requests_total counter"]
        rows += [
            f'safeft_guard_requests_total{{status="{status}"}} {count}'
            for status, count in sorted(self.answered.items())
        ]
        for name, value in (("texts", self.texts), ("flagged", self.flagged),
                            ("passes", self.passes)):  # fmt: skip
            rows += [f"# TYPE safeft_guard_{name}_total counter"]
            rows += [f"safeft_guard_{name}_total {value}"]
        rows += ["# TYPE safeft_guard_waiting gauge", f"safeft_guard_waiting {waiting}"]
        rows += ["# TYPE safeft_guard_seconds histogram"]
        below = 0
        for most in (*_TIMES, math.inf):
            below += self.seconds[most]
            edge = "+Inf" if most == math.inf else most
            rows.append(f'safeft_guard_seconds_bucket{{le="{edge}"}} {below}')
        rows += [f"safeft_guard_seconds_sum {self.total_seconds:.6f}"]
        rows += [f"safeft_guard_seconds_count {below}"]
        return "\n".join(rows) + "\n"


class Batcher:
    """Texts of all requests in one queue; one thread runs the model on as many as fit a pass."""

    def __init__(self, guard: Scorer, limits: Limits, meter: Meter) -> None:
        self._guard, self._limits, self._meter = guard, limits, meter
        self._queue: deque[tuple[str, asyncio.Future[Score]]] = deque()
        self._more = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "guard")
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def waiting(self) -> int:
        """Texts in the queue."""
        return len(self._queue)

    @property
    def running(self) -> bool:
        """Whether texts are taken on."""
        return self._task is not None and not self._task.done() and not self._closing

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Take on no more, and finish what was taken on."""
        self._closing = True
        self._more.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    async def score(self, texts: list[str]) -> list[Score]:
        """One score a text.

        Raises:
            Refused: The queue is full, or the service is ending.
        """
        if not self.running:
            raise Refused(503, "The service is shutting down; ask another one.")
        if len(self._queue) + len(texts) > self._limits.waiting:
            raise Refused(503, f"{len(self._queue)} texts are waiting; try again in a second.")
        loop = asyncio.get_running_loop()
        mine = [loop.create_future() for _ in texts]
        self._queue.extend(zip(texts, mine, strict=True))
        self._more.set()
        try:
            return list(await asyncio.gather(*mine))
        finally:
            for future in mine:  # of a client that went away: its texts are passed over
                future.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue or not self._closing:
            if not self._queue:
                self._more.clear()
                await self._more.wait()
                continue
            if len(self._queue) < self._limits.batch and not self._closing:
                await asyncio.sleep(self._limits.gather)
            taken = self._taken()
            if not taken:
                continue
            self._meter.passes += 1
            texts = [text for text, _ in taken]
            found = await loop.run_in_executor(self._thread, self._pass, texts)
            for (_, future), score in zip(taken, found, strict=True):
                if future.done():
                    continue
                if isinstance(score, Exception):
                    future.set_exception(score)
                else:
                    future.set_result(score)

    def _taken(self) -> list[tuple[str, asyncio.Future[Score]]]:
        """The next texts for a pass, without those whose client went away."""
        taken: list[tuple[str, asyncio.Future[Score]]] = []
        while self._queue and len(taken) < self._limits.batch:
            text, future = self._queue.popleft()
            if not future.done():
                taken.append((text, future))
        return taken

    def _pass(self, texts: list[str]) -> list[Score | Exception]:
        """A score a text; where a pass fails, each text alone, so that one harms no other."""
        try:
            return [*self._guard.score(texts, batch_size=self._limits.batch)]
        except Exception as error:  # Whatever it is, those who wait must be told.
            if len(texts) == 1:
                return [error]
            return [self._pass([text])[0] for text in texts]


def create_app(
    guard: Scorer, *, name: str = "safeft-guard", threshold: float = 0.5,
    limits: Limits | None = None,
) -> "FastAPI":  # fmt: skip
    """The service: ``POST /v1/moderations``, ``GET /health``, ``GET /metrics``.

    Args:
        guard: A guard, or an ensemble.
        name: What answers call the model.
        threshold: A text is flagged from this score on, and so is each of its categories.
        limits: What is taken on.

    Raises:
        ConfigError: FastAPI is not installed.

    Example:
        >>> uvicorn.run(create_app(guard), port=8000)  # doctest: +SKIP
    """
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse, PlainTextResponse
        from starlette.requests import ClientDisconnect
    except ImportError as error:
        raise ConfigError(
            "The service needs FastAPI, which is not installed. Run: pip install 'safeft[serve]'."
        ) from error
    limits, meter = limits or Limits(), Meter()
    batcher = Batcher(guard, limits, meter)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    async def moderations(request: Request) -> JSONResponse:
        started = time.perf_counter()
        headers: dict[str, str] = {}
        try:
            texts = texts_of(await received(request, limits), limits)
            scores = await batcher.score(texts)
            status, body = 200, answer_of(scores, name, threshold)
            meter.texts += len(scores)
            meter.flagged += sum(score.harmful >= threshold for score in scores)
        except Refused as refused:
            status, body = refused.status, _error(refused.sentence)
            headers = {"retry-after": "1"} if status == 503 else {}
        except ClientDisconnect:
            status, body = 499, _error("The client went away.")
        except SafeftError as error:
            # Its sentence may quote a text, and goes to the client alone.
            status, body = 400, _error(str(error))
        except Exception as error:
            logger.error("a pass failed: %s", type(error).__name__)
            status, body = (
                500,
                _error("The guard failed on this request; its operator can see why."),
            )
        meter.answered[status] += 1
        meter.took(time.perf_counter() - started)
        return JSONResponse(body, status, headers)

    async def health() -> JSONResponse:
        ready = batcher.running
        body = {"status": "ok" if ready else "ending", "model": name, "waiting": batcher.waiting}
        return JSONResponse(body, 200 if ready else 503)

    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(meter.text(batcher.waiting))

    # Annotations are those of this function's imports, which FastAPI could not look up by name.
    moderations.__annotations__ = {"request": Request}
    app.add_api_route("/v1/moderations", moderations, methods=["POST"], response_model=None)
    app.add_api_route("/health", health, response_model=None)
    app.add_api_route("/metrics", metrics, response_model=None)
    return app


async def received(request: "Request", limits: Limits) -> bytes:
    """A request's body, as far as it is let in.

    Raises:
        Refused: Too large (413), or too slow (408).
    """
    too_large = Refused(413, f"The body is above {limits.body} bytes; send fewer texts at once.")
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > limits.body:
        raise too_large
    parts, size = [], 0

    async def read() -> None:
        nonlocal size
        async for part in request.stream():
            size += len(part)
            if size > limits.body:
                raise too_large
            parts.append(part)

    try:
        await asyncio.wait_for(read(), limits.receive)
    except TimeoutError as error:
        raise Refused(408, f"The body did not arrive within {limits.receive:g} s.") from error
    return b"".join(parts)


def texts_of(body: bytes, limits: Limits) -> list[str]:
    """The texts of a request ``{"input": "..." or ["...", ...]}``.

    Raises:
        Refused: Not UTF-8, not JSON, not of this form, or above a limit.
    """
    try:
        found = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Refused(400, "The body is not UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise Refused(400, "The body is not JSON.") from error
    given = found.get("input") if isinstance(found, dict) else None
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise Refused(400, 'The body has no texts: give {"input": "a text"} or a list of texts.')
    if len(texts) > limits.texts:
        raise Refused(413, f"{len(texts)} texts are above the {limits.texts} of one request.")
    for number, text in enumerate(texts):
        if not text.strip():
            raise Refused(400, f"Text {number} is empty.")
        if len(text) > limits.characters:
            raise Refused(413, f"Text {number} is above {limits.characters} characters.")
        with suppress(UnicodeEncodeError):
            text.encode()
            continue
        raise Refused(400, f"Text {number} holds half a character (a lone surrogate).")
    return texts


def answer_of(scores: list[Score], name: str, threshold: float) -> dict[str, Any]:
    """Scores in the form of OpenAI's moderation end point."""
    rows = []
    for score in scores:
        found = {"harmful": score.harmful, **score.labels}
        rows.append(
            {
                "flagged": score.harmful >= threshold,
                "categories": {label: value >= threshold for label, value in found.items()},
                "category_scores": found,
            }
        )
    return {"id": f"modr-{uuid.uuid4().hex}", "model": name, "results": rows}


def _error(sentence: str) -> dict[str, Any]:
    return {"error": {"message": sentence, "type": "invalid_request_error"}}


def run_app(app: "FastAPI", host: str, port: int) -> None:
    """Listen until interrupted; what was taken on is then finished.

    Raises:
        ConfigError: uvicorn is not installed, or the address is taken.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ConfigError(
            "The service needs uvicorn, which is not installed. Run: pip install 'safeft[serve]'."
        ) from error
    # Without access log: a line a request says nothing that the metrics do not.
    config = uvicorn.Config(
        app, host=host, port=port, access_log=False, log_level="warning", limit_concurrency=2048,
        timeout_keep_alive=5, timeout_graceful_shutdown=30,
    )  # fmt: skip
    try:
        listening = config.bind_socket()
    except SystemExit as error:
        raise ConfigError(f"{host}:{port} cannot be listened on. Is the port taken?") from error
    logger.warning("listening on http://%s:%d", *listening.getsockname()[:2])
    with suppress(KeyboardInterrupt):  # uvicorn passes it on once all is finished
        uvicorn.Server(config).run(sockets=[listening])
