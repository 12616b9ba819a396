"""Prefetch: order, errors, and the end of its thread."""

import gc
import threading
import time
import weakref

import numpy as np
import pytest

from tritium.train.data.loader import Loader
from tritium.train.data.prefetch import Prefetch
from tritium.train.data.shards import TokenStream

pytestmark = pytest.mark.plain


@pytest.fixture(autouse=True)
def no_thread_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def test_prefetch_yields_the_loaders_batches_from_any_step():
    stream = TokenStream([np.arange(1000, dtype=np.uint16)])
    loader, other = (Loader(stream, context_tokens=8, batch_size=4, seed=0) for _ in range(2))
    with Prefetch(loader.batch, 7) as batches:
        for step in range(7, 60):
            np.testing.assert_array_equal(next(batches).windows, other.batch(step).windows)


def test_prefetch_reads_four_batches_ahead_in_another_thread():
    seen, fifth = [], threading.Event()

    def read(step):
        seen.append((step, threading.current_thread() is threading.main_thread()))
        if len(seen) == 5:
            fifth.set()
        return step

    with Prefetch(read, 5) as batches:
        assert next(batches) == 5
        assert fifth.wait(30)
        time.sleep(0.05)
        assert seen == [(5, False), (6, False), (7, False), (8, False), (9, False)]


def test_error_is_raised_when_its_step_is_requested():
    def read(step):
        if step == 1:
            raise OSError("the disk is gone")
        return step

    with Prefetch(read, 0) as batches:
        assert batches.error(1) is None
        assert str(batches.error(2)) == "the disk is gone"
        assert next(batches) == 0
        with pytest.raises(OSError, match="the disk is gone"):
            next(batches)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_in_training_ends_the_thread(error):
    def train():
        with Prefetch(lambda step: time.sleep(0.02), 0) as batches:
            next(batches)
            raise error

    with pytest.raises(error):
        train()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetch_keeps_no_reference_to_returned_batches():
    stream = TokenStream([np.arange(100_000, dtype=np.uint16)])
    gc.disable()
    try:
        with Prefetch(
            Loader(stream, context_tokens=1024, batch_size=64, seed=0).batch, 0
        ) as batches:
            batch = next(batches)
            old = weakref.ref(batch)
            del batch
            next(batches)
            next(batches)
            assert old() is None
    finally:
        gc.enable()


def test_pending_reads_are_cancelled_at_exit():
    read = []
    with Prefetch(lambda step: read.append(step) or time.sleep(0.2), 0):
        pass
    assert len(read) < 2
