import asyncio
import threading
from dataclasses import replace

import numpy as np
import pytest

aiohttp = pytest.importorskip("aiohttp")
from aiohttp import web  # noqa: E402

from vitopt.data.images import open_images  # noqa: E402
from vitopt.errors import DataError, MeasurementError, UnsupportedError  # noqa: E402
from vitopt.measure.latency_statistics import latency_summary  # noqa: E402
from vitopt.recipe import DataSpec  # noqa: E402
from vitopt.serve import load  # noqa: E402
from vitopt.serve.load import Client, Step, arrivals, cost_per_million  # noqa: E402

LABELS = ["circle", "cross", "square", "stripe"]


class Server:
    """Answers each image by `answer`, once as many requests as `together` are there at the same time."""

    def __init__(self, answer, together=1, ready=True, labels=LABELS):
        self.answer, self.together, self.ready, self.labels = answer, together, ready, labels
        self.bodies = []

    def __enter__(self):
        started = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._run(started)), daemon=True).start()
        assert started.wait(10)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._end.set)

    async def _run(self, started):
        self._loop, self._end, self._all = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        app = web.Application(client_max_size=10**8)
        app.router.add_get("/v2/health/ready", self._health)
        app.router.add_get("/models", self._models)
        app.router.add_post("/predict", self._predict)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        started.set()
        await self._end.wait()
        await runner.cleanup()

    async def _health(self, request):
        return web.json_response({}, status=200 if self.ready else 503)

    async def _models(self, request):
        return web.json_response([{"name": "tiny", "ready": True, "runs": {}, "labels": self.labels}])

    async def _predict(self, request):
        self.bodies.append(await request.read())
        if len(self.bodies) >= self.together:
            self._all.set()
        await self._all.wait()
        status, content = self.answer(len(self.bodies) - 1, self.bodies[-1])
        return web.json_response(content, status=status)


def good(index):
    return 200, {"classes": [{"label": "", "index": index, "percent": 100.0}], "batch": 2}


@pytest.fixture
def images(shapes):
    return open_images(DataSpec(source=str(shapes)), "test")


def test_requests_do_not_wait_for_answers(images):
    sent = len(arrivals(200, 0.2, 3))
    with Server(lambda *_: good(0), together=sent) as server:  # a client that waits for one would never end
        step = Client(server.url, images).send(200, 0.2, seed=3)
    assert step.sent == step.answered == sent and not step.errors
    assert step.mean_batch == 2


def test_answers_are_judged_by_the_image_that_was_sent(images):
    of = {images.reader.content(row): label for row, label in zip(images.rows, images.labels, strict=True)}
    with Server(lambda _, body: good(of[body])) as server:
        step = Client(server.url, images).send(100, 0.3)
    assert step.right == step.answered > 10
    with Server(lambda _, body: good((of[body] + 1) % 4)) as server:
        step = Client(server.url, images).send(100, 0.3)
    assert step.right == 0 and step.top1.low == pytest.approx(0, abs=1e-9)


def test_labels_are_those_of_the_server(images):
    order = ["stripe", "circle", "cross", "square"]
    name = {images.reader.content(r): images.class_names[k] for r, k in zip(images.rows, images.labels, strict=True)}
    with Server(lambda _, body: good(order.index(name[body])), labels=order) as server:
        step = Client(server.url, images).send(100, 0.2)
    assert step.right == step.answered > 5
    with Server(lambda *_: good(0), labels=["a", "b", "c"]) as server, pytest.raises(DataError):
        Client(server.url, images)


def test_refusals_and_errors_are_counted_apart(images):
    def answer(number, _):
        return [good(0), (503, {"error": "full"}), (500, {"error": "broken"})][number % 3]

    with Server(answer) as server:
        step = Client(server.url, images).send(60, 0.3)
    assert step.answered + step.refused + sum(step.errors.values()) == step.sent
    assert step.refused > 0 and list(step.errors) == ["500: broken"]
    assert step.slowest_refusal_ms > 0
    assert not step.keeps(1e9)  # not all were answered


def test_nobody_there_or_not_ready_is_one_clear_line(images):
    with pytest.raises(UnsupportedError, match="vitopt serve"):
        Client("http://127.0.0.1:9", images)
    with Server(lambda *_: good(0), ready=False) as server, pytest.raises(UnsupportedError, match="not ready"):
        Client(server.url, images)
    with Server(lambda *_: good(0)) as server, pytest.raises(UnsupportedError, match="there are tiny"):
        Client(server.url, images, model="other")


def test_arrivals_are_a_poisson_process():
    times = arrivals(50, 400, 0)
    assert (np.diff(times) > 0).all() and times[-1] < 400
    counts = np.histogram(times, bins=400, range=(0, 400))[0]
    assert counts.mean() == pytest.approx(50, rel=0.02)
    assert counts.var() == pytest.approx(50, rel=0.15)  # as many as the mean: Poisson
    assert not np.array_equal(arrivals(50, 1, 1), arrivals(50, 1, 2))


def test_the_highest_rate_that_keeps_the_target_is_found(monkeypatch, images):
    step = Step(1, 1, 200, 200, 0, {}, latency_summary([5.0] * 200), None, 0, 0.0, 1.0)

    def send(self, rate, seconds, seed):
        return replace(step, rate=rate, answered=200 if rate <= 13.7 else 199)

    monkeypatch.setattr(Client, "send", send)
    with Server(lambda *_: good(0)) as server:
        client = Client(server.url, images)
        steps = client.highest_rate(10, 1)
        best = max(one.rate for one in steps if one.keeps(10))
        assert 13.7 / 1.025 < best <= 13.7
        assert [one.rate for one in steps] == sorted(one.rate for one in steps)
        with pytest.raises(MeasurementError, match="4 ms"):
            client.highest_rate(4, 1)  # 5 ms at every rate


def test_a_price_becomes_a_cost():
    # One dollar an hour at one request a second: 3,600 requests for a dollar.
    assert cost_per_million(1, 1) == pytest.approx(1e6 / 3600)
    assert load.cost_per_million(277.7778, 2.4) == pytest.approx(2.4, rel=1e-6)
