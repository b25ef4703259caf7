import asyncio
import threading

import pytest
from serve_stand_in import count, image_of

from vitopt.errors import BadImageError
from vitopt.serve.model import Busy
from vitopt.serve.process import ModelLost, Ready


def run(model, work):
    async def all_of_it():
        await model.start()
        try:
            return await work()
        finally:
            await model.stop()

    return asyncio.run(all_of_it())


async def until(holds):
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.001)


async def all_at_once(model, numbers):
    return await asyncio.gather(*(model.classify(image_of(number)) for number in numbers), return_exceptions=True)


def test_every_request_gets_its_own_answer(model):
    served = model(queue=64)

    async def work():
        found = []
        for first in range(0, 640, 64):
            answers = await all_at_once(served, range(first, first + 64))
            found += [answer.logits[0] for answer in answers]
        return found

    assert run(served, work) == list(range(640))
    assert count(served, "requests_total", result="answered") == 640 and served.waiting == 0


def test_requests_that_come_during_a_batch_are_the_next_one(model, processes):
    served = model()

    async def work():
        processes[0].hold.clear()
        first = asyncio.create_task(served.classify(image_of(0)))
        await until(lambda: processes[0].calls)
        rest = asyncio.create_task(all_at_once(served, range(1, 4)))
        await until(lambda: len(served._ready) == 3)
        processes[0].hold.set()
        return [await first, *await rest]

    answers = run(served, work)
    assert [len(slots) for slots, _ in processes[0].calls] == [1, 3]
    assert [size for _, size in processes[0].calls] == [1, 4]  # three are filled up to what is built
    assert [answer.batch for answer in answers] == [1, 3, 3, 3]
    assert [count(served, "batch_images_bucket", le=limit) for limit in ("1.0", "2.0", "4.0", "+Inf")] == [1, 1, 2, 2]


def test_more_than_fit_are_refused_and_the_others_answered(model, processes):
    served = model(queue=4)

    async def work():
        processes[0].hold.clear()
        waiting = asyncio.create_task(all_at_once(served, range(4)))
        await until(lambda: served.waiting == 4)
        with pytest.raises(Busy) as refused:
            await served.classify(image_of(9))
        processes[0].hold.set()
        return refused.value, await waiting

    refused, answers = run(served, work)
    assert refused.retry_after_s >= 1
    assert [answer.logits[0] for answer in answers] == [0, 1, 2, 3]
    assert [count(served, "requests_total", result=result) for result in ("answered", "refused")] == [4, 1]


def test_a_request_that_would_be_late_is_refused_at_once_but_never_a_lone_one(model, processes):
    served = model(target_p99_ms=5)  # a batch takes 10 ms

    async def work():
        processes[0].hold.clear()
        alone = asyncio.create_task(served.classify(image_of(1)))
        await until(lambda: processes[0].calls)
        with pytest.raises(Busy):
            await served.classify(image_of(2))
        processes[0].hold.set()
        return await alone

    assert run(served, work).logits[0] == 1


def test_what_takes_longer_than_expected_is_let_in_less(model, processes):
    served = model(target_p99_ms=40)  # of which the running batch, one ahead and its own take at most 24

    async def taken():
        processes[0].hold.clear()
        first = asyncio.create_task(served.classify(image_of(1)))
        await until(lambda: len(processes[0].calls) == calls + 1)
        second = asyncio.create_task(served.classify(image_of(2)))
        await asyncio.sleep(0)
        processes[0].hold.set()
        return await asyncio.gather(first, second, return_exceptions=True)

    async def work():
        nonlocal calls
        before = await taken()
        for _ in range(30):
            served._delay.observe(0.01, 0.1)  # ten times as long
        calls = len(processes[0].calls)
        return before, await taken()

    calls = 0
    before, after = run(served, work)
    assert [type(one).__name__ for one in before] == ["Answer", "Answer"]
    assert [type(one).__name__ for one in after] == ["Answer", "Busy"]


@pytest.mark.parametrize("when", ["decoding", "waiting", "in a batch"])
def test_a_client_that_goes_away_frees_its_place(model, processes, when):
    served = model(queue=4, decoders=1)
    go = threading.Event()

    def slow(pixels):
        assert go.wait(10)
        pixels[:] = 1

    async def work():
        processes[0].hold.clear()
        if when == "decoding":
            task = asyncio.create_task(served.classify(slow))
            await until(lambda: served.waiting == 1)
            await asyncio.sleep(0.02)  # the thread has begun
        else:
            blocking = asyncio.create_task(served.classify(image_of(0)))
            await until(lambda: processes[0].calls)
            task = blocking
            if when == "waiting":
                task = asyncio.create_task(served.classify(image_of(1)))
                await until(lambda: served._ready)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        held = served.waiting
        go.set()
        processes[0].hold.set()
        await until(lambda: served.waiting == 0)
        again = await all_at_once(served, range(4))
        return held, [answer.logits[0] for answer in again]

    held, again = run(served, work)
    assert held == 1  # the slot that is still written or read, or the batch that ran before
    assert again == [0, 1, 2, 3]
    assert sorted(served._free) == [0, 1, 2, 3]


def test_when_the_process_ends_only_its_requests_fail(model, processes):
    served = model(queue=8, batch_sizes=(1, 2))

    async def work():
        processes[0].hold.clear()
        processes[0].dies = True
        lost = asyncio.create_task(served.classify(image_of(0)))
        await until(lambda: processes[0].calls)
        kept = asyncio.create_task(all_at_once(served, range(1, 5)))
        await until(lambda: len(served._ready) == 4)
        processes[0].hold.set()
        with pytest.raises(ModelLost):
            await lost
        return [answer.logits[0] for answer in await kept]

    assert run(served, work) == [1, 2, 3, 4]
    assert len(processes) == 2 and count(served, "model_restarts_total") == 1
    assert [count(served, "requests_total", result=result) for result in ("answered", "failed")] == [4, 1]


def test_an_image_that_cannot_be_decoded_fails_alone(model):
    served = model(queue=4)

    def broken(pixels):
        raise BadImageError("not an image")

    async def work():
        tasks = [served.classify(broken), served.classify(image_of(5))]
        return await asyncio.gather(*tasks, return_exceptions=True)

    bad, good = run(served, work)
    assert isinstance(bad, BadImageError) and good.logits[0] == 5
    assert len(served._free) == 4


def test_a_request_without_an_answer_in_time_ends_and_its_batch_keeps_its_slot(model, processes):
    served = model(queue=4, timeout_s=0.05)

    async def work():
        processes[0].hold.clear()
        with pytest.raises(TimeoutError):
            await served.classify(image_of(1))
        held = served.waiting
        processes[0].hold.set()
        await until(lambda: served.waiting == 0)
        return held

    assert run(served, work) == 1


def test_stopping_answers_what_was_accepted_and_takes_no_more(model, processes):
    served = model()

    async def work():
        await served.start()
        processes[0].hold.clear()
        waiting = asyncio.create_task(all_at_once(served, range(6)))
        await until(lambda: served.waiting == 6)
        stopping = asyncio.create_task(served.stop())
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await served.classify(image_of(9))
        processes[0].hold.set()
        await stopping
        return [answer.logits[0] for answer in await waiting]

    assert asyncio.run(work()) == list(range(6))


def test_a_gpu_tells_its_energy_and_load(model, processes, monkeypatch):
    class Fake:
        energy_joules = staticmethod(lambda: 12.5)
        busy_percent = staticmethod(lambda: None)

    monkeypatch.setattr("vitopt.measure.conditions.Gpu.at", lambda address: Fake if address == "0:1" else None)
    monkeypatch.setattr("serve_stand_in.FakeProcess.ready", lambda self: Ready({1: 0.01}, True, {}, gpu="0:1"))
    served = model()

    async def work():
        return count(served, "gpu_joules"), count(served, "gpu_percent")

    joules, percent = run(served, work)
    assert joules == 12.5 and percent != percent  # NaN: not told
