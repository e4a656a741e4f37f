"""One thread owns the model; of commands of one page the newest wins."""

from __future__ import annotations

import threading

import pytest

from headscope.app.worker import Superseded, Ticket, Worker


@pytest.fixture
def worker():  # type: ignore[no-untyped-def]
    worker = Worker()
    yield worker
    worker.close()


def test_of_twenty_jobs_in_a_lane_the_first_is_stopped_and_the_last_wins(worker: Worker) -> None:
    begun, ran = threading.Event(), []

    def slow(ticket: Ticket) -> None:
        begun.set()
        while True:
            ticket.report("layer 1 of 12")

    first, _ = worker.submit(slow, lane="page")
    assert begun.wait(5)
    rest = [worker.submit(lambda ticket, number=number: ran.append(number) or number, lane="page")[0] for number in range(20)]
    assert rest[-1].result(5) == 19
    assert ran == [19]
    for stopped in [first, *rest[:-1]]:
        with pytest.raises(Superseded):
            stopped.result(5)


def test_lanes_do_not_stop_each_other(worker: Worker) -> None:
    jobs = [worker.submit(lambda ticket, number=number: number, lane=f"page {number}")[0] for number in range(5)]
    assert [job.result(5) for job in jobs] == [0, 1, 2, 3, 4]


def test_pictures_go_before_waiting_runs(worker: Worker) -> None:
    hold, order = threading.Event(), []
    worker.submit(lambda ticket: hold.wait(5), lane="a")
    run, _ = worker.submit(lambda ticket: order.append("run"), lane="b")
    picture, _ = worker.submit(lambda ticket: order.append("picture"))
    hold.set()
    run.result(5)
    assert order == ["picture", "run"]
    assert picture.done()


def test_the_thread_outlives_any_job(worker: Worker) -> None:
    def fail(ticket: Ticket) -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        worker.submit(fail)[0].result(5)
    gone, _ = worker.submit(lambda ticket: 1, lane="x")
    gone.cancel()
    assert worker.submit(lambda ticket: 2)[0].result(5) == 2


def test_a_closed_worker_takes_nothing_and_leaves_nobody_waiting() -> None:
    worker, begun, hold = Worker(), threading.Event(), threading.Event()
    running, _ = worker.submit(lambda ticket: begun.set() or hold.wait(5), lane="a")
    assert begun.wait(5)
    waiting, _ = worker.submit(lambda ticket: 1, lane="b")
    threading.Timer(0.1, hold.set).start()
    worker.close()
    assert running.result(5)
    assert waiting.done()
    with pytest.raises(RuntimeError, match="closed"):
        worker.submit(lambda ticket: 1)
