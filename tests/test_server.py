"""`starflow2 serve`: chat completions, likelihoods, bad clients, many clients, and the page."""

import asyncio
import base64
import concurrent.futures
import http.client
import io
import json
import os
import resource
import shutil
import socket
import threading
import time

import numpy as np
import pytest
import tiny
import uvicorn
from PIL import Image

from starflow2_jax.data import digits
from starflow2_jax.data.sequences import Turn
from starflow2_jax.errors import UserError
from starflow2_jax.model import Model, Sampling
from starflow2_jax.sampling.engine import EngineConfig
from starflow2_jax.server import Broken, Busy, ServerConfig, Worker, image_url, make_application
from starflow2_jax.service import Service

IMAGE = np.random.default_rng(0).integers(0, 256, (4, 4, 1), dtype=np.uint8)
BODY_LIMIT, WAITING = 2**16, 40


class Address:
    """A served tiny model."""

    def __init__(self, service, port):
        self.service = service
        self.port = port

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def ask(self, path, body=None):
        connection = self.connect()
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", path, data)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, content

    def chat(self, *parts, **options):
        body = {"messages": [{"role": "user", "content": [*parts]}], "max_tokens": 6, **options}
        status, content = self.ask("/v1/chat/completions", body)
        return status, json.loads(content)

    def active(self):
        return json.loads(self.ask("/health")[1])["active"]

    def idle(self):
        for _ in range(200):
            if not self.active() and not self.service.busy:
                return True
            time.sleep(0.1)
        return False


@pytest.fixture(scope="module")
def server():
    service = Service(Model(tiny.bundle(IMAGE[None])), EngineConfig(rows=4, context=512, images=2))
    service.engine.warm_up()
    application = make_application(service, ServerConfig(WAITING, BODY_LIMIT))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    config = uvicorn.Config(
        application, port=port, log_level="warning", timeout_graceful_shutdown=2
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.05)
    yield Address(service, port)
    running.should_exit = True
    thread.join(timeout=60)
    assert not thread.is_alive()


def text(words):
    return {"type": "text", "text": words}


def pixels(part):
    data = base64.b64decode(part["image_url"]["url"].split(",")[1])
    return np.asarray(Image.open(io.BytesIO(data)))


def test_a_reply_is_the_services_own(server):
    options = {"guidance": 1.5, "seed": 3, "max_images": 1}
    status, reply = server.chat(text("a handwritten three"), draw=True, **options)
    assert status == 200 and reply["object"] == "chat.completion"
    [choice] = reply["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "stop" and len(message["images"]) == 1
    assert pixels(message["images"][0]).shape == (4, 4)
    reused = server.service.engine.reused
    again = server.chat(text("a handwritten three"), draw=True, **options)[1]
    assert again["choices"] == reply["choices"] and server.service.engine.reused == reused
    other = server.chat(text("a handwritten three"), draw=True, **options | {"seed": 4})[1]
    assert other["choices"] != reply["choices"]
    # Read back what was drawn.
    said = [
        {"role": "user", "content": "a handwritten three"},
        {"role": "assistant", "content": message["parts"]},
        {"role": "user", "content": [image_url(IMAGE), text("which digit is this?")]},
    ]
    status, content = server.ask("/v1/chat/completions", {"messages": said, "max_tokens": 4})
    assert status == 200, content
    assert server.service.engine.reused > reused
    status, content = server.ask("/v1/likelihood", {"messages": said})
    found = json.loads(content)
    turns = [
        Turn("user", ("a handwritten three",)),
        Turn("assistant", (pixels(message["images"][0])[..., None],)),
        Turn("user", (IMAGE, "which digit is this?")),
    ]
    [scores] = server.service.model.log_prob([turns])
    nats = [image["nats"] for image in found["images"]]
    np.testing.assert_allclose(nats, scores.images, rtol=1e-5)


def test_a_stream_is_the_same_reply_in_pieces(server):
    options = {"guidance": 1.0, "seed": 5, "max_images": 2, "temperature": 1.0}
    whole = server.chat(text("count up from three"), draw=True, **options)[1]
    message = whole["choices"][0]["message"]
    body = {"messages": [{"role": "user", "content": "count up from three"}], "max_tokens": 6}
    status, content = server.ask(
        "/v1/chat/completions", {**body, **options, "draw": True, "stream": True}
    )
    events = [e.removeprefix("data: ") for e in content.decode().strip().split("\n\n")]
    assert status == 200 and events[-1] == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    images = [image for choice in choices for image in choice["delta"].get("images", ())]
    assert images == message["images"] and images
    pieces = "".join(choice["delta"].get("content", "") for choice in choices)
    assert pieces == "".join(part.get("text", "") for part in message["parts"])


def test_a_stop_string_is_no_part_of_the_reply(server):
    options = {"max_images": 0, "temperature": 1.0, "max_tokens": 24}
    for seed in range(20):  # until it writes two letters that are text, behind others
        options["seed"] = seed
        whole = server.chat(text("a handwritten three"), **options)[1]
        content = whole["choices"][0]["message"]["content"]
        pairs = [content[i : i + 2] for i in range(2, len(content) - 1)]
        stop = next((pair for pair in pairs if pair.isascii() and pair.isalnum()), None)
        if stop:
            break
    assert stop and stop in content
    reply = server.chat(text("a handwritten three"), **options, stop=["never", stop])[1]
    [choice] = reply["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == content.split(stop)[0].strip(" ")
    body = {"messages": [{"role": "user", "content": "a handwritten three"}], **options}
    body |= {"stop": stop, "stream": True}
    events = server.ask("/v1/chat/completions", body)[1].decode().strip().split("\n\n")[:-1]
    deltas = [json.loads(e.removeprefix("data: "))["choices"][0]["delta"] for e in events]
    pieces = "".join(delta.get("content", "") for delta in deltas)
    assert pieces == choice["message"]["content"]


BROKEN = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
LAST = {"role": "user", "content": "a"}
FAR = {"type": "image_url", "image_url": {"url": "http://example.com/cat.png"}}


def picture_of(width, height):
    """A small file of many pixels."""
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize(
    "body, status, message",
    [
        (b"{", 400, "not JSON"),
        (b"[" * 30000, 400, "not JSON"),
        (b"[1]", 400, "no JSON object"),
        ({}, 400, "messages is a list"),
        ({"messages": [1]}, 400, "messages[0] is no object"),
        ({"messages": [{"role": "tool", "content": ""}]}, 400, "role is 'tool'"),
        ({"messages": [{"role": "user", "content": [BROKEN]}]}, 400, "cannot be read"),
        ({"messages": [{"role": "user", "content": [FAR]}]}, 400, "nothing is downloaded"),
        ({"messages": [{"role": "user", "content": [picture_of(7000, 7000)]}]}, 400, "at most"),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, 400, "special token"),
        ({"messages": [{"role": "user", "content": "a \ud800"}]}, 400, "character 2"),
        ({"messages": [{"role": "assistant", "content": "no"}]}, 400, "must be a user's"),
        ({"messages": [{"role": "user", "content": "a " * 900}]}, 400, ""),
        ({"messages": [LAST, {"role": "system", "content": "b"}]}, 400, "before a user's"),
        ({"messages": [{"role": "user", "content": "a"}], "seed": -1}, 400, "seed is -1"),
        ({"messages": [{"role": "user", "content": "a"}], "top_p": 7}, 400, "top_p"),
        ({"messages": [{"role": "user", "content": "a"}], "guidance": "x"}, 400, "guidance is 'x'"),
        ({"messages": [{"role": "user", "content": "a"}], "max_images": 9}, 400, "at most 2"),
        ({"messages": [LAST], "temperature": 1e39}, 400, "temperature is 1e+39"),
        ({"messages": [LAST], "guidance": 10**400}, 400, "guidance is 1000"),
        ({"messages": [LAST], "guidance": -(10**400)}, 400, "guidance is -1000"),
        ({"messages": [LAST], "image_temperature": float("inf")}, 400, "image_temperature is inf"),
        ({"messages": [LAST], "temperature": -1}, 400, "temperature is -1.0"),
        ({"messages": [LAST], "max_tokens": 10**10}, 400, "max_tokens is 10000000000"),
        ({"messages": [LAST], "seed": 2**32}, 400, "seed is 4294967296"),
        ({"messages": [LAST], "stop": "\ud800"}, 400, "stop string"),
        (b" " * (BODY_LIMIT + 1), 413, "over the limit"),
    ],
)
def test_bad_bodies_are_refused(server, body, status, message):
    found, content = server.ask("/v1/chat/completions", body)
    assert found == status, content
    assert message in json.loads(content)["error"]["message"]
    assert server.active() == 0 and server.ask("/v1/models")[0] == 200


def test_an_engine_that_broke_is_not_a_busy_one(capsys):
    class Failing:
        busy = True

        def poll(self):
            raise RuntimeError("no memory")

    worker = Worker(Failing(), waiting=1)
    worker.check_room()
    worker.start()
    worker._wake.set()
    worker._thread.join(timeout=30)
    assert worker.failed and "no memory" in capsys.readouterr().err
    with pytest.raises(Broken):
        worker.check_room()


def test_no_more_pictures_are_read_at_a_time_than_requests_are_answered():
    class Engineless:
        def row(self, turns, draw):
            return turns

        def submit(self, row, sampling, **options):
            return 0

        def cancel(self, number):
            pass

    worker = Worker(Engineless(), waiting=1)
    begun, go_on, read = threading.Event(), threading.Event(), []

    def slow():
        read.append("slow")
        begun.set()
        assert go_on.wait(30)
        return [Turn("user", ("a",))]

    def never():
        read.append("never")

    def broken():
        raise UserError("no picture")

    async def ask(read):
        async with worker.answers(read, Sampling(), False):
            return worker.active

    async def all_of_them():
        first = asyncio.create_task(ask(slow))
        await asyncio.to_thread(begun.wait, 30)
        assert worker.active == 1
        with pytest.raises(Busy):
            await ask(never)
        go_on.set()
        assert await first == 1 and worker.active == 0
        for _ in range(2):  # who fails gives the place back
            with pytest.raises(UserError, match="no picture"):
                await ask(broken)
        assert await ask(slow) == 1 and worker.active == 0

    asyncio.run(all_of_them())
    assert read == ["slow", "slow"]


def test_what_is_scored_is_bounded(server):
    long = {"messages": [{"role": "user", "content": "a " * 900}]}
    status, content = server.ask("/v1/likelihood", long)
    assert status == 400 and "at most 512 are scored" in json.loads(content)["error"]["message"]


def test_clients_that_vanish_end_their_requests(server):
    before = threading.active_count()
    for stream in (True, False):
        body = {
            "messages": [{"role": "user", "content": "a handwritten three"}],
            "draw": True,
            "stream": stream,
            "max_images": 2,
            "max_tokens": 100,
        }
        for _ in range(8):
            connection = server.connect()
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            if stream:
                connection.getresponse().read(10)
            connection.close()
    with socket.create_connection(("127.0.0.1", server.port)) as half:
        half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 900\r\n\r\n{")
    assert server.idle()
    assert server.chat(text("a handwritten two"))[0] == 200
    assert threading.active_count() <= before + 8


def _memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_32_clients_at_once(server):
    """For STARFLOW2_LOAD_SECONDS, 8 by default."""
    seconds = float(os.environ.get("STARFLOW2_LOAD_SECONDS", "8"))

    def client(number, until):
        answered = 0
        while time.monotonic() < until:
            status, reply = server.chat(
                text(f"a handwritten {digits.NUMBERS[number % 10]}"),
                draw=number % 2 == 0,
                seed=number,
                guidance=float(number % 3),
                max_images=1,
            )
            assert status == 200, reply
            answered += 1
        return answered

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        [*pool.map(lambda n: client(n, 0.1 + time.monotonic()), range(32))]
        held = _memory()
        until = time.monotonic() + seconds
        answered = [*pool.map(lambda n: client(n, until), range(32))]
    assert min(answered) >= 1
    assert server.idle() and _memory() - held < 100 * 2**20
    print(f"{sum(answered)} replies in {seconds} s, {(_memory() - held) / 2**20:.1f} MB more")


def test_one_request_too_many_is_refused(server):
    def ask(number):
        return server.chat(text("a handwritten one"), draw=True, max_images=2, max_tokens=90)[0]

    with concurrent.futures.ThreadPoolExecutor(3 * WAITING) as pool:
        statuses = [*pool.map(ask, range(3 * WAITING))]
    assert set(statuses) == {200, 503} and server.idle()


def test_the_page_in_chromium(server, tmp_path):
    driver = shutil.which("chromedriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert driver and chromium, "needs Chromium: apt-get install chromium chromium-driver"
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(word)
    options.binary_location = chromium
    service = webdriver.ChromeService(driver)
    browser = webdriver.Chrome(options, service)
    try:
        browser.get(f"http://127.0.0.1:{server.port}/")
        wait = WebDriverWait(browser, 120)
        find = lambda css: browser.find_elements(By.CSS_SELECTOR, css)
        browser.find_element(By.ID, "draw").click()
        browser.find_element(By.ID, "text").send_keys("a handwritten three")
        browser.find_element(By.ID, "send").click()
        wait.until(lambda _: find(".assistant.done img"))
        wait.until(lambda _: "bits/dim" in find(".assistant figcaption")[0].text)
        browser.find_element(By.ID, "draw").click()
        (tmp_path / "digit.png").write_bytes(
            base64.b64decode(image_url(IMAGE)["image_url"]["url"].split(",")[1])
        )
        browser.find_element(By.ID, "file").send_keys(str(tmp_path / "digit.png"))
        browser.find_element(By.ID, "text").send_keys("which digit is this?")
        browser.find_element(By.ID, "send").click()
        wait.until(lambda _: len(find(".assistant.done")) == 2)
        assert len(find(".user img")) == 1 and not find(".error")
        wait.until(lambda _: "bits/dim" in find(".user figcaption")[0].text)
        # What the server refuses is shown, and the conversation goes on.
        browser.find_element(By.ID, "file").send_keys(str(tmp_path / "digit.png"))
        browser.find_element(By.ID, "text").send_keys("<|im_end|>")
        browser.find_element(By.ID, "send").click()
        wait.until(lambda _: find(".error") and "special token" in find(".error")[0].text)
        # It is no part of what is scored: the next number is the next drawing's.
        browser.find_element(By.ID, "draw").click()
        browser.find_element(By.ID, "text").send_keys("a handwritten two")
        browser.find_element(By.ID, "send").click()
        wait.until(lambda _: len(find(".assistant.done")) == 3)
        wait.until(lambda _: "bits/dim" in find(".assistant.done figcaption")[-1].text)
        assert len(find(".failed figcaption")) == 1
        assert not find(".failed figcaption")[0].text
        browser.find_element(By.ID, "clear").click()
        assert not find(".turn")
    finally:
        browser.quit()
