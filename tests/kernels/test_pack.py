"""First-fit decreasing: each backend against the quadratic definition, and its own promises."""

from __future__ import annotations

import re
import threading
import time

import numpy as np
import pytest

from trimpot.kernels import native
from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops.pack import first_fit_decreasing, least_bins, pack

BACKENDS = [
    pytest.param(
        "native", marks=pytest.mark.skipif(not native.state().available, reason=native.state().why)
    ),
    "torch",
]

CASES: dict[str, tuple[list[int], int]] = {
    "nothing": ([], 8),
    "one document": ([5], 8),
    "one token": ([1], 1),
    "all full": ([8] * 7, 8),
    "all just over half": ([5] * 9, 8),
    "all just half": ([4] * 9, 8),
    "all empty": ([0] * 5, 8),
    "some empty": ([0, 8, 0, 3, 0], 8),
    "empty ones go first": ([0, 0, 8, 8], 8),
    "rising": (list(range(1, 101)), 100),
    "falling": (list(range(100, 0, -1)), 100),
    "small ones fill old bins": ([6, 6, 6, 2, 2, 2, 1, 1], 8),
    "more than fits in open bins": ([7, 7, 3] + [1] * 20, 8),
    "powers of two of bins": ([3] * 64 + [1] * 64, 4),
    "capacity one": ([1, 0, 1, 1, 0], 1),
    "a huge capacity": ([2**40, 2**39, 2**39, 1], 2**40),
    # Johnson's family: first-fit decreasing needs 11 bins for what fits in 9.
    "11/9 of the optimum": ([51] * 6 + [27] * 6 + [26] * 6 + [23] * 12, 100),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_special_cases_equal_the_definition(name: str, backend: str) -> None:
    lengths, capacity = CASES[name]
    assert pack(lengths, capacity, backend).tolist() == first_fit_decreasing(lengths, capacity)


def random_case(seed: int) -> tuple[np.ndarray, int]:
    rng = np.random.default_rng(seed)
    capacity = int(rng.choice([1, 2, 7, 16, 100, 1024, 4096]))
    count = int(rng.integers(0, 400))
    draw = {
        0: lambda: rng.integers(0, capacity + 1, count),
        1: lambda: rng.integers(capacity // 2, capacity + 1, count),
        2: lambda: np.minimum(rng.lognormal(4, 1.2, count).astype(np.int64), capacity),
        3: lambda: rng.choice([1, max(capacity // 3, 1), max(capacity // 2, 1), capacity], count),
        4: lambda: np.minimum(rng.geometric(0.2, count), capacity),
    }[seed % 5]
    return draw().astype(np.int64), capacity


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", range(10))
def test_random_cases_equal_the_definition(block: int, backend: str) -> None:
    for seed in range(block * 40, block * 40 + 40):
        lengths, capacity = random_case(seed)
        want = first_fit_decreasing(lengths.tolist(), capacity)
        assert pack(lengths, capacity, backend).tolist() == want, f"seed {seed}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_any_packing_must_hold(backend: str) -> None:
    """No bin overflows, none is skipped, and no two could have been one."""
    capacity = 2048
    rng = np.random.default_rng(5)
    lengths = np.minimum(rng.lognormal(5.5, 1, 20_000).astype(np.int64) + 1, capacity)
    bins = pack(lengths, capacity, backend)
    fill = np.bincount(bins, weights=lengths)
    assert fill.max() <= capacity
    assert (fill > 0).all()
    assert np.sort(fill)[:2].sum() > capacity  # else first fit had put them together
    assert len(fill) <= 11 / 9 * -(-lengths.sum() // capacity) + 1


def fewest(lengths: list[int], capacity: int) -> int:
    """By trying all: the next document, longest first, into each bin that is open or a new one."""
    best = len(lengths)

    def place(left: list[int], rooms: list[int]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if not left:
            best = len(rooms)
            return
        for room in {*rooms} | {capacity}:
            if room >= left[0]:
                rest = list(rooms)
                if room in rest:
                    rest.remove(room)
                place(left[1:], [*rest, room - left[0]])
        place(left[1:], [*rooms, capacity - left[0]])

    place(sorted(lengths, reverse=True), [])
    return best


def test_the_least_is_never_more_than_the_optimum_and_mostly_it() -> None:
    draw, reached = np.random.default_rng(0), 0
    for _ in range(300):
        capacity = int(draw.integers(1, 40))
        lengths = draw.integers(1, capacity + 1, int(draw.integers(1, 9)))
        least, optimum = least_bins(lengths, capacity), fewest(lengths.tolist(), capacity)
        assert -(-int(lengths.sum()) // capacity) <= least <= optimum, (lengths, capacity)
        reached += least == optimum
    assert reached >= 290  # 298; by the sum of lengths alone 246


@pytest.mark.parametrize("name", CASES)
def test_the_least_of_special_cases(name: str) -> None:
    lengths, capacity = CASES[name]
    used = max(first_fit_decreasing(lengths, capacity), default=-1) + 1
    wanted = 9 if name.startswith("11/9") else used
    assert least_bins(lengths, capacity) == wanted


def test_long_tailed_documents_are_packed_as_well_as_can_be() -> None:
    """The lengths of instructions and answers: at most one row in 200 more than the bound."""
    draw = np.random.default_rng(1)
    for mean, spread in ((4, 1.2), (5, 1), (5.5, 0.8), (6, 1), (6.5, 1.2)):
        for capacity in (512, 1024, 2048):
            lengths = draw.lognormal(mean, spread, 4000).astype(np.int64).clip(1, capacity)
            rows = int(pack(lengths, capacity).max()) + 1
            assert rows <= 1.005 * least_bins(lengths, capacity)
            assert lengths.sum() / (rows * capacity) >= 0.99


def test_same_twice_and_on_both_backends() -> None:
    lengths = np.random.default_rng(2).integers(0, 513, 30_000)
    first = pack(lengths, 512)
    assert (first == pack(lengths, 512)).all()
    assert (first == pack(lengths, 512, "torch")).all()
    assert first.dtype == np.int64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.uint64, ">i8"])
def test_any_integers_in_any_layout(dtype: object, backend: str) -> None:
    lengths = np.random.default_rng(3).integers(0, 100, 200).astype(dtype)  # type: ignore[call-overload]
    unaligned = np.frombuffer(b"\0" + lengths.tobytes(), lengths.dtype, offset=1)
    for view in (lengths, lengths[::2], lengths[::-1], unaligned):
        want = first_fit_decreasing([int(length) for length in view], 100)
        assert pack(view, 100, backend).tolist() == want


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("lengths", "capacity", "message"),
    [
        ([1, 9, 2], 8, "document 1 has 9 tokens, a bin holds 8; truncate or drop it"),
        ([1, -1], 8, "document 1 has -1 tokens"),
        ([[1, 2], [3, 4]], 8, "shape (2, 2); one dimension"),
        ([1.0, 2.0], 8, "float64; integers are wanted"),
        ([1], 0, "capacity is 0"),
        ([], -3, "capacity is -3"),
        (np.array([2**63 + 1], np.uint64), 8, f"has {2**63 + 1} tokens"),
    ],
)
def test_errors_say_what_is(lengths: object, capacity: int, message: str, backend: str) -> None:
    with pytest.raises(KernelError) as caught:
        pack(lengths, capacity, backend)  # type: ignore[arg-type]
    assert message in str(caught.value)


@pytest.mark.skipif(not native.state().available, reason=native.state().why)
class TestNative:
    def test_a_million_documents_take_well_below_a_second(self) -> None:
        lengths = np.random.default_rng(4).integers(1, 4097, 1_000_000)
        begin = time.process_time()
        bins = pack(lengths, 4096)
        seconds = time.process_time() - begin
        assert np.bincount(bins, weights=lengths).max() <= 4096
        assert seconds < 0.8  # 0.13 on a Zen 5 core

    def test_other_threads_run_meanwhile(self) -> None:
        lengths = np.random.default_rng(4).integers(1, 4097, 2_000_000)
        bins = np.empty_like(lengths)
        ticks, stop = [0], threading.Event()

        def count() -> None:
            while not stop.is_set():
                ticks[0] += 1
                time.sleep(0.001)

        counter = threading.Thread(target=count)
        counter.start()
        try:
            before = ticks[0]
            native.pack(lengths, 4096, bins)
            during = ticks[0] - before
        finally:
            stop.set()
            counter.join()
        assert during >= 10  # holding the GIL lets it tick once at most

    @pytest.mark.parametrize(
        ("lengths", "bins", "message"),
        [
            (np.zeros(4, np.int32), np.zeros(4, np.int64), "lengths has items of format 'i'"),
            (np.zeros(4, np.int64), np.zeros(4, np.float64), "bins has items of format 'd'"),
            (np.zeros((2, 2), np.int64), np.zeros(4, np.int64), "lengths has 2 dimensions"),
            (np.zeros(8, np.int64)[::2], np.zeros(4, np.int64), "lengths has a stride of 16"),
            (np.zeros(4, np.int64), np.zeros(3, np.int64), "differ in size"),
            (np.array([9]), np.zeros(1, np.int64), "lengths[0] is not within"),
            (np.array([-1]), np.zeros(1, np.int64), "lengths[0] is not within"),
        ],
    )
    def test_the_door_checks_by_itself(
        self, lengths: np.ndarray, bins: np.ndarray, message: str
    ) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            native.pack(lengths, 8, bins)

    def test_the_door_writes_no_read_only_array(self) -> None:
        bins = np.zeros(3, np.int64)
        bins.flags.writeable = False
        with pytest.raises((ValueError, BufferError), match=r"read-?only|not writable"):
            native.pack(np.ones(3, np.int64), 8, bins)
        assert not bins.any()
