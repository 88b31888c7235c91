"""Shared memory between workers and consumer: right bytes, bounded, and nobody waits for ever."""

import mmap
import signal
import socket
import threading
import time
from types import SimpleNamespace

import fake_readers
import numpy as np
import pytest
import torch

from vcr1_fast.data import workers
from vcr1_fast.data.blocks import BlockPool, PoolClosed
from vcr1_fast.data.video import Clip, ClipReader, ClipRequest, VideoError

MIB = 1 << 20
CLIP = 2 * 300 * 400 * 3  # bytes of a fake reader's clip


def requests(*names):
    return [ClipRequest(name) for name in names]


def address(array):
    return array.__array_interface__["data"][0]


def in_thread(fn, *args):
    """(thread, results) of a call that may wait."""
    results = []

    def run():
        try:
            results.append(fn(*args))
        except RuntimeError as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


def test_both_sides_of_a_block_are_the_same_memory():
    pool = BlockPool(MIB)
    file, memory = pool.lend(0, 1000)
    theirs = np.frombuffer(mmap.mmap(file, 1000), np.uint8)
    theirs[:] = np.arange(1000) % 251
    assert memory.shape == (1000,) and np.array_equal(memory, np.arange(1000) % 251)
    memory[3] = 9
    assert theirs[3] == 9


def test_memory_is_used_again_after_its_last_view_and_not_before():
    pool = BlockPool(8 * MIB)
    _, memory = pool.lend(0, MIB)
    first = address(memory)
    tensor = torch.from_numpy(memory[100:].reshape(-1, 4)[5:])
    del memory
    pool.settle(0)
    _, other = pool.lend(1, MIB)
    assert address(other) != first and pool.kept == 0
    del tensor
    assert pool.kept >= MIB
    _, again = pool.lend(2, MIB - 5)
    assert address(again) == first and len(again) == MIB - 5


def test_a_small_result_does_not_hold_a_large_block():
    pool = BlockPool(64 * MIB)
    _, memory = pool.lend(0, 16 * MIB)
    first = address(memory)
    del memory
    pool.settle(0)
    _, small = pool.lend(1, MIB)
    assert address(small) != first


def test_items_wait_for_room():
    pool = BlockPool(10 * MIB)
    pool.lend(0, 4 * MIB, 2 * MIB)  # with what will be made of it
    assert pool.held == 6 * MIB
    thread, results = in_thread(pool.lend, 1, 5 * MIB)
    thread.join(0.1)
    assert thread.is_alive() and pool.held == 6 * MIB
    pool.settle(0)
    thread.join(10)
    assert len(results[0][1]) == 5 * MIB and pool.held == 5 * MIB
    pool.settle(1)
    pool.settle(1)
    assert pool.held == 0


def test_who_is_waited_for_needs_no_room_nor_do_those_before_it():
    pool = BlockPool(10 * MIB)
    pool.lend(0, 9 * MIB)
    threads = [in_thread(pool.lend, number, 20 * MIB)[0] for number in (1, 2, 3)]
    time.sleep(0.05)
    assert all(thread.is_alive() for thread in threads)
    with pool.awaited(2):
        for thread in threads[:2]:
            thread.join(10)
            assert not thread.is_alive()
        assert threads[2].is_alive()
    late, _ = in_thread(pool.lend, 2, 5 * MIB)
    late.join(0.1)
    assert late.is_alive()  # only as long as somebody waits
    pool.close()


def test_kept_memory_makes_room_for_what_is_used():
    pool = BlockPool(10 * MIB)
    for number in range(3):
        blocks = [pool.lend(2 * number + i, 3 * MIB)[1] for i in range(2)]
        del blocks
        pool.settle(2 * number)
        pool.settle(2 * number + 1)
        assert pool.kept <= 10 * MIB
    assert pool.kept >= 6 * MIB
    pool.lend(9, 7 * MIB)
    assert pool.kept <= 3 * MIB
    pool.close()
    assert pool.kept == 0


def test_the_end_of_a_pool_wakes_who_waits_and_leaves_arrays_alone():
    pool = BlockPool(MIB)
    _, memory = pool.lend(0, MIB)
    thread, results = in_thread(pool.lend, 1, MIB)
    pool.close()
    thread.join(10)
    assert isinstance(results[0], PoolClosed)
    memory[:] = 7
    assert (memory == 7).all()


def test_pinned_memory_is_registered_once_and_let_go_before_it_is_unmapped(monkeypatch):
    calls = []

    def register(start, size, flags):
        calls.append(("register", start, size, flags))
        return 0

    cudart = SimpleNamespace(
        cudaHostRegister=register,
        cudaHostUnregister=lambda start: calls.append(("unregister", start)),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    pool = BlockPool(8 * MIB, pin=True)
    _, memory = pool.lend(0, MIB)
    start = address(memory)
    assert calls == [("register", start, MIB, 1)]
    del memory
    pool.settle(0)
    _, memory = pool.lend(1, MIB)
    assert len(calls) == 1  # pinning is slow: once a block
    del memory
    pool.close()
    assert calls[1:] == [("unregister", start)]
    cudart.cudaHostRegister = lambda *_: 2
    with pytest.raises(RuntimeError, match=r"cannot pin 1 MiB.*error 2.*data\.resize=worker"):
        BlockPool(8 * MIB, pin=True).lend(0, MIB)


def test_results_in_shared_memory_have_their_own_bytes():
    names = [f"shared-{n}" for n in range(1, 9)] + ["tail-20", "ok-21", "two-22"]
    with ClipReader(workers=2, reader=fake_readers.by_name) as reader:
        clips = list(reader.read(requests(*names)))
        assert reader._pool.blocks.held == 0
    for name, clip in zip(names, clips, strict=True):
        expected = np.full((2, 300, 400, 3), int(name.split("-")[1]), np.uint8)
        if name.startswith("two"):
            expected[1] = 122
        if name.startswith("tail"):
            expected = expected[1:]
        assert np.array_equal(clip.frames, expected)  # the workers are gone by now
        clip.frames[0, 0] = 0  # the caller owns the memory
    assert all((clip.frames[:, 1:] != 0).all() for clip in clips)


def test_memory_of_failed_items_comes_back():
    with ClipReader(workers=1, timeout=1.0, reader=fake_readers.by_name) as reader:
        got = list(reader.read(requests("lost-1", "stuck-2", "shared-3")))
        assert [type(result) for result in got] == [VideoError, VideoError, Clip]
        blocks = reader._pool.blocks
        assert (got[2].frames == 3).all() and blocks.held == 0
        del got
        assert CLIP <= blocks.kept < 3 * CLIP


@pytest.mark.parametrize("budget", [1, CLIP + 1, 3 * CLIP])
def test_a_reader_holds_its_budget_and_the_clip_that_is_waited_for(budget):
    with ClipReader(
        workers=2, prefetch=5, prefetch_bytes=budget, reader=fake_readers.by_name
    ) as reader:
        blocks, most = reader._pool.blocks, 0
        for number, clip in enumerate(reader.read(requests(*[f"shared-{n}" for n in range(8)]))):
            assert (clip.frames == number).all()
            time.sleep(0.05)  # for those that read ahead
            most = max(most, blocks.held)
        # One more item may be let in beside the one that is waited for: when it has just come.
        assert most <= max(budget // CLIP, 1) * CLIP
        assert blocks.held == 0


def test_reading_within_reading_does_not_wait_for_itself():
    with ClipReader(workers=2, prefetch_bytes=1, reader=fake_readers.by_name) as reader:
        outer = reader.read(requests(*[f"shared-{n}" for n in range(6)]))
        assert (next(outer).frames == 0).all()
        inner = list(reader.read(requests("shared-7", "shared-8")))
        assert [int(clip.frames[0, 0, 0, 0]) for clip in inner] == [7, 8]
        assert [int(clip.frames[0, 0, 0, 0]) for clip in outer] == [1, 2, 3, 4, 5]
        outer = reader.read(requests(*[f"shared-{n}" for n in range(6)]))
        next(outer)
        outer.close()  # what it had in work must not keep later ones waiting
        assert len(list(reader.read(requests("shared-1", "shared-2")))) == 2
        deadline = time.monotonic() + 10
        while reader._pool.blocks.held and time.monotonic() < deadline:
            time.sleep(0.01)
        assert reader._pool.blocks.held == 0


def test_waiting_for_room_is_no_timeout():
    with ClipReader(
        workers=2, timeout=1.0, prefetch_bytes=1, reader=fake_readers.by_name
    ) as reader:
        for index, clip in enumerate(reader.read(requests(*["shared-1"] * 5))):
            if index == 0:
                time.sleep(1.5)
            assert isinstance(clip, Clip)


def test_a_workers_alarm_rests_while_it_waits_for_memory():
    ours, theirs = socket.socketpair()
    pool = BlockPool(MIB)
    seen = []

    def serve():
        wanted = workers._receive(ours, None)
        seen.append((wanted.shape, signal.getitimer(signal.ITIMER_REAL)[0]))
        file, memory = pool.lend(0, 24)
        seen.append(memory)
        socket.send_fds(ours, [b"b"], [file])

    thread = threading.Thread(target=serve)
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        signal.setitimer(signal.ITIMER_REAL, 100.0)
        thread.start()
        array = workers._Lender(theirs).array((2, 4, 3))
        left = signal.setitimer(signal.ITIMER_REAL, 0)[0]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        thread.join()
        ours.close()
        theirs.close()
    assert seen[0] == ((2, 4, 3), 0.0) and 90 < left <= 100
    array[1, 2] = 5
    assert (seen[1].reshape(2, 4, 3)[1, 2] == 5).all()


class Doubling:
    """A stage that says what it was given."""

    pin = False

    def __call__(self, clip):
        if clip.path == "shared-13":
            raise VideoError(clip.path, "is unlucky")
        return SimpleNamespace(clip=clip, doubled=clip.frames.astype(int) * 2)

    def bytes(self, shape):
        return 8 * int(np.prod(shape))


@pytest.mark.parametrize("count", [0, 1])
def test_a_stage_finishes_answers_ahead_and_its_bytes_count(count):
    names = ["shared-4", "bad-5", "shared-13", "ok-6"]
    with ClipReader(
        workers=count,
        prefetch=3,
        prefetch_bytes=12 * CLIP,
        stage=Doubling(),
        reader=fake_readers.by_name,
    ) as reader:
        clips = reader.read(requests(*names))
        first = next(clips)
        assert (first.doubled == 8).all() and (first.clip.frames == 4).all()
        rest = list(clips)
        assert [str(error) for error in rest[:2]] == ["bad-5: is bad", "shared-13: is unlucky"]
        assert (rest[2].doubled == 12).all()
        if count:
            two = reader.read(requests("shared-1", "shared-2", "shared-3"))
            next(two)
            time.sleep(0.3)
            assert reader._pool.blocks.held == 9 * CLIP  # with its frames alone two would fit


def test_impossible_budgets_are_refused():
    with pytest.raises(ValueError, match="prefetch_bytes must be at least 1, got 0"):
        ClipReader(prefetch_bytes=0)
