"""Which frames a file shows, and when: files written by PyAV, frames judged by their numbers."""

import logging
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import odd_media
import pytest
from PIL import Image

from vcr1_fast.data import decode
from vcr1_fast.data.decode import BACKENDS, open_source
from vcr1_fast.data.frame_folder import frame_names
from vcr1_fast.data.media_file import NeedsPyav, VideoError
from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.timeline import Packets, _check_whole, _rate, _zero, is_even, read_timeline
from vcr1_fast.data.truncation import cut_off
from vcr1_fast.data.video import ClipReader, ClipRequest, probe, probe_all, read_clip

av = pytest.importorskip("av")
pytest.importorskip("decord")

EVERY = FrameConfig(fps=1e5, max_frames=100_000)
COUNT = 36
QUALITY = {"libx264": {"crf": "12"}, "libvpx": {"b": "2000000"}, "libsvtav1": {"crf": "20"}}


def write(
    path: Path,
    codec: str = "libx264",
    *,
    stamps=None,
    fps: int = 10,
    title: str = "",
    sound: bool = False,
    frames=None,
    **options: str,
) -> str:
    """Numbered frames in a file of any container; `stamps` in ms; `sound` from second 0."""
    frames = [odd_media.picture(i) for i in range(COUNT)] if frames is None else frames
    with av.open(str(path), "w") as container:
        container.metadata["title"] = title
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        quality = QUALITY.get(codec, {"qmin": "2", "qmax": "2"})
        stream.options = {**quality, "g": "9", "threads": "1", **options}
        if codec not in ("libx264", "libsvtav1"):
            stream.codec_context.time_base = Fraction(1, fps)
        if sound:
            voice = container.add_stream("aac", rate=8000)
            for at in range(0, 8000 * 5, 1024):
                part = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                part.rate, part.pts, part.time_base = 8000, at, Fraction(1, 8000)
                container.mux(voice.encode(part))
            container.mux(voice.encode())
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = i * 1000 // fps if stamps is None else stamps[i]
            frame.time_base = Fraction(1, 1000)
            if codec not in ("libx264", "libsvtav1"):
                frame.pts, frame.time_base = i, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def numbers(clip) -> list[int | None]:
    return [odd_media.number(frame) for frame in clip.frames]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_metadata_in_any_encoding(tmp_path, backend, suffix):
    codec = "mpeg4" if suffix == "avi" else "libx264"
    path = Path(write(tmp_path / f"v.{suffix}", codec, title="Cafe in Zurich"))
    data = path.read_bytes()
    assert b"Cafe in Zurich" in data
    path.write_bytes(data.replace(b"Cafe in Zurich", b"Caf\xe9 in Z\xfcrich"))
    assert numbers(read_clip(str(path), FrameConfig(num_frames=4), backend=backend))[0] == 0


def with_edit_list(path: Path, begin_ms: int, length_ms: int) -> str:
    """Frames 0 .. COUNT - 1 at 10 a second, of which an edit list shows a part."""
    write(path, bf="0")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        ticks = int(1 / container.streams.video[0].time_base)
    at = data.index(b"mvhd") + 16
    scale = int.from_bytes(data[at : at + 4], "big")
    at = data.index(b"elst") + 12
    data[at : at + 4] = (length_ms * scale // 1000).to_bytes(4, "big")
    data[at + 4 : at + 8] = (begin_ms * ticks // 1000).to_bytes(4, "big")
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_edit_lists_at_both_ends(tmp_path, backend):
    for begin, length in ((0, 1500), (700, 2900), (700, 1500), (1300, 1000)):
        path = with_edit_list(tmp_path / "v.mp4", begin, length)
        first, count = begin // 100, length // 100
        info = probe(path, backend=backend)
        assert (info.frames, info.duration) == (count, pytest.approx(length / 1000))
        with open_source(path, backend) as source:
            frames = source.read(np.arange(count), lambda frame: frame)
        assert [odd_media.number(f) for f in frames] == list(range(first, first + count))
        clip = read_clip(path, times=[0, 0.52, 0.98], backend=backend)
        assert numbers(clip) == [first, first + 5, first + 10 - (length == 1000)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_picture_that_starts_after_the_sound(tmp_path, backend):
    stamps = [2000 + 100 * i for i in range(COUNT)]
    for suffix in ("mp4", "mkv"):
        path = write(tmp_path / f"v.{suffix}", stamps=stamps, sound=True)
        clip = read_clip(path, EVERY, start=3.0, end=4.0, backend=backend)
        assert numbers(clip)[:3] == [10, 11, 12] and clip.start == 3.0
        assert clip.times[0] == pytest.approx(0, abs=2e-3)
        assert probe(path, backend=backend).duration == pytest.approx(5.6, abs=0.01)
        whole = read_clip(path, FrameConfig(fps=2), backend=backend)
        given = np.arange(len(whole.frames)) / whole.fps
        late = given >= 2.0
        expected = ((given[late] - 2 + 2e-3) * 10).astype(int).tolist()
        assert [n for n, shown in zip(numbers(whole), late, strict=True) if shown] == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("codec", "options"),
    [("mpeg4", {"bf": "2"}), ("libx264", {"bf": "3"}), ("libx264", {"bf": "0"})],
)
def test_avi_has_no_stamps_and_its_frames_come_in_order(tmp_path, backend, codec, options):
    path = write(tmp_path / "v.avi", codec, **options)
    with open_source(path, backend) as source:
        frames = source.read(np.arange(len(source.timestamps)), lambda frame: frame)
        np.testing.assert_allclose(source.timestamps, np.arange(COUNT) / 10, atol=1e-9)
    assert [odd_media.number(f) for f in frames] == list(range(COUNT))
    assert probe(path, backend=backend).duration == pytest.approx(3.6)
    assert numbers(read_clip(path, EVERY, start=0.5, end=1.5, backend=backend))[:3] == [5, 6, 7]
    assert numbers(read_clip(path, times=[0.0, 1.72, 3.5], backend=backend)) == [0, 17, 35]


SCREEN = [*(33 * i for i in range(20)), *(2000 * i for i in range(1, 17))]
"""ms: a screen recording that stands still after its first second."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["linspace", "hf"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_uneven_frames_are_sampled_in_time(tmp_path, backend, rule, suffix):
    path = write(tmp_path / f"v.{suffix}", stamps=SCREEN, fps=30)
    clip = read_clip(path, FrameConfig(rule=rule), backend=backend)
    given = np.arange(len(clip.frames)) / clip.fps
    on_screen = np.searchsorted(np.array(SCREEN) / 1000, given + 2e-3, side="right") - 1
    assert numbers(clip) == on_screen.tolist()
    np.testing.assert_allclose(clip.times, given, atol=2e-3)
    assert len(clip.frames) / clip.fps == pytest.approx(32, abs=2)
    if rule == "linspace":  # from the first frame to the last one
        assert given[-1] == pytest.approx(32, abs=2e-3) and numbers(clip)[-1] == COUNT - 1
    # From 9 s on the frame of 8 s is on screen, though it came before the part began.
    part = read_clip(
        path, FrameConfig(num_frames=4, rule=rule), start=9.0, end=21.0, backend=backend
    )
    assert numbers(part)[0] == 23 and part.times[0] == 0
    # The first second is even, and sampled as an even file is.
    part = read_clip(path, FrameConfig(num_frames=4), end=0.62, backend=backend)
    assert numbers(part) == [0, 6, 12, 18] or numbers(part) == [0, 6, 13, 19]


def test_a_nominal_rate_that_is_absurd_is_measured_instead(tmp_path):
    path = write(tmp_path / "v.webm", "libvpx", fps=10)
    data = Path(path).read_bytes()
    timeline = read_timeline(path)
    assert timeline.fps == pytest.approx(10) and len(timeline) == COUNT
    assert data.count(b"V_VP8") == 1
    stamps = np.arange(12) / 3.0
    assert is_even(stamps, 3.0) and not is_even(stamps, 1000.0)
    assert is_even(stamps + 0.3, 3.0, begin=0.0) and not is_even(stamps + 0.7, 3.0, begin=0.0)
    # One dropped frame leaves a file even; a second that stands still does not.
    assert is_even(np.delete(stamps, 5), 3.0) and not is_even(np.delete(stamps, [4, 5, 6, 7]), 3.0)


def test_a_rate_is_the_containers_unless_its_stamps_contradict_it():
    stamps = (np.arange(100) * 1001 / 24000).round(3)
    assert _rate("v", stamps, 24000 / 1001) == 24000 / 1001
    assert _rate("v", stamps, 1000.0) == pytest.approx(24000 / 1001, rel=1e-4)
    assert _rate("v", stamps, 25.0) == pytest.approx(24000 / 1001, rel=1e-4)
    assert _rate("v", stamps, 0.0) == pytest.approx(24000 / 1001, rel=1e-4)
    with pytest.raises(VideoError, match="same time stamp"):
        _rate("v", np.zeros(3), 25.0)
    with pytest.raises(VideoError, match="frame rate is unknown"):
        _rate("v", np.zeros(1), 0.0)


@pytest.mark.parametrize(
    ("starts", "zero"),
    [
        ((2.0, 0.0), 0.0),
        ((2.0, 0.017), 0.0),
        ((0.0, -0.021), 0.0),
        ((1.48, 1.4), 1.4),
        ((0.5,), 0.5),
    ],
)
def test_seconds_count_from_the_first_stream(starts, zero):
    base = Fraction(1, 1000)
    streams = [SimpleNamespace(start_time=s * 1000, time_base=base) for s in (*starts,)]
    unknown = SimpleNamespace(start_time=None, time_base=base)
    of_kinds = SimpleNamespace(video=streams[:1], audio=[*streams[1:], unknown])
    assert _zero(SimpleNamespace(streams=of_kinds), 0.1) == pytest.approx(zero)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", odd_media.MATRICES)
def test_display_matrices_turn_and_mirror(tmp_path, backend, name):
    frames = [odd_media.stored(odd_media.picture(i), name) for i in range(12)]
    path = write(tmp_path / "v.mp4", frames=frames)
    odd_media.write_matrix(Path(path), name)
    clip = read_clip(path, FrameConfig(num_frames=4), backend=backend)
    assert numbers(clip) == [0, 4, 7, 11]
    assert {odd_media.corners(frame) for frame in clip.frames} == {"RGYB"}
    assert clip.frames.shape == (4, odd_media.HEIGHT, odd_media.WIDTH, 3)
    assert clip.frames.flags.c_contiguous


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        ("mp4", "libx264"),
        ("mov", "mpeg4"),
        ("mkv", "libx264"),
        ("webm", "libvpx"),
        ("avi", "mpeg4"),
        ("flv", "flv"),
        ("wmv", "wmv2"),
        ("ts", "libx264"),
        ("mpg", "mpeg2video"),
        ("vob", "mpeg2video"),
        ("gif", "gif"),
    ],
)
def test_files_that_end_early_are_reported(tmp_path, suffix, codec):
    if codec == "gif":
        images = [Image.fromarray(odd_media.picture(i)) for i in range(12)]
        path = tmp_path / "v.gif"
        images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    else:
        path = Path(write(tmp_path / f"v.{suffix}", codec))
    whole = path.read_bytes()
    assert cut_off(str(path)) is None and len(read_timeline(str(path))) >= 12
    for share in np.linspace(0.15, 0.999, 12):
        path.write_bytes(whole[: int(len(whole) * share) // 4 * 4 + 1])
        for backend in BACKENDS:
            with pytest.raises(
                VideoError, match=r"cut off|cannot open|no video frames|cannot read"
            ):
                read_clip(str(path), FrameConfig(num_frames=2), backend=backend)
    path.write_bytes(whole + b"\n<!-- appended by a server -->\n")
    if suffix not in (
        "ts",
        "gif",
    ):  # these look like a packet or picture cut in two
        assert cut_off(str(path)) is None


def test_the_end_of_a_program_stream(tmp_path):
    """Packets written by hand, as ISO 13818-1 and ISO 11172-1 have them."""
    start, path = b"\0\0\1", tmp_path / "v.mpg"
    packs = [
        start + b"\xba" + b"\x44" + bytes(8) + b"\xfa" + b"\xff\xff",  # two bytes of stuffing
        start + b"\xba" + b"\x21" + bytes(7),  # MPEG-1
    ]
    packet = start + b"\xe0" + (300).to_bytes(2, "big") + bytes(range(1, 151)) * 2
    for pack in packs:
        whole = pack + packet + packet
        for ending in (b"", start + b"\xb9", bytes(500), b"what a server appended"):
            path.write_bytes(whole + ending)
            assert cut_off(str(path)) is None, ending
        for left in range(len(pack) + len(packet) + 4, len(whole)):
            path.write_bytes(whole[:left])
            missing = max(len(whole) - left, 6 - (left - len(pack) - len(packet)))
            if left - len(pack) - len(packet) < 6:  # its length is not there either
                missing = 6 - (left - len(pack) - len(packet))
            assert cut_off(str(path)) == f"its last packet lacks {missing} bytes"
    # What looks like a pack header inside a packet leads nowhere.
    false = (
        start + b"\xe0" + (200).to_bytes(2, "big") + packs[0] + bytes([7] * (200 - len(packs[0])))
    )
    path.write_bytes(packs[0] + packet * 2000 + false)
    assert cut_off(str(path)) is None


def test_holes_in_matroska_are_reported(tmp_path):
    path = Path(write(tmp_path / "v.mkv"))
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(400) + whole[middle + 400 :])
    with pytest.raises(VideoError, match=r"cut off or damaged: (no element|an element)"):
        read_timeline(str(path))


def test_a_damaged_frame_spoils_those_that_refer_to_it(tmp_path):
    path = Path(write(tmp_path / "v.mp4", bf="0", g="12", sc_threshold="0"))
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    position, size = packets[15]
    noise = np.random.default_rng(3).bytes(size - 6)
    data[position + 6 : position + size] = noise
    path.write_bytes(data)
    for backend in ("pyav",):
        good = read_clip(str(path), times=[0.0, 1.1, 2.4, 3.5], backend=backend)
        assert numbers(good) == [0, 11, 24, 35]
        with pytest.raises(VideoError, match="decode"):
            read_clip(str(path), times=[0.0, 2.2], backend=backend)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("b_frames", ["0", "3"])
def test_only_the_frames_that_are_needed_are_decoded(tmp_path, monkeypatch, suffix, b_frames):
    path = write(tmp_path / f"v.{suffix}", sc_threshold="0", bf=b_frames, **{"b-pyramid": "none"})
    keep, seen = decode._keep, []

    def counted(frame, *more):
        seen.append(odd_media.number(frame.to_ndarray(format="rgb24")))
        return keep(frame, *more)

    monkeypatch.setattr(decode, "_keep", counted)
    clip = read_clip(path, times=[2.0], backend="pyav")  # GOPs of 9 begin at 18 and 27
    assert numbers(clip) == [20] and min(seen) == 18
    assert len(seen) <= (3 if b_frames == "0" else 6)
    seen.clear()
    assert numbers(read_clip(path, times=[0.1, 3.5], backend="pyav")) == [1, 35]
    assert not set(seen) & set(range(9, 27))
    seen.clear()
    assert numbers(read_clip(path, times=[3.5], backend="pyav")) == [35]
    references = {"0": 9, "3": 5}  # of the last GOP; nothing refers to its B-frames
    assert len(seen) <= references[b_frames]


def test_codecs_that_decord_lacks_go_to_pyav_and_the_log_says_so(tmp_path, caplog):
    path = write(tmp_path / "v.mp4", "libsvtav1", preset="12")
    assert numbers(read_clip(path, times=[0.0, 1.5], backend="pyav")) == [0, 15]
    with pytest.raises(NeedsPyav, match=r'v\.mp4: .*av1; use backend="pyav"'):
        read_clip(path, times=[0.0, 1.5], backend="decord")
    stream = write(tmp_path / "v.ts")
    with caplog.at_level(logging.WARNING), ClipReader(backend="decord", workers=0) as reader:
        clips = list(reader.read([ClipRequest(p, times=(0.0, 1.5)) for p in (path, stream)]))
    assert [numbers(clip) for clip in clips] == [[0, 15], [0, 15]]
    assert "av1" in caplog.text and "mpegts" in caplog.text and "read by PyAV" in caplog.text
    infos = list(probe_all([(path, None), (stream, None)], backend="decord", workers=1))
    assert [info.frames for info in infos] == [COUNT, COUNT]


def test_streams_that_are_no_moving_picture(tmp_path):
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        voice = container.add_stream("aac", rate=8000)
        part = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        part.rate = 8000
        container.mux(voice.encode(part))
        container.mux(voice.encode())
    with pytest.raises(VideoError, match="holds no video frames"):
        read_timeline(str(path))
    (tmp_path / "v.txt").write_text("a text of some length\n" * 99)
    with pytest.raises(VideoError, match="cannot open it"):
        read_timeline(str(tmp_path / "v.txt"))


@pytest.mark.parametrize("pattern", ["{}.png", "frame_{}.png", "Frame {:d}.PNG", "{:06d}.png"])
def test_frame_folders_are_in_the_order_of_their_numbers(tmp_path, pattern):
    for i in (3, 0, 10, 1, 11, 7, 9, 5, 8, 2, 6, 4):
        Image.fromarray(odd_media.picture(i)).save(tmp_path / pattern.format(i), format="PNG")
    (tmp_path / "._1.png").write_bytes(b"a Finder's file")
    (tmp_path / "groundtruth.txt").write_text("1,2,3,4")
    assert numbers(read_clip(str(tmp_path), EVERY)) == list(range(12))


def test_strays_in_frame_folders_are_refused(tmp_path):
    def folder(*names: str) -> str:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        path.mkdir()
        for name in names:
            (path / name).write_bytes(b"")
        return str(path)

    assert frame_names(folder("2.jpg", "10.jpg", "6.jpg")) == ["2.jpg", "6.jpg", "10.jpg"]
    assert frame_names(folder("b7_2.jpg", "b7_1.jpg")) == ["b7_1.jpg", "b7_2.jpg"]
    assert frame_names(folder("0_59.jpg", "1_0.jpg")) == ["0_59.jpg", "1_0.jpg"]
    for names, reason in (
        (("1.jpg", "2.jpg", "cover.jpg"), "'cover.jpg' does not belong to the series of 2 frames"),
        (("1.jpg", "2.jpg", "3.png"), "'3.png' does not belong"),
        (("1.jpg", "01.jpg", "2.jpg"), "have the same number"),
        (("1.jpg", "2.jpg", "4.jpg"), "jump from number 2 to 4"),
        (("0.jpg", "5.jpg", "10.jpg", "11.jpg"), "jump from number 0 to 5"),
    ):
        with pytest.raises(VideoError, match=reason):
            frame_names(folder(*names))


def test_an_index_that_points_past_the_file_is_reported(tmp_path):
    path = Path(write(tmp_path / "v.mp4"))
    data = bytearray(path.read_bytes())
    place = data.index(b"stsz") + 16 + 4 * 20  # the size of sample 20: the later ones move
    data[place : place + 4] = (1 << 24).to_bytes(4, "big")
    path.write_bytes(data)
    with pytest.raises(VideoError, match=rf"damaged: \d+ of {COUNT} samples could be read"):
        read_timeline(str(path))


def test_leading_frames_of_an_open_gop_decode_from_the_key_before():
    """Decoding order I0 P2 B1 | I6 B4 B5 P8: frames 4 and 5 refer to what comes before I6."""
    pts = np.array([0, 2, 1, 6, 4, 5, 8])
    key = np.array([True, False, False, True, False, False, False])
    packets = Packets(pts, np.arange(7), key, np.ones(7, bool))
    assert [packets.entry(place) for place in range(7)] == [0, 0, 0, 3, 0, 0, 3]
    assert packets.places().tolist() == [0, 2, 1, 4, 5, 3, 6]
    # A stream that was cut there has no key before: decoding begins at the first packet.
    cut = Packets(pts[3:], np.arange(4), key[3:], np.ones(4, bool))
    assert [cut.entry(place) for place in range(4)] == [0, 0, 0, 0]


def test_an_incomplete_last_packet_is_reported():
    """Of a container whose size is written nowhere; FFmpeg marks the packet."""
    container = SimpleNamespace(format=SimpleNamespace(name="other"))
    stream = SimpleNamespace(index_entries=[], frames=0)
    whole, torn = (SimpleNamespace(corrupt=corrupt, dts=0) for corrupt in (False, True))
    _check_whole("v.x", container, stream, [torn, whole])  # damage within is found by decoding
    with pytest.raises(VideoError, match="its last packet is incomplete"):
        _check_whole("v.x", container, stream, [whole, torn])
