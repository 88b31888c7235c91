import multiprocessing
import os
import threading

import pytest
import torch

from vcr1_fast.ops import gather_logprobs, host_memory, video_patches
from vcr1_fast.ops.backend import native

pytestmark = pytest.mark.skipif(native is None, reason="vcr1_fast._C is not built")
SERVED = (torch.float32, torch.bfloat16, torch.float16)
LARGE = (1024, 512)  # 2 MiB in float32
KEPT = 256 << 20
# Under AddressSanitizer (`make sanitize`) nothing is kept, for it to see each block's end.
KEEPS = "VCR1_NATIVE" not in os.environ
keeps = pytest.mark.skipif(not KEEPS, reason="this build of vcr1_fast._C keeps no memory")


@pytest.fixture(autouse=True)
def nothing_kept():
    host_memory.release()
    yield
    host_memory.release()


@pytest.mark.parametrize("dtype", [*SERVED, torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(4,), (3, 5), LARGE, (2, 1, 1024, 1024)], ids=str)
def test_a_tensor_like_torch_makes_it(shape, dtype):
    x, expected = host_memory.empty(shape, dtype), torch.empty(shape, dtype=dtype)
    assert x.shape == expected.shape and x.stride() == expected.stride()
    assert x.dtype == dtype and x.device == expected.device and not x.requires_grad
    assert x.fill_(3).double().sum() == 3 * expected.numel()


@keeps
def test_memory_is_used_again_once_the_last_view_is_gone():
    x = host_memory.empty(LARGE, torch.float32).fill_(1)
    address, view = x.data_ptr(), x[3:]
    del x
    other = host_memory.empty(LARGE, torch.float32).fill_(2)
    assert other.data_ptr() != address
    assert bool((view == 1).all())
    del view
    assert host_memory.empty(LARGE, torch.float32).data_ptr() == address


@keeps
def test_a_block_serves_what_is_not_much_smaller():
    x = host_memory.empty((4096, 512), torch.float32)  # 8 MiB
    address = x.data_ptr()
    del x
    third = host_memory.empty((2730, 256), torch.float32)  # 2.7 MiB: would waste two thirds
    assert third.data_ptr() != address
    assert host_memory.empty((4097, 512), torch.float32).data_ptr() != address
    assert host_memory.empty((4096, 512), torch.bfloat16).data_ptr() == address


@keeps
def test_what_is_kept_is_bounded_and_can_be_released():
    tensors = [host_memory.empty((64 << 20,), torch.float16) for _ in range(3)]  # 128 MiB each
    del tensors
    assert host_memory.release() == KEPT
    assert host_memory.release() == 0


def test_more_than_the_bound_is_not_kept():
    x = host_memory.empty((129 << 20,), torch.float16)
    del x
    assert host_memory.release() == 0


@keeps
def test_the_oldest_block_makes_room():
    tensors = [host_memory.empty((k << 19,), torch.float16) for k in range(1, 10)]
    addresses = [x.data_ptr() for x in tensors]
    while tensors:
        tensors.pop(0)
    newest = host_memory.empty((9 << 19,), torch.float16)
    assert newest.data_ptr() == addresses[-1]


@keeps
def test_a_capsule_that_nobody_takes_gives_its_memory_back():
    capsule = native.take_block(LARGE, "float32")
    del capsule
    assert host_memory.release() == 2 << 20


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="int64"):
        native.take_block(LARGE, "int64")
    with pytest.raises(ValueError, match="got 0"):
        native.take_block((0, 4), "float32")
    with pytest.raises(ValueError, match="too large"):
        native.take_block((1 << 40, 1 << 40), "float32")
    with pytest.raises(MemoryError):
        native.take_block((1 << 50,), "float32")


def test_no_two_threads_get_the_same_memory():
    clashes = []

    def work(name: int) -> None:
        for _ in range(200):
            x = host_memory.empty(LARGE, torch.float32)
            x[::256] = name
            if not bool((x[::256] == name).all()):
                clashes.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes


def _child(queue) -> None:
    # torch's own OpenMP threads are gone after a fork, and a loop that is shared out to them hangs.
    torch.set_num_threads(1)
    x = host_memory.empty(LARGE, torch.float32).fill_(7)
    queue.put(float(x.sum()))


def test_a_forked_process_has_its_own():
    host_memory.empty(LARGE, torch.float32).fill_(1)  # kept at the fork
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == 7 * 1024 * 512
    child.join()


def test_patches_reuse_memory_and_stay_right():
    torch.manual_seed(0)
    clips = torch.randint(0, 256, (2, 8, 252, 280, 3), dtype=torch.uint8)
    expected = [
        video_patches(
            clip, out=torch.empty(4 * 18 * 20, 1176, dtype=torch.float32), dtype=torch.float32
        )[0]
        for clip in clips
    ]
    addresses = set()
    for clip, right in zip(clips, expected, strict=True):
        got, _ = video_patches(clip, dtype=torch.float32)
        addresses.add(got.data_ptr())
        assert torch.equal(got, right)
        del got
    assert len(addresses) == 1 or not KEEPS


def test_gradients_reuse_memory_and_stay_right():
    torch.manual_seed(0)
    labels = torch.randint(8192, (64,))
    addresses = set()
    for _ in range(2):
        logits = torch.randn(64, 8192, requires_grad=True)
        gather_logprobs(logits, labels).logps.sum().backward()
        addresses.add(logits.grad.data_ptr())
        exact = torch.nn.functional.one_hot(labels, 8192) - logits.detach().double().softmax(-1)
        torch.testing.assert_close(logits.grad, exact.float(), rtol=1e-5, atol=1e-7)
        del logits
    assert len(addresses) == 1 or not KEEPS
