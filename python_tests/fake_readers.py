"""Stand-ins for `read_clip` that worker processes import by name: they hang, crash, or fail."""

import ctypes
import os
import signal
import time
from dataclasses import replace

import numpy as np

from vcr1_fast.data.video import Clip, VideoError
from vcr1_fast.data.workers import result_array


def by_name(path, config, *, start=None, end=None, times=None, backend="pyav", **more):
    """What the path says: ok-<n> gives a clip filled with n, from this process."""
    action, _, number = path.partition("-")
    if action == "hang":
        ctypes.PyDLL(None).sleep(600)  # holds the interpreter's lock, as a decoder's loop does
    if action == "slow":
        time.sleep(0.3)
    if action == "once" and not os.path.exists(number):
        with open(number, "w"):
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
    if action == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if action in ("shared", "tail", "lost", "stuck", "two"):
        frames = result_array((2, 300, 400, 3))
        frames[:] = int(number)
        if action == "lost":
            raise VideoError(path, "is lost")
        if action == "stuck":
            ctypes.PyDLL(None).sleep(600)
        if action == "two":  # another array, as where a second decoder takes over
            other = result_array((2, 300, 400, 3))
            other[0], other[1] = frames[0], int(number) + 100
            frames = other
        if action == "tail":
            frames[0] = 0
        clip = Clip(frames, np.arange(2.0), float(os.getpid()), 2.0, path)
        return replace(clip, frames=frames[1:]) if action == "tail" else clip
    if action == "bad":
        raise VideoError(path, "is bad")
    if action == "bug":
        raise TypeError("a fault of the program")
    if action == "local":
        raise type("Local", (Exception,), {})("cannot travel")
    value = int(number) if number.isdigit() else 0
    frames = np.full((2, 300, 400, 3), value, np.uint8)
    return Clip(frames, np.arange(2.0), float(os.getpid()), 2.0, path)
