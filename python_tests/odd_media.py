"""A generator of odd and broken video files whose frames carry their numbers; made by ffmpeg.

A file is a container, a codec and a fault. Frame n shows n in 8 black or white bars, and its
orientation in four coloured corners, so frames are judged without another decoder. Times are
checked against what was written and against ffprobe.
"""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

COUNT, FPS = 36, 12
HEIGHT, WIDTH, BITS = 64, 96, 8
GOP = 9
MISSING = next((f"{n} is not installed" for n in ("ffmpeg", "ffprobe") if not shutil.which(n)), "")


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(height, width, 3) uint8 frame that shows `number`; corners red, green, yellow, blue,
    clockwise from the top left."""
    frame = np.full((height, width, 3), 96, np.uint8)
    rows, columns = height // 4, width // 6
    frame[:rows, :columns] = (220, 20, 20)
    frame[:rows, -columns:] = (20, 220, 20)
    frame[-rows:, :columns] = (20, 20, 220)
    frame[-rows:, -columns:] = (220, 220, 20)
    for bit in range(BITS):
        left, right = width * bit // BITS, width * (bit + 1) // BITS
        frame[3 * height // 8 : 5 * height // 8, left:right] = 235 if number >> bit & 1 else 16
    return frame


def number(frame: np.ndarray) -> int | None:
    """The number that an upright frame shows; None for bars that are neither black nor white."""
    height, width = frame.shape[:2]
    value = 0
    for bit in range(BITS):
        left, right = width * bit // BITS, width * (bit + 1) // BITS
        inner = frame[height * 7 // 16 : height * 9 // 16, left + 3 : right - 3].mean()
        if 80 < inner < 170:
            return None
        value |= int(inner > 125) << bit
    return value


def corners(frame: np.ndarray) -> str:
    """Colours of the corners, clockwise from the top left: RGYB for an upright frame."""
    height, width = frame.shape[:2]
    side = min(height, width) // 8
    parts = (np.s_[:side, :side], np.s_[:side, -side:], np.s_[-side:, -side:], np.s_[-side:, :side])
    names = {(1, 0, 0): "R", (0, 1, 0): "G", (1, 1, 0): "Y", (0, 0, 1): "B"}
    means = (frame[part].reshape(-1, 3).mean(0) > 120 for part in parts)
    return "".join(names.get(tuple(int(on) for on in mean), "?") for mean in means)


def ffmpeg(*arguments: str, frames: Iterator[np.ndarray] | None = None) -> None:
    """Run ffmpeg, with raw frames on its standard input; its message on failure."""
    command = ["ffmpeg", "-v", "error", "-y", *arguments]
    data = None if frames is None else b"".join(frame.tobytes() for frame in frames)
    done = subprocess.run(command, input=data, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{done.stderr.decode(errors='replace')[-500:]}: {' '.join(command)}")


def encode(
    path: Path,
    codec: str = "libx264",
    *options: str,
    count: int = COUNT,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    inputs: tuple[str, ...] = (),
    fps: str = str(FPS),
) -> Path:
    """Frames 0 .. count - 1 in a file, beside further `inputs`."""
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[1]}x{size[0]}", "-r", fps)
    pixels = () if "-pix_fmt" in options or codec in FREE_PIXELS else ("-pix_fmt", "yuv420p")
    quality = QUALITY.get(codec, ("-q:v", "2"))
    settings = (*quality, *pixels, "-g", str(GOP), "-threads", "1", *options)
    ffmpeg(
        *(*raw, "-i", "-", *inputs, "-c:v", codec, *settings, str(path)),
        frames=(picture(i, *size) for i in range(count)),
    )
    return path


QUALITY = {
    "libx264": ("-crf", "12"),
    "libx265": ("-x265-params", "log-level=none:crf=10"),
    "libvpx": ("-b:v", "2M"),
    "libvpx-vp9": ("-b:v", "2M", "-cpu-used", "8"),
    "libaom-av1": ("-crf", "20", "-cpu-used", "8"),
}
FREE_PIXELS = {"prores_ks", "qtrle", "png", "gif", "mjpeg", "rawvideo"}
CODECS = {
    "mp4": "libx264 libx265 mpeg4 libaom-av1 libvpx-vp9 mjpeg mpeg2video",
    "mov": "libx264 prores_ks mjpeg qtrle png mpeg4",
    "mkv": "libx264 libx265 libvpx libvpx-vp9 mpeg4 mpeg2video ffv1 huffyuv libtheora wmv1",
    "webm": "libvpx libvpx-vp9",
    "avi": "libx264 mpeg4 libxvid mjpeg wmv2 ffv1 huffyuv",
    "ts": "libx264 libx265 mpeg2video",
    "mpg": "mpeg1video mpeg2video",
    "flv": "flv libx264",
    "wmv": "wmv1 wmv2",
    "ogv": "libtheora",
    "nut": "libx264 ffv1",
    "3gp": "libx264 mpeg4",
    "gif": "gif",
}
PAIRS = [(box, codec) for box, codecs in CODECS.items() for codec in codecs.split()]
B_FRAMES = {"libx264", "libx265", "mpeg4", "mpeg2video", "mpeg1video"}
STATES_ITS_SIZE = {
    "mp4",
    "mov",
    "3gp",
    "mkv",
    "webm",
    "avi",
    "flv",
    "wmv",
    "ogv",
    "gif",
    "ts",
    "mpg",
}
"""Containers in which a file that ends early can be distinguished from a shorter one."""


@dataclass(frozen=True)
class Odd:
    """One file to make.

    `verdict`: "shown" (its frames are given, and right), "refused", or "either". `numbers` and
    `seconds`: what it shows, and when; `rate`: frames a second of the source. `checked`: the codec
    notices damage, so a frame that is given must be right.
    """

    name: str
    make: Callable[[Path], Path]
    verdict: str = "shown"
    numbers: Sequence[int] = range(COUNT)
    seconds: Sequence[float] | None = None
    rate: float = FPS
    checked: bool = False

    def is_exact(self) -> bool:
        """Whether its pixels are the same each time; damage may show what was in memory before."""
        return self.verdict != "either" or self.checked

    def times(self) -> list[float]:
        first = self.numbers[0]
        return list(self.seconds or [(n - first) / self.rate for n in self.numbers])


def pairs() -> list[Odd]:
    """Each container with each codec: whole, with B-frames, copied in part, and with each fault."""
    odd: list[Odd] = []
    for box, codec in PAIRS:
        name, whole, rate = f"{box}-{codec}", _pair(box, codec), _rate(codec)
        odd.append(Odd(f"{name}-whole", whole, rate=rate))
        if codec in B_FRAMES:
            b_frames = ("-bf", "2") if codec != "libx265" else ()
            odd.append(Odd(f"{name}-b-frames", _pair(box, codec, *b_frames), rate=rate))
        for share in (0.4, 0.7, 0.97):
            verdict = "refused" if box in STATES_ITS_SIZE else "either"
            odd.append(Odd(f"{name}-cut-{share}", _after(whole, _cut(share)), verdict, rate=rate))
        for fault, change in FAULTS.items():
            checked = (fault == "tail" and box != "nut") or codec == "libx264"
            made = _after(whole, change)
            odd.append(Odd(f"{name}-{fault}", made, "either", rate=rate, checked=checked))
        part = _copied(whole, box)
        odd.append(Odd(f"{name}-copied-part", part, "either", rate=rate, checked=True))
    return odd


def _rate(codec: str) -> float:
    return 25.0 if codec in ("mpeg1video", "mpeg2video") else float(FPS)


def _pair(box: str, codec: str, *options: str) -> Callable[[Path], Path]:
    rate = f"{_rate(codec):g}"  # old codecs know a few rates only
    return lambda path: encode(path.with_suffix(f".{box}"), codec, *options, fps=rate)


def _after(make: Callable[[Path], Path], fault: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def broken(path: Path) -> Path:
        made = make(path)
        made.write_bytes(fault(made.read_bytes()))
        return made

    return broken


def _cut(share: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(len(data) * share) | 1]  # odd: no container ends its parts there


def _filled(data: bytes, filler: bytes) -> bytes:
    place = int(len(data) * 0.55)
    return data[:place] + filler + data[place + len(filler) :]


def _flipped(data: bytes) -> bytes:
    changed = bytearray(data)
    for place in np.random.default_rng(1).integers(40, len(data), 6):
        changed[place] ^= 0x10
    return bytes(changed)


FAULTS: dict[str, Callable[[bytes], bytes]] = {
    "zeros": lambda data: _filled(data, bytes(max(len(data) // 20, 64))),
    "noise": lambda data: _filled(data, np.random.default_rng(0).bytes(max(len(data) // 20, 64))),
    "flipped": _flipped,
    "tail": lambda data: data + b"\n<!-- appended by a web server -->\n",
}


def _copied(make: Callable[[Path], Path], box: str) -> Callable[[Path], Path]:
    def part(path: Path) -> Path:
        whole = make(path.with_name(f"{path.stem}-source"))
        target = path.with_suffix(f".{box}")
        ffmpeg("-ss", "1.1", "-i", str(whole), "-t", "1.2", "-c", "copy", str(target))
        return target

    return part


SOUND = ("-f", "lavfi", "-i", "sine=frequency=300:duration=4:sample_rate=44100")
STAMPS = [0, 40, 80, 200, 240, 900, 940, 2000, 2040, 2080, 4500, 4540, 5000, 5040, 7000, 7040]
"""Milliseconds of an uneven file."""


def special() -> list[Odd]:
    """Single oddities that no table of containers and codecs has."""
    uneven_times = {"numbers": range(len(STAMPS)), "seconds": [ms / 1000 for ms in STAMPS]}
    late = {"seconds": [2 + n / FPS for n in range(COUNT)]}
    files = [
        Odd("uneven-mp4", lambda p: uneven(p.with_suffix(".mp4")), **uneven_times),
        Odd("uneven-mkv", lambda p: uneven(p.with_suffix(".mkv")), **uneven_times),
        Odd("uneven-webm", lambda p: uneven(p.with_suffix(".webm"), "libvpx"), **uneven_times),
        Odd("open-gop-h264", _h264("-x264-params", "open-gop=1:scenecut=0", "-bf", "3")),
        Odd("intra-refresh", _h264("-x264-params", "intra-refresh=1:keyint=12")),
        Odd("one-key", _h264("-g", "999")),
        Odd("interlaced", _h264("-flags", "+ildct+ilme", "-x264-params", "tff=1")),
        Odd("fragments", _h264("-movflags", "frag_keyframe+empty_moov+default_base_moof")),
        Odd("faststart", _h264("-movflags", "faststart")),
        Odd("negative-cts", _h264("-bf", "2", "-movflags", "negative_cts_offsets")),
        Odd("no-edit-list", _h264("-bf", "2", "-use_editlist", "0")),
        Odd("ten-bit", _h264("-pix_fmt", "yuv420p10le")),
        Odd("full-chroma", _h264("-pix_fmt", "yuv444p")),
        Odd("full-range", _h264("-pix_fmt", "yuvj420p")),
        Odd("gray", _h264("-pix_fmt", "gray")),
        Odd("film", lambda p: encode(p.with_suffix(".mp4"), fps="24000/1001"), rate=24 / 1.001),
        Odd(
            "slow",
            lambda p: encode(p.with_suffix(".mp4"), fps="1/2", count=9),
            numbers=range(9),
            rate=0.5,
        ),
        Odd("thousand", lambda p: encode(p.with_suffix(".mp4"), fps="1000"), rate=1000),
        Odd("late-picture", lambda p: _sounding(p.with_suffix(".mp4"), LATE), **late),
        Odd("late-picture-mkv", lambda p: _sounding(p.with_suffix(".mkv"), LATE), **late),
        Odd("with-sound", lambda p: _sounding(p.with_suffix(".mp4"))),
        Odd("cover", _cover),
        Odd("two-pictures", _two_pictures),
        Odd("sound-only", _sound_only, "refused"),
        Odd("cover-only", _cover_only, "refused"),
        Odd("latin-1", _latin1),
        Odd("trimmed-tail", lambda p: trimmed(p, 0.0, 1.5), numbers=range(18)),
        Odd("trimmed-head", lambda p: trimmed(p, 1.0, None), numbers=range(12, COUNT)),
        Odd("trimmed-both", lambda p: trimmed(p, 0.75, 2.0), numbers=range(9, 24)),
        Odd("headless-ts", _headless, "either", checked=True),
        Odd("joined-ts", _joined, "refused"),
        Odd("wrapped-ts", _wrapped),
        Odd("same-stamps", _same_stamps, numbers=range(8), seconds=[s / 1000 for s in SAME]),
        Odd("raw-h264", lambda p: encode(p.with_suffix(".h264")), "refused"),
        Odd("one-frame", lambda p: encode(p.with_suffix(".mp4"), count=1), numbers=range(1)),
        Odd("hidden-vp8", _hidden),
        Odd(
            "packed-xvid", lambda p: encode(p.with_suffix(".avi"), "libxvid", "-bf", "2"), "packed"
        ),
    ]
    sizes = [(63, 95), (64, 98), (66, 96), (96, 64), (50, 200)]
    files += [
        Odd(f"size-{h}x{w}", lambda p, s=(h, w): encode(p.with_suffix(".mkv"), "ffv1", size=s))
        for h, w in sizes
    ]
    files += [Odd(f"turned-{name}", lambda p, n=name: turned(p, n)) for name in MATRICES]
    return files


LATE = ("-vf", "setpts=PTS+2/TB", "-fps_mode", "passthrough")
SAME = [0, 40, 40, 80, 120, 120, 160, 200]


def _h264(*options: str) -> Callable[[Path], Path]:
    return lambda path: encode(path.with_suffix(".mp4"), "libx264", *options)


def uneven(path: Path, codec: str = "libx264", stamps: list[int] = STAMPS) -> Path:
    """A file whose frame n is shown at stamps[n] ms."""
    times = "+".join(f"eq(N\\,{i})*{ms}" for i, ms in enumerate(stamps))
    options = ("-vf", f"setpts=({times})/1000/TB", "-fps_mode", "passthrough")
    return encode(path, codec, *options, "-enc_time_base", "1/1000", count=len(stamps), fps="1000")


def _sounding(path: Path, options: tuple[str, ...] = ()) -> Path:
    maps = ("-map", "0:v", "-map", "1:a", "-c:a", "aac")
    return encode(path, "libx264", *maps, *options, inputs=SOUND)


def _cover(path: Path) -> Path:
    whole, cover = encode(path.with_name("moving.mp4")), path.with_name("cover.png")
    ffmpeg("-f", "lavfi", "-i", "color=red:s=300x200", "-frames:v", "1", str(cover))
    target = path.with_suffix(".mp4")
    maps = ("-map", "1", "-map", "0", "-c", "copy", "-disposition:v:0", "attached_pic")
    ffmpeg("-i", str(whole), "-i", str(cover), *maps, str(target))
    return target


def _cover_only(path: Path) -> Path:
    cover, target = path.with_name("cover.png"), path.with_suffix(".m4a")
    ffmpeg("-f", "lavfi", "-i", "color=red:s=300x200", "-frames:v", "1", str(cover))
    maps = ("-map", "0", "-map", "1", "-c:v", "copy", "-disposition:v:0", "attached_pic")
    ffmpeg(*SOUND, "-i", str(cover), *maps, "-f", "mp4", str(target))
    return target


def _two_pictures(path: Path) -> Path:
    whole, target = encode(path.with_name("moving.mp4")), path.with_suffix(".mkv")
    small = ("-f", "lavfi", "-i", "color=red:s=32x32:r=5:d=3")
    maps = ("-map", "0:v", "-map", "1:v", "-c:v:0", "copy", "-c:v:1", "libx264")
    ffmpeg("-i", str(whole), *small, *maps, "-disposition:v:0", "default", str(target))
    return target


def _sound_only(path: Path) -> Path:
    target = path.with_suffix(".mp4")
    ffmpeg(*SOUND, "-c:a", "aac", str(target))
    return target


def _latin1(path: Path) -> Path:
    made = encode(path.with_suffix(".mp4"), "libx264", "-metadata", "title=Cafe in Zurich")
    made.write_bytes(made.read_bytes().replace(b"Cafe in Zurich", b"Caf\xe9 in Z\xfcrich"))
    return made


def trimmed(path: Path, begin: float, end: float | None) -> Path:
    """An mp4 whose edit list shows the seconds from `begin` to `end` of it."""
    made = encode(path.with_suffix(".mp4"), "libx264", "-bf", "0", "-video_track_timescale", "1200")
    data = bytearray(made.read_bytes())
    scale = int.from_bytes(data[(place := data.index(b"mvhd") + 16) : place + 4], "big")
    length = (COUNT / FPS if end is None else end) - begin
    place = data.index(b"elst") + 4 + 4 + 4
    data[place : place + 4] = int(length * scale).to_bytes(4, "big")
    data[place + 4 : place + 8] = int(begin * 1200).to_bytes(4, "big")
    made.write_bytes(data)
    return made


def _headless(path: Path) -> Path:
    whole = encode(path.with_name("whole.ts"))
    target = path.with_suffix(".ts")
    data = whole.read_bytes()
    target.write_bytes(data[len(data) // 3 // 188 * 188 :])
    return target


def _joined(path: Path) -> Path:
    whole = encode(path.with_name("whole.ts")).read_bytes()
    target = path.with_suffix(".ts")
    target.write_bytes(whole + whole)  # the second half's stamps begin again
    return target


def _wrapped(path: Path) -> Path:
    offset = str(2**33 / 90000 - 1.5)  # the stamps pass 2^33 within the file
    target = path.with_suffix(".ts")
    return encode(target, "libx264", "-output_ts_offset", offset, "-muxdelay", "0")


def _same_stamps(path: Path) -> Path:
    made = uneven(path.with_suffix(".mp4"), "mpeg4", [0, 40, 50, 80, 120, 130, 160, 200])
    # The muxer refuses equal stamps, so they are written into the table of durations: 40, 10, 30.
    data = made.read_bytes()
    place = data.index(b"stts") + 8
    count = int.from_bytes(data[place : place + 4], "big")
    steps = np.frombuffer(data, ">u4", 2 * count, place + 4).reshape(count, 2).copy()
    unit = int(steps[1, 1]) // 10
    moved = {10 * unit: 0, 30 * unit: 40 * unit}
    steps[:, 1] = [moved.get(int(step), int(step)) for step in steps[:, 1]]
    made.write_bytes(data[: place + 4] + steps.tobytes() + data[place + 4 + 8 * count :])
    return made


def _hidden(path: Path) -> Path:
    options = ("-auto-alt-ref", "1", "-lag-in-frames", "16", "-arnr-strength", "5")
    return encode(path.with_suffix(".webm"), "libvpx", *options)


MATRICES = {
    "0": (1, 0, 0, 1),
    "90": (0, 1, -1, 0),
    "180": (-1, 0, 0, -1),
    "270": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "flipped": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transversed": (0, -1, -1, 0),
}
"""(a, b, c, d) of display matrices: x' = a x + c y, y' = b x + d y."""


def stored(upright: np.ndarray, name: str) -> np.ndarray:
    """The frame that the display matrix `name` shows as `upright`."""
    a, b, c, d = MATRICES[name]
    # Pixel (x, y) of the stored frame is shown at (a x + c y, b x + d y), moved into the frame.
    if a:
        return upright[:: 1 if d > 0 else -1, :: 1 if a > 0 else -1]
    return upright[:: 1 if b > 0 else -1, :: 1 if c > 0 else -1].transpose(1, 0, 2)


def write_matrix(path: Path, name: str) -> None:
    """Write a display matrix into the track header of an mp4."""
    a, b, c, d = MATRICES[name]
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44  # 16.16 fixed point, the last column 2.30
    matrix = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    data[place : place + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in matrix)
    path.write_bytes(data)


def turned(path: Path, name: str) -> Path:
    """An mp4 that is upright only by its display matrix."""
    height, width = stored(picture(0), name).shape[:2]
    target = path.with_suffix(".mp4")
    size = ("-s", f"{width}x{height}", "-r", str(FPS))
    options = ("-c:v", "libx264", "-crf", "12", "-pix_fmt", "yuv420p", "-g", str(GOP))
    frames = (np.ascontiguousarray(stored(picture(i), name)) for i in range(COUNT))
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", *size, "-i", "-")
    ffmpeg(*raw, *options, str(target), frames=frames)
    write_matrix(target, name)
    return target


def probed(path: Path) -> list[float]:
    """ffprobe's seconds of the frames that a player shows, in the order of showing."""
    entries = ("-show_entries", "frame=best_effort_timestamp_time", "-of", "json")
    command = ["ffprobe", "-v", "error", "-select_streams", "V:0", *entries, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    frames = json.loads(done.stdout or "{}").get("frames", [])
    return [float(frame.get("best_effort_timestamp_time", "nan")) for frame in frames]
