"""A model over HTTP: an OpenAI-compatible chat endpoint, likelihoods, and a page to talk on.

    starflow2 serve --model runs/digits --port 8000

POST /v1/chat/completions  OpenAI's chat completions: images as `data:` URLs in `image_url` parts,
                           in questions; in replies under `images`, and in order under `parts`.
                           Beyond OpenAI's fields: guidance, image_temperature, max_images, draw.
POST /v1/likelihood        exact log p of every image and of the assistant's text of `messages`
GET  /v1/models, /health, /

All requests share the rows of one engine, which one thread runs. A client that leaves ends its
request.
"""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import io
import json
import math
import pathlib
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from starflow2_jax.data.decoding import decode
from starflow2_jax.data.sequences import Part, Turn
from starflow2_jax.errors import UserError
from starflow2_jax.model import Sampling, Scores
from starflow2_jax.sampling.prompts import Row
from starflow2_jax.service import Answer, Service, goes_on

PAGE = pathlib.Path(__file__).with_name("page.html")
MODEL_NAME = "starflow2"
_FINISH = {"tokens": "length", "context": "length"}
_DISCONNECT_SECONDS = 0.5
_BROKEN = "the engine broke"


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Bounds of what clients may ask for.

    Attributes:
        waiting: requests that are answered or wait at a time; one more is refused (503).
        body_bytes: of a request; a longer one is refused (413).
        image_pixels: of a picture in a request, before it is scaled.
    """

    waiting: int = 64
    body_bytes: int = 16 * 2**20
    image_pixels: int = 2**25


class Busy(Exception):
    """No more requests are taken at the moment."""


class Broken(Exception):
    """The engine broke: nothing is answered any more."""


class TooLarge(Exception):
    """A body beyond the limit."""


class Worker:
    """The thread that runs the engine, and hands answers to those who wait for them."""

    def __init__(self, service: Service, waiting: int) -> None:
        self.service = service
        self._waiting = waiting
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closed = False
        self._failed = False
        self._routes: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Queue]] = {}
        self._reading = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def active(self) -> int:
        """Requests that are read, under way or waiting."""
        return self._reading + len(self._routes)

    @property
    def failed(self) -> bool:
        """Whether the engine broke: nothing is answered any more."""
        return self._failed

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._closed = True
        self._wake.set()
        self._thread.join(timeout=30)

    def check_room(self) -> None:
        """Raises Busy where a request would be one too many, and Broken where none is answered."""
        if self._failed:
            raise Broken
        if self.active >= self._waiting:
            raise Busy

    def _row(self, read: Callable[[], list[Turn]], draw: bool) -> tuple[Row, bool]:
        """The row, and whether it may reuse what is cached."""
        turns = read()
        if turns[-1].role != "user":
            raise UserError("the last message must be a user's")
        return self.service.row(turns, draw=draw), goes_on(turns)

    @contextlib.asynccontextmanager
    async def answers(
        self, read: Callable[[], list[Turn]], sampling: Sampling, draw: bool
    ) -> AsyncIterator[asyncio.Queue]:
        """A queue of the `Answer`s to a conversation; None in it: the engine broke.

        Leaving early ends the request.

        Args:
            read: gives the conversation; called in another thread, and only where there is room.
            sampling: how to reply.
            draw: the reply starts with an image.

        Raises:
            UserError: see `Service.ask`; or what `read` raises.
            Busy: too many requests.
            Broken: the engine broke.
        """
        queue: asyncio.Queue = asyncio.Queue()
        with self._lock:
            self.check_room()
            self._reading += 1  # pictures are decoded and encoded: no more at a time than answered
        try:
            row, reuse = await run_in_threadpool(self._row, read, draw)
            with self._lock:  # so that no answer comes before its queue is known
                if self._failed:
                    raise Broken
                number = self.service.submit(row, sampling, keep=True, reuse=reuse)
                self._routes[number] = (asyncio.get_running_loop(), queue)
        finally:
            with self._lock:
                self._reading -= 1
        self._wake.set()
        try:
            yield queue
        finally:
            with self._lock:
                unfinished = self._routes.pop(number, None) is not None
            if unfinished:
                self.service.cancel(number)
                self._wake.set()

    def _run(self) -> None:
        try:
            while not self._closed:
                self._wake.wait()
                self._wake.clear()
                while self.service.busy and not self._closed:
                    for answer in self.service.poll():
                        self._hand_on(answer)
        except Exception:
            traceback.print_exc()
            self._failed = True
            with self._lock:
                for loop, queue in self._routes.values():
                    loop.call_soon_threadsafe(queue.put_nowait, None)

    def _hand_on(self, answer: Answer) -> None:
        with self._lock:
            route = self._routes.get(answer.number)
            if answer.part is None:
                self._routes.pop(answer.number, None)
        if route is not None:
            loop, queue = route
            with contextlib.suppress(RuntimeError):  # the loop has ended with its server
                loop.call_soon_threadsafe(queue.put_nowait, answer)


def image_url(image: np.ndarray) -> dict[str, Any]:
    """An image uint8 [H, W, 1 or 3] as an OpenAI part."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def _pixels(service: Service, part: Mapping[str, Any], where: str, most: int) -> np.ndarray:
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, Mapping) else url
    if not isinstance(url, str) or not url.startswith("data:") or ";base64," not in url[:128]:
        raise UserError(
            f"{where}: an image is given as a URL data:image/png;base64,...; nothing is downloaded"
        )
    try:
        data = base64.b64decode(url.split(",", 1)[1], validate=True)
        with Image.open(io.BytesIO(data)) as picture:  # reads its header alone
            width, height = picture.size
        if width * height > most:
            raise ValueError(f"{width} x {height} pixels, at most {most} are taken")
        return decode(data, service.model.bundle.image)
    except Exception as error:  # Pillow's readers raise anything on damaged files
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: the image cannot be read ({reason})") from error


def read_messages(
    service: Service, messages: Any, most_pixels: int = ServerConfig.image_pixels
) -> list[Turn]:
    """OpenAI messages as turns; a system message is put before the next user's.

    Raises:
        UserError: not in that form, or an image that cannot be read.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError("messages is a list of {role, content}, with at least one")
    turns: list[Turn] = []
    system: list[Part] = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise UserError(f"{where} is no object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise UserError(f"{where}: role is {role!r}, expected system, user or assistant")
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(items, list):
            raise UserError(f"{where}: content is a text or a list of parts")
        parts: list[Part] = []
        for item in items:
            kind = item.get("type") if isinstance(item, Mapping) else None
            if kind == "text" and isinstance(item.get("text"), str):
                if item["text"]:
                    parts.append(item["text"])
            elif kind == "image_url":
                parts.append(_pixels(service, item, where, most_pixels))
            else:
                raise UserError(f"{where}: a part is of type text or image_url")
        if role == "system":
            system += parts
            continue
        if role == "user" and system:
            parts, system = [*system, *parts], []
        turns.append(Turn(role, tuple(parts)))
    if not turns:
        raise UserError("messages hold no user's")
    if system:
        raise UserError("a system message must stand before a user's")
    return turns


def _number(
    body: Mapping[str, Any], name: str, default: float, kind: type = float, below: int = 2**31
) -> Any:
    """A field's number; a whole one is under `below`, as what it is stored in holds no more."""
    value = body.get(name)
    if value is None:
        return default
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not abs(value) < math.inf
        or (kind is int and not whole)
    ):
        raise UserError(
            f"{name} is {value!r}, expected {'an integer' if kind is int else 'a number'}"
        )
    if (value >= below) if kind is int else (abs(value) >= np.finfo(np.float32).max.item()):
        raise UserError(f"{name} is {value!r}, which is too large")
    return kind(value)


def read_sampling(body: Mapping[str, Any], most_images: int) -> Sampling:
    """The sampling that a request asks for.

    Raises:
        UserError: a field of another kind, or out of range.
    """
    if _number(body, "n", 1, int) != 1:
        raise UserError("n is 1: ask several times, with several seeds")
    stop = body.get("stop") or ()
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple) or not all(isinstance(s, str) and s for s in stop):
        raise UserError("stop is a text or a list of texts")
    tokens = _number(body, "max_tokens", 64, int)
    seed = _number(body, "seed", 0, int, below=2**32)
    images = _number(body, "max_images", most_images, int)
    if images > most_images:
        raise UserError(f"max_images is {images}; this server draws at most {most_images} a reply")
    sampling = Sampling(
        guidance=_number(body, "guidance", 0.0),
        image_temperature=_number(body, "image_temperature", 1.0),
        temperature=_number(body, "temperature", 0.0),
        top_p=_number(body, "top_p", 1.0),
        max_new_tokens=_number(body, "max_completion_tokens", tokens, int),
        max_images=images,
        seed=seed,
        stop=tuple(stop),
    )
    sampling.check()
    return sampling


async def _body(request: Request, limit: int) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        TooLarge: more than `limit` bytes.
        UserError: no JSON object.
    """
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise TooLarge
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > limit:
            raise TooLarge
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body is not JSON ({error})") from error
    if not isinstance(body, dict):
        raise UserError("the body is no JSON object")
    return body


def _error(status: int, message: str, kind: str = "invalid_request_error") -> JSONResponse:
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse({"error": {"message": message, "type": kind}}, status, headers)


class Server:
    """The application's handlers."""

    def __init__(self, service: Service, config: ServerConfig) -> None:
        self.config = config
        self.service = service
        self.worker = Worker(service, config.waiting)
        self._count = 0
        self._scored = 0
        self._scoring = asyncio.Semaphore(1)

    def application(self) -> Starlette:
        """The ASGI application; its engine runs while it does."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self.worker.start()
            try:
                yield
            finally:
                self.worker.close()

        refused = f"the body is over the limit of {self.config.body_bytes} bytes"
        return Starlette(
            routes=[
                Route("/", self._page),
                Route("/health", self._health),
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
                Route("/v1/likelihood", self._likelihood, methods=["POST"]),
            ],
            exception_handlers={
                UserError: lambda _, error: _error(400, str(error)),
                TooLarge: lambda *_: _error(413, refused),
                Busy: lambda *_: _error(503, "too many requests; try again", "overloaded"),
                Broken: lambda *_: _error(500, _BROKEN, "server_error"),
            },
            lifespan=lifespan,
        )

    async def _page(self, _: Request) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    async def _health(self, _: Request) -> Response:
        status = 500 if self.worker.failed else 200
        return JSONResponse({"ok": not self.worker.failed, "active": self.worker.active}, status)

    async def _models(self, _: Request) -> Response:
        entry = {"id": MODEL_NAME, "object": "model", "owned_by": "local"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def _likelihood(self, request: Request) -> Response:
        body = await _body(request, self.config.body_bytes)
        if self._scored >= self.config.waiting:
            raise Busy
        self._scored += 1
        try:
            async with self._scoring:  # one at a time: each takes all cores
                scores = await run_in_threadpool(self._score, body.get("messages"))
        finally:
            self._scored -= 1
        images = [
            {"nats": float(nats), "bits_per_dim": float(bits)}
            for nats, bits in zip(scores.images, scores.bits_per_dim, strict=True)
        ]
        text = {"nats": float(scores.text.sum()), "tokens": len(scores.text)}
        return JSONResponse({"images": images, "text": text})

    def _turns(self, messages: Any) -> list[Turn]:
        return read_messages(self.service, messages, self.config.image_pixels)

    def _score(self, messages: Any) -> Scores:
        turns, model = self._turns(messages), self.service.model
        length, most = len(model.encode(turns).tokens), self.service.engine.config.context
        if length > most:
            raise UserError(f"the conversation has {length} positions, at most {most} are scored")
        [scores] = model.log_prob([turns])
        return scores

    async def _complete(self, request: Request) -> Response:
        body = await _body(request, self.config.body_bytes)
        sampling = read_sampling(body, self.service.engine.config.images)
        self._count += 1
        about = {
            "id": f"chatcmpl-{self._count}",
            "created": int(time.time()),
            "model": MODEL_NAME,
        }
        read = functools.partial(self._turns, body.get("messages"))
        asked = self.worker.answers(read, sampling, bool(body.get("draw")))
        if not body.get("stream"):
            async with asked as queue:
                return await self._whole(request, queue, about)
        # Entered here, so that a bad request is refused before the stream starts.
        stack = contextlib.AsyncExitStack()
        queue = await stack.enter_async_context(asked)
        events = self._events(stack, queue, about)
        return StreamingResponse(events, media_type="text/event-stream")

    async def _whole(
        self, request: Request, queue: asyncio.Queue, about: dict[str, Any]
    ) -> Response:
        parts: list[dict[str, Any]] = []
        while True:
            try:
                answer = await asyncio.wait_for(queue.get(), _DISCONNECT_SECONDS)
            except TimeoutError:
                if await request.is_disconnected():
                    return Response(status_code=499)
                continue
            if answer is None:
                return _error(500, _BROKEN, "server_error")
            if answer.part is None:
                break
            if isinstance(answer.part, str):
                if parts and parts[-1]["type"] == "text":
                    parts[-1]["text"] += answer.part
                else:
                    parts.append({"type": "text", "text": answer.part})
            else:
                parts.append(image_url(answer.part))
        message: dict[str, Any] = {
            "role": "assistant",
            "content": " ".join(p["text"] for p in parts if p["type"] == "text"),
            "images": [p for p in parts if p["type"] == "image_url"],
            "parts": parts,
        }
        reason = _FINISH.get(answer.reason, "stop")
        choice = {"index": 0, "message": message, "finish_reason": reason}
        return JSONResponse({**about, "object": "chat.completion", "choices": [choice]})

    async def _events(
        self, stack: contextlib.AsyncExitStack, queue: asyncio.Queue, about: dict[str, Any]
    ) -> AsyncIterator[str]:
        """Server-sent events; a client that leaves closes this, and so ends its request."""

        def event(delta: dict[str, Any], reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            chunk = {**about, "object": "chat.completion.chunk", "choices": [choice]}
            return f"data: {json.dumps(chunk)}\n\n"

        async with stack:
            yield event({"role": "assistant", "content": ""})
            while (answer := await queue.get()) is not None and answer.part is not None:
                if isinstance(answer.part, str):
                    yield event({"content": answer.part})
                else:
                    yield event({"images": [image_url(answer.part)]})
            if answer is None:
                yield f"data: {json.dumps({'error': {'message': _BROKEN}})}\n\n"
            else:
                yield event({}, _FINISH.get(answer.reason, "stop"))
            yield "data: [DONE]\n\n"


def make_application(service: Service, config: ServerConfig = ServerConfig()) -> Starlette:
    """The ASGI application that serves a model; see the module."""
    return Server(service, config).application()
