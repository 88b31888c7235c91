"""Image files to pixels: orientation, transparency, other modes, and what is none."""

import io
import struct

import numpy as np
import pytest

from vcr1_fast.data.picture import read_picture
from vcr1_fast.data.video import ClipReader, ClipRequest, VideoError, read_image

Image = pytest.importorskip("PIL.Image")

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def test_pixels_as_they_are(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    got = read_picture(str(tmp_path / "a.png"))
    assert got.dtype == np.uint8 and np.array_equal(got, PIXELS)
    clip = read_image(str(tmp_path / "a.png"))
    assert np.array_equal(clip.frames, PIXELS[None])
    assert (clip.fps, clip.duration, clip.times.tolist()) == (None, None, [0.0])


# EXIF orientation -> what makes the stored picture upright (TIFF 6.0, tag 274)
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
    expected = UPRIGHT[orientation](PIXELS)
    assert np.array_equal(read_picture(str(tmp_path / "a.png")), expected)


def test_transparency_lies_over_white(tmp_path):
    alpha = np.full((6, 9, 1), 255, np.uint8)
    alpha[:3] = 0
    Image.fromarray(np.concatenate([PIXELS, alpha], 2)).save(tmp_path / "a.png")
    got = read_picture(str(tmp_path / "a.png"))
    assert (got[:3] == 255).all() and np.array_equal(got[3:], PIXELS[3:])


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK"])
def test_other_modes_become_rgb(tmp_path, mode):
    image = Image.fromarray(PIXELS).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    assert np.array_equal(read_picture(str(path)), np.array(image.convert("RGB")))


def bad_files(folder):
    good = io.BytesIO()
    Image.fromarray(PIXELS.repeat(20, 0).repeat(20, 1)).save(good, "JPEG")
    png = io.BytesIO()
    Image.fromarray(PIXELS).save(png, "PNG")
    broken = bytearray(png.getvalue())
    broken[8:12] = struct.pack(">I", 2**31 - 1)  # the length of the header chunk
    return {
        "empty": b"",
        "text": b"no picture",
        "cut off": good.getvalue()[:-900],
        "broken chunk": bytes(broken),
        "cut header": png.getvalue()[:20],
    }


def test_damaged_files_are_errors_that_name_them(tmp_path):
    for name, content in bad_files(tmp_path).items():
        path = tmp_path / f"{name}.jpg"
        path.write_bytes(content)
        with pytest.raises(VideoError, match="not a picture: ") as caught:
            read_image(str(path))
        assert caught.value.path == str(path) and "\n" not in str(caught.value), name
    with pytest.raises(VideoError, match="no such file"):
        read_image(str(tmp_path / "none.jpg"))
    with pytest.raises(VideoError, match="not a picture"):
        read_image(str(tmp_path))


def test_a_picture_of_too_many_pixels_is_an_error(tmp_path, monkeypatch):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    assert read_picture(str(tmp_path / "a.png")).shape == (6, 9, 3)  # 54: Pillow only warns
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(VideoError, match="54 pixels"):
        read_image(str(tmp_path / "a.png"))


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_read_images(tmp_path, workers):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    requests = [ClipRequest(str(tmp_path / name), is_image=True) for name in ("a.png", "b.png")]
    with ClipReader(workers=workers) as reader:
        good, bad = reader.read(requests)
    assert np.array_equal(good.frames, PIXELS[None]) and good.fps is None
    assert isinstance(bad, VideoError) and "b.png" in str(bad)
