"""Steps are timed, their memory is measured, and a watcher hears of them."""

import time

import numpy as np
import pytest

from torchferry.pipeline.steps import Step, Steps

MIB = 2**20


class Watcher:
    def __init__(self):
        self.heard = []

    def started(self, name):
        self.heard.append(f"{name}...")

    def finished(self, step):
        self.heard.append(step.name)


def test_a_watcher_hears_of_every_step_in_order():
    watcher = Watcher()
    steps = Steps(watcher)
    with steps.step("first") as step:
        step.detail = "three things"
    with steps.step("second"):
        pass
    assert watcher.heard == ["first...", "first", "second...", "second"]
    assert [(step.name, step.detail) for step in steps.done] == [("first", "three things"), ("second", "")]


def test_time():
    steps = Steps()
    with steps.step("sleep"):
        time.sleep(0.05)
    assert 0.05 <= steps.done[0].seconds < 5


def test_a_step_that_raises_is_not_done():
    watcher = Watcher()
    steps = Steps(watcher)
    with pytest.raises(KeyError), steps.step("fails"):
        raise KeyError("x")
    assert steps.done == []
    assert watcher.heard == ["fails..."]


def test_the_peak_is_of_the_step_alone():
    steps = Steps()
    with steps.step("before"):
        pass
    with steps.step("large"):
        data = np.ones(200 * MIB, np.uint8)  # written, so that it is resident
        del data
    with steps.step("after"):
        pass
    before, large, after = (step.peak_mib for step in steps.done)
    assert large - before == pytest.approx(200, abs=20)
    assert after - before < 50, "the peak of the step before was not forgotten"


def test_a_step_as_text():
    assert str(Step("export", 1.234, 56.7, "9 nodes")) == "1.23 s, 57 MiB, 9 nodes"
    assert str(Step("pack", 0.5, 100.0)) == "0.50 s, 100 MiB"
