"""The figures of a load."""

from __future__ import annotations

from coupon_svc.load.recorder import UNANSWERED, Recorder


def test_a_window_has_what_came_since_the_one_before() -> None:
    recorder = Recorder()
    for outcome in ("ok", "replayed", "locked", UNANSWERED):
        recorder.count("assign", outcome, 0.010)
    first = recorder.close_window(2.0)
    assert (first.began_s, first.ended_s, first.answers, first.good) == (0.0, 2.0, 3, 2)
    assert first.per_second == 1.5
    assert first.latency.count == 4, "what was never answered was waited for all the same"
    recorder.count("redeem", "ok", 0.020)
    second = recorder.close_window(3.0)
    assert (second.began_s, second.answers, second.good, second.latency.count) == (2.0, 1, 1, 1)


def test_the_whole_load_is_all_its_windows() -> None:
    recorder = Recorder()
    for number in range(6):
        recorder.count(("assign", "redeem")[number % 2], "ok", 0.001 * (number + 1))
        if number % 2:
            recorder.close_window(number)
    assert recorder.overall().count == 6
    assert recorder.overall().greatest == 0.006
    assert {verb: histogram.count for verb, histogram in recorder.latencies.items()} == {"assign": 3, "redeem": 3}
    assert recorder.outcomes == {("assign", "ok"): 3, ("redeem", "ok"): 3}


def test_a_window_without_length_divides_by_nothing() -> None:
    assert Recorder().close_window(0.0).per_second == 0.0
