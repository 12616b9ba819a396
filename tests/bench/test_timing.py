import contextlib
import time
from types import SimpleNamespace

import pytest
import torch

from tritium.bench import timing
from tritium.bench.timing import (
    CLOCKS_PER_SECOND,
    MAX_BACKLOG_CALLS,
    MAX_CALLS,
    RUN_SECONDS,
    ceilings,
    input_sets,
    side_stream,
    summary,
    time_in_turn,
)

pytestmark = pytest.mark.plain

CPU = torch.device("cpu")
GPU = torch.device("cuda")


def test_summary_has_median_and_percentiles():
    found = summary([float(value) for value in range(11)])
    assert found == {"median": 5.0, "p10": 1.0, "p90": 9.0}
    assert summary([2.0])["p90"] == 2.0


def test_calls_take_turns_and_the_slower_call_has_the_longer_time():
    order = []

    def call(name, seconds):
        def run(number):
            order.append(name)
            time.sleep(seconds)

        return run

    found = time_in_turn({"a": call("a", 0.001), "b": call("b", 0.01)}, CPU, rounds=4, warmup=1)
    assert order == ["a", "b"] * 5
    assert found["b"]["median"] > 0.01 > found["a"]["median"] > 0.001
    assert found["a"]["timed_by"] == "host clock"


def test_ceilings_are_positive_and_a_cpu_needs_one_input_set():
    found = ceilings(CPU, torch.float32)
    assert found["bytes_per_second"] > 1e8
    assert found["flops_per_second"] > 1e8
    assert input_sets(10, CPU) == 1


def test_the_ceiling_of_bandwidth_is_that_of_a_kernel():
    """copy_() is not a kernel in a CUDA graph."""
    with torch.profiler.profile(record_shapes=True) as record:
        ceilings(CPU, torch.float32)
    names = [event.name for event in record.events() if [1 << 24] in event.input_shapes]
    assert "aten::neg" in names
    assert "aten::copy_" not in names


class FakeCuda:
    """A GPU with a clock that only kernels and sleeps advance, and a log of what was started."""

    Stream = torch.cuda.Stream

    def __init__(self):
        self.now = 0.0
        self.log = []
        self.capturing = None
        self.forbids_waits = False
        self.reset = []
        self.pools = []
        self.seconds_replayed = []
        self.emptied = 0

    def kernel(self, name, seconds):
        self.log.append(name)
        if self.capturing is None:
            self.now += seconds
        else:
            self.capturing.seconds += seconds

    def wait(self):
        """Wait for the device, as `.item()` does."""
        if self.forbids_waits or self.capturing is not None:
            raise RuntimeError("called a synchronizing CUDA operation")

    # --- torch.cuda

    def set_sync_debug_mode(self, mode):
        self.forbids_waits = mode == "error"

    def synchronize(self):
        assert self.capturing is None

    def graph_pool_handle(self):
        return len(self.pools)

    def device(self, device):
        return contextlib.nullcontext()

    stream = device

    def empty_cache(self):
        self.emptied += 1

    def _sleep(self, clocks):
        self.now += clocks / CLOCKS_PER_SECOND
        self.log.append("sleep")

    def Event(self, enable_timing):  # noqa: N802
        event = SimpleNamespace(synchronize=lambda: None)
        event.record = lambda: setattr(event, "time", self.now)
        event.elapsed_time = lambda end: (end.time - event.time) * 1e3
        return event

    def CUDAGraph(self):  # noqa: N802
        graph = SimpleNamespace(seconds=0.0, reset=lambda: self.reset.append(graph))

        def replay():
            self.log.append("replay")
            self.now += graph.seconds
            self.seconds_replayed.append(graph.seconds)

        graph.replay = replay
        return graph

    @contextlib.contextmanager
    def graph(self, graph, pool, stream):
        assert not self.forbids_waits
        self.pools.append(pool)
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None


@pytest.fixture
def fake(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(timing, "cuda", cuda)
    monkeypatch.setattr(timing, "_stream", lambda device: "stream")
    return cuda


def test_a_gpu_sample_replays_a_graph_of_calls_that_rotate_the_inputs(fake):
    numbers = []

    def call(number):
        numbers.append(number)
        fake.kernel("kernel", 30e-6 if number % 2 else 10e-6)

    found = time_in_turn({"a": call}, GPU, rounds=3)["a"]
    # The first call takes 10 us, so the run has RUN_SECONDS / 10 us calls. They average 20 us.
    assert found["timed_by"] == "cuda graph"
    assert numbers[-MAX_CALLS:] == list(range(MAX_CALLS))
    assert round(RUN_SECONDS / 10e-6) == MAX_CALLS
    assert found["median"] == pytest.approx(20e-6)
    assert fake.log[-6:] == ["sleep", "replay"] * 3


def test_a_call_that_waits_is_timed_behind_a_backlog_and_not_captured(fake):
    def waits(number):
        fake.kernel("kernel", 30e-6)
        fake.wait()

    found = time_in_turn({"waits": waits}, GPU, rounds=2)["waits"]
    assert found["timed_by"] == "backlog"
    assert found["median"] == pytest.approx(30e-6)
    assert fake.pools == []
    assert fake.log[-21:] == ["sleep", *["kernel"] * MAX_BACKLOG_CALLS]
    assert not fake.forbids_waits


def test_after_a_capture_that_failed_the_next_one_has_another_pool(fake):
    def fails(number):
        if fake.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        fake.kernel("fails", 1e-3)

    def works(number):
        fake.kernel("works", 1e-3)

    calls = {"first": works, "fails": fails, "second": works, "third": works}
    found = time_in_turn(calls, GPU, rounds=1)
    assert [row["timed_by"] for row in found.values()] == [
        "cuda graph", "backlog", "cuda graph", "cuda graph",
    ]  # fmt: skip
    first, failed, second, third = fake.pools
    assert first == failed != second == third


def test_runs_take_turns_on_a_gpu(fake):
    calls = {
        "long": lambda number: fake.kernel("long", 4e-3),
        "short": lambda number: fake.kernel("short", 1e-3),
    }
    found = time_in_turn(calls, GPU, rounds=2)
    assert found["long"]["median"] == pytest.approx(4e-3)
    assert found["short"]["median"] == pytest.approx(1e-3)
    # A sample has one call of the long one, and two of the short one.
    assert fake.log[-8:] == ["sleep", "replay"] * 4
    assert fake.seconds_replayed[-4:] == pytest.approx([4e-3, 2e-3] * 2)


def test_graphs_are_released_even_if_a_call_raises(fake):
    def breaks(number):
        raise ValueError("broken")

    works = {"works": lambda number: fake.kernel("works", 1e-3)}
    with pytest.raises(ValueError, match="broken"):
        time_in_turn({**works, "breaks": breaks}, GPU, rounds=1)
    assert len(fake.reset) == 1
    assert fake.emptied == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_forward_and_backward_are_captured_on_a_gpu():
    with side_stream(GPU):
        x, weight = (torch.randn(512, 512, device=GPU, requires_grad=True) for _ in range(2))
        y = (x @ weight).relu()

        def both(number):
            return torch.autograd.grad((x @ weight).relu().sum(), (x, weight))

        def backward(number):
            return torch.autograd.grad(y, (x, weight), y, retain_graph=True)

        def waits(number):
            return (x @ weight).sum().item()

        calls = {"both": both, "backward": backward, "waits": waits}
        reserved = torch.cuda.memory_reserved()
        found = time_in_turn(calls, GPU, rounds=5)
        assert torch.cuda.memory_reserved() <= reserved + (32 << 20)
    methods = {name: row["timed_by"] for name, row in found.items()}
    assert methods == {"both": "cuda graph", "backward": "cuda graph", "waits": "backlog"}
    assert 0 < found["backward"]["median"] < found["both"]["median"] < 1e-3
