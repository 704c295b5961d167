"""The instruments against a clock, an allocator and a ranking that the tests control."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from vitreuse.cost import measure
from vitreuse.cost.measure import Timing, peak_memory_mib, saved_memory_mib, time_interleaved, top_classes

CPU = torch.device("cpu")
MIB = 2**20


class Clock:
    """A clock that only moves when a call says so."""

    def __init__(self):
        self.seconds = 0.0
        self.order = []

    def perf_counter(self) -> float:
        return self.seconds

    def call(self, name, *durations_ms):
        """A call that takes the given times in turn."""
        durations = iter(durations_ms)

        def elapse():
            self.order.append(name)
            self.seconds += next(durations) / 1000

        return elapse


def test_limits_are_those_of_one_product_and_one_copy(monkeypatch):
    timings = {"product": Timing(9.0, 2.0, 0.0, 10), "copy": Timing(9.0, 4.0, 0.0, 10)}

    def time_them(calls, device):
        for call in calls.values():
            call()
        return timings

    monkeypatch.setattr(measure, "time_interleaved", time_them)
    limits = measure.machine_limits(CPU, torch.bfloat16)
    assert limits["product_gmacs_per_second"] == pytest.approx(2048**3 / 2e-3 / 1e9)
    assert limits["copy_gb_per_second"] == pytest.approx(2 * 2**28 / 4e-3 / 1e9)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    return clock


def test_timing_takes_turns_and_leaves_the_warm_up_out(clock):
    calls = {"a": clock.call("a", 900, 1, 2, 3, 4, 100), "b": clock.call("b", 900, 7, 7, 7, 7, 7)}
    timings = time_interleaved(calls, CPU, num_repeats=5, num_warmups=1)
    assert clock.order == ["b", "a", "a", "b"] * 3
    assert timings["a"] == Timing(
        median_ms=pytest.approx(3), minimum_ms=pytest.approx(1), spread_percent=pytest.approx(200 / 3), num_repeats=5
    )
    assert timings["b"].spread_percent == pytest.approx(0, abs=1e-9)


def test_throughput_is_that_of_the_median(clock):
    timings = time_interleaved({"a": clock.call("a", 10, 20, 60)}, CPU, num_repeats=3, num_warmups=0)
    assert timings["a"].images_per_second(batch_size=5) == pytest.approx(250)


def test_one_repeat_has_no_spread(clock):
    timing = time_interleaved({"a": clock.call("a", 13)}, CPU, num_repeats=1, num_warmups=0)["a"]
    assert (timing.median_ms, timing.spread_percent) == (pytest.approx(13), 0)


def _bytes(num_mib: float) -> torch.Tensor:
    return torch.empty(int(num_mib * MIB), dtype=torch.uint8)


def test_peak_memory_counts_what_lives_at_once():
    resident = _bytes(5)

    def call():
        first = _bytes(1)
        second = _bytes(2)
        del first
        half = second[: MIB // 2].add_(1)  # a view and an operation in place hold nothing of their own
        return half, _bytes(0.5)

    assert peak_memory_mib(call, [resident, resident[:7]], CPU) == 8


def test_peak_memory_falls_when_a_resident_tensor_goes():
    resident = [_bytes(5)]

    def call():
        resident.clear()
        _bytes(3)

    assert peak_memory_mib(call, resident, CPU) == 5


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_peak_memory_sees_the_map_inside_a_composite_operation(context):
    q = torch.randn(1, 1, 512, 1)

    def attend():
        with context(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            torch.nn.functional.scaled_dot_product_attention(q, q, q)

    assert peak_memory_mib(attend, [], CPU) >= 2  # logits and their softmax, 1 MiB each


@pytest.mark.parametrize("training", [False, True])
def test_peak_memory_is_what_torchs_allocator_hands_out(training):
    model = timm.create_model("deit_tiny_patch16_224", img_size=112, depth=2).train(training)
    images = torch.randn(16, 3, 112, 112)  # large enough that no convolution's scratch is at the peak

    def call():
        if not training:
            with torch.inference_mode():
                model(images)
            return
        model(images).sum().backward()
        model.zero_grad()

    call()
    assert peak_memory_mib(call, [], CPU) == pytest.approx(_peak_by_profiler(call) / MIB, rel=0.001)


def _peak_by_profiler(call) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(sizes.cumsum(0).max())


@given(st.data())
def test_top_classes_are_those_of_a_stable_sort(data):
    num_classes = data.draw(st.integers(1, 7))
    row = st.lists(st.integers(-2, 2), min_size=num_classes, max_size=num_classes)
    logits = data.draw(st.lists(row, min_size=1, max_size=5))
    for k in (1, 2, 5):
        expected = [sorted(range(num_classes), key=lambda c, values=values: (-values[c], c))[:k] for values in logits]
        assert top_classes(torch.tensor(logits, dtype=torch.float64), k).tolist() == expected


def test_the_top_class_is_argmax_under_ties():
    logits = torch.randint(0, 3, (211, 7)).double()
    assert top_classes(logits)[:, 0].equal(logits.argmax(1))


def test_nan_comes_first_and_is_no_class():
    nan = float("nan")
    logits = torch.tensor([[nan, nan, nan], [nan, 0.0, 1.0], [0.0, nan, 1.0]])
    assert top_classes(logits).tolist() == [[-1, -1, -1], [-1, 2, 1], [-1, 2, 0]]


def test_what_is_saved_for_the_backward_pass_counts_once():
    x, w, y = (torch.ones(size, requires_grad=True) for size in (1000, 1000, 3000))
    assert saved_memory_mib(lambda: x * w) == 8000 / 2**20
    assert saved_memory_mib(lambda: (x * w, x * x.view(10, 100).flatten())) == 8000 / 2**20
    assert saved_memory_mib(lambda: (y.exp().sum(), x + w)) == 12000 / 2**20  # exp keeps its result, a sum nothing
    assert saved_memory_mib(lambda: [y[:1000].clone().exp() for _ in range(3)]) == 12000 / 2**20
    with torch.no_grad():
        assert saved_memory_mib(lambda: x * w) == 0
