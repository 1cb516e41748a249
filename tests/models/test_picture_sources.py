"""Images as users have them: arrays, bytes, open files, dicts of ``datasets``, URLs."""

import base64
import io
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.store_samples import shipped
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.capturing.dataset import capture_dataset
from xmodal_interp.capturing.run import capture
from xmodal_interp.errors import InputError, quoted
from xmodal_interp.models import Video, open_image
from xmodal_interp.models.picture_sources import content_digest

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
PIXELS[0, :2] = ((0, 0, 0), (255, 255, 255))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a photo.png"
    Image.fromarray(PIXELS).save(path)
    return path


@pytest.fixture
def server(tmp_path: Path):
    """The URL of a server of ``tmp_path``, and the paths that were requested."""
    asked: list[str] = []

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}", asked
        served.shutdown()
        thread.join()


ARRAYS = {
    "bytes": PIXELS,
    "bytes, channels first": PIXELS.transpose(2, 0, 1),
    "tensor of bytes": torch.from_numpy(PIXELS).permute(2, 0, 1),
    "tensor, channels last": torch.from_numpy(PIXELS),
    "integers": PIXELS.astype(np.int64),
    "0 to 255": PIXELS.astype(np.float32),
    "0 to 255, between bytes": np.clip(PIXELS + np.float32(0.3), 0, 255),
    "0 to 1": PIXELS / 255,
    "tensor of 0 to 1": torch.from_numpy(PIXELS / 255).permute(2, 0, 1).float(),
    "half of 0 to 1": (torch.from_numpy(PIXELS) / 255).half(),
    "with a gradient": (torch.from_numpy(PIXELS) / 255).requires_grad_(),
}


@pytest.mark.parametrize("given", ARRAYS)
def test_arrays_are_the_picture_of_their_values(given: str) -> None:
    opened = open_image(ARRAYS[given])
    assert opened.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(opened), PIXELS)


def test_a_tensor_of_bfloat16_is_rounded() -> None:
    opened = open_image((torch.from_numpy(PIXELS) / 255).bfloat16())
    assert np.abs(np.asarray(opened).astype(int) - PIXELS).max() <= 1  # 8 bits of precision


@pytest.mark.parametrize("scale", [1, 255])
def test_grey_and_transparent_arrays(scale: int) -> None:
    grey = PIXELS[..., 0].astype(np.float64) / 255 * scale
    for shown in (grey, grey[None], grey[..., None]):
        opened = np.asarray(open_image(shown))
        np.testing.assert_array_equal(opened, np.repeat(PIXELS[..., :1], 3, 2))
    clear = np.dstack([PIXELS, np.full(PIXELS.shape[:2], 255)]) / 255 * scale
    clear[:5, :5, 3] = 0
    opened = np.asarray(open_image(clear))
    assert (opened[:5, :5] == 255).all()  # transparent pixels are white
    np.testing.assert_array_equal(opened[5:], PIXELS[5:])
    np.testing.assert_array_equal(np.asarray(open_image(grey > 2 * scale)), 0)
    np.testing.assert_array_equal(np.asarray(open_image(grey >= 0)), 255)


def test_sixteen_bits_of_colour_become_bytes_with_a_warning() -> None:
    with pytest.warns(
        UserWarning, match="Grey values of 16 bits are scaled so that 65535 is white"
    ):
        opened = open_image(PIXELS.astype(np.uint16) * 257)
    np.testing.assert_array_equal(np.asarray(opened), PIXELS)


RANGES = {
    "overshoot": (PIXELS / 255 * 1.2, "float64", "0 to 1.2, whose white may be 1 or 255"),
    "normalized": (PIXELS / 127.5 - 1, "float64", "-1 to 1, as after normalization"),
    "too large": (PIXELS * 2.0, "float64", "0 to 510, which are neither bytes nor from 0 to 1"),
    "a missing value": (
        np.where(PIXELS == 7, np.nan, PIXELS),
        "float64",
        "nan to nan, not all of which are finite",
    ),
    "a mask of integers": (PIXELS // 200, "int64", "0 to 1, whose white may be 1 or 255"),
    "bytes in 16 bits": (
        PIXELS.astype(np.uint16),
        "uint16",
        "0 to 255, whose white may be 255 or 65535",
    ),
}


@pytest.mark.parametrize("case", RANGES)
def test_an_array_of_unknown_range_is_refused(case: str) -> None:
    values, dtype, text = RANGES[case]
    with pytest.raises(InputError) as refusal:
        open_image(values.astype(dtype))
    assert str(refusal.value) == (
        f"The range of an array of {dtype} is not known: it has the values {text}. Convert it to "
        "bytes, 0 to 255 (np.uint8)."
    )


SHAPES = {
    (3, 40, 3): "may be [channel, row, col] or [row, col, channel]",
    (24, 40, 2): "has no channels",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_ambiguous_axes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as refusal:
        open_image(np.zeros(shape, np.uint8))
    assert str(refusal.value) == (
        f"An array of the shape {shape} {SHAPES[shape]}. Pass a PIL image, such as "
        "Image.fromarray(array) of bytes [row, col, channel] with 3 channels."
    )


@pytest.mark.parametrize("shape", [(1, 3, 24, 40), (40,), (0, 40, 3)])
def test_an_array_is_one_image(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as refusal:
        open_image(np.zeros(shape, np.uint8))
    assert str(refusal.value) == (
        "An array must be one image [row, col], [row, col, channel] or [channel, row, col]; got "
        f"the shape {shape}."
    )


def test_an_array_without_numbers_is_refused() -> None:
    with pytest.raises(InputError) as refusal:
        open_image(np.full((8, 8), "x"))
    assert str(refusal.value) == (
        "An array of pixels must hold numbers of one dtype; got <U1. Convert it to bytes, 0 to "
        "255: array.astype(np.uint8)."
    )


@pytest.mark.parametrize("scale", [1, 255])
def test_frames_have_the_range_of_the_whole_video(scale: int) -> None:
    """A dark frame of a clip of 0 to 255 has no value over 1. qwen-vl-utils 0.0.14 returns floats
    from 0 to 255, ``[frame, channel, row, col]``."""
    clip = np.stack([np.zeros_like(PIXELS), PIXELS])
    clip[0, :4] = 1
    floats = torch.from_numpy(clip).permute(0, 3, 1, 2).float() / 255 * scale
    for frames in (floats, list(floats), floats.numpy()):
        np.testing.assert_array_equal(Video(frames).opened().pixels(), clip)
    with pytest.raises(InputError) as refusal:
        Video(PIXELS)
    assert str(refusal.value) == (
        "An array of frames must have the axes [frame, row, col, channel] or [frame, channel, row, "
        "col]; got the shape (24, 40, 3)."
    )


def in_all_forms(file: Path, url: str) -> dict:
    content = file.read_bytes()
    return {
        "path": file,
        "string": str(file),
        "file URI": file.as_uri(),
        "bytes": content,
        "bytearray": bytearray(content),
        "memoryview": memoryview(content),
        "buffer": io.BytesIO(content),
        "data URI": f"data:image/png;base64,{base64.b64encode(content).decode()}",
        "URL": f"{url}/a%20photo.png",
        "dict of bytes": {"bytes": content, "path": None},
        "dict of both": {"bytes": content, "path": "another name.png"},
        "dict of a path": {"bytes": None, "path": str(file)},
    }


def test_one_file_in_all_forms_is_one_picture(file: Path, server) -> None:
    forms = in_all_forms(file, server[0])
    assert " " not in forms["file URI"]
    for form, given in forms.items():
        for _ in range(2):  # an open file can be read again
            assert np.array_equal(np.asarray(open_image(given)), PIXELS), form
        assert content_digest(given) == content_digest(file), form
    with file.open("rb") as opened:
        opened.seek(5)
        assert np.array_equal(np.asarray(open_image(opened)), PIXELS)
        assert opened.tell() == 5


def test_items_in_all_forms_are_the_same_sample(file: Path, server, tmp_path: Path) -> None:
    """The store notes a path only for local files. A URL is fetched once for each run."""
    url, requested = server
    forms = in_all_forms(file, url)
    asked = [{"name": name, "image": given, "prompt": QUESTION} for name, given in forms.items()]
    store = capture_dataset(shipped(), asked, tmp_path / "run", progress=False)
    assert requested == ["/a%20photo.png"]
    probs = store[0].probs()
    for sample in store:
        assert np.array_equal(np.asarray(sample.images[0]), PIXELS)
        assert torch.equal(sample.probs(), probs)
        local = sample.name in ("path", "string", "file URI", "dict of a path")
        assert sample.provenance["images"] == [str(file) if local else None]
    resumed = capture_dataset(shipped(), asked, tmp_path / "run", progress=False)
    assert len(resumed) == len(asked)
    assert len(requested) == 2


def test_capture_takes_an_array_and_a_url(file: Path, server) -> None:
    vlm = tiny_vlm("llava")
    expected = capture(vlm, file, QUESTION).probs()
    for given in (PIXELS, f"{server[0]}/a%20photo.png", [torch.from_numpy(PIXELS)]):
        assert torch.equal(capture(vlm, given, QUESTION).probs(), expected)


def test_urls_that_cannot_be_read(server) -> None:
    url = f"{server[0]}/nowhere.png"
    with pytest.raises(InputError) as missing:
        open_image(url)
    assert str(missing.value) == f"The image at {url!r} could not be fetched: 404 File not found."
    with pytest.raises(InputError, match=r"'http://127.0.0.1:1/x.png' could not be fetched: "):
        open_image("http://127.0.0.1:1/x.png")
    with pytest.raises(InputError, match=r"Pillow cannot read the image at 'http://127.*listing'"):
        open_image(f"{server[0]}/?listing")  # a page, not an image


REFUSED = {
    "no comma": (
        "data:image/png;base64",
        "The data URI 'data:image/png;base64' cannot be decoded: it has no comma. Write it as "
        "data:image/png;base64,...",
    ),
    "another host": (
        "file://elsewhere/photo.png",
        "'file://elsewhere/photo.png' is a file on the host 'elsewhere'. Write a local path as "
        "file:///folder/name.",
    ),
    "an empty dict": (
        {"bytes": None, "path": None},
        "The dict of an image must have the entry bytes or path; got the entries bytes, path, "
        "without a value in these.",
    ),
    "text": (
        io.StringIO("photo"),
        "The file of an image must be opened in binary mode; reading it gave a str.",
    ),
    "a number": (
        3,
        "An image must be a path, a URL, a PIL image, an array, the bytes of a file or a dict with "
        "bytes or path; got an object of int.",
    ),
}


@pytest.mark.usefixtures("any_type")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_picture_is_refused(case: str) -> None:
    given, message = REFUSED[case]
    with pytest.raises(InputError) as refusal:
        open_image(given)
    assert str(refusal.value) == message


def test_a_url_without_an_answer_is_refused(monkeypatch) -> None:
    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            waiting.wait(5)

        def log_message(self, *_) -> None:
            """Print nothing."""

    waiting = threading.Event()
    monkeypatch.setattr("xmodal_interp.models.picture_sources._TIMEOUT", 0.2)
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        with pytest.raises(InputError, match=r"could not be fetched: timed out\.$"):
            open_image(f"http://127.0.0.1:{served.server_port}/slow.png")
        waiting.set()
        served.shutdown()
        thread.join()


def test_pictures_that_pillow_cannot_read(file: Path, monkeypatch) -> None:
    closed = Image.open(file)
    closed.close()
    with pytest.raises(InputError, match=r"^Pillow cannot read an image given as PngImageFile: "):
        open_image(closed)
    cut = Image.open(io.BytesIO(file.read_bytes()[:1000]))
    with pytest.raises(InputError, match=r"given as PngImageFile: image file is truncated"):
        open_image(cut)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"^Pillow cannot read the image file '.*': Image size"):
        open_image(file)


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_colours_are_put_on_white(mode: str) -> None:
    plain = {"RGBa": "RGBA", "La": "LA"}[mode]
    shown = Image.new("RGBA", (8, 8), (200, 30, 30, 128)).convert(plain)
    expected = np.asarray(open_image(shown)).astype(int)
    assert expected.min() > 100
    found = np.asarray(open_image(shown.convert(mode))).astype(int)
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "HSV", "YCbCr", "RGBX"])
def test_other_modes_are_converted_by_pillow(mode: str) -> None:
    shown = picture().convert(mode)
    assert np.array_equal(np.asarray(open_image(shown)), np.asarray(shown.convert("RGB")))


def test_the_first_picture_of_an_animation_is_used(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "clip.gif").getpixel((0, 0)) == (255, 0, 0)
    with Image.open(tmp_path / "clip.gif") as clip:
        clip.seek(1)
        assert open_image(clip).getpixel((0, 0)) == (0, 0, 255)  # the frame that it shows


def test_base64_without_a_scheme_is_an_error():
    text = "/9j/" + "A" * 300
    with pytest.raises(InputError) as refusal:
        open_image(text)
    assert str(refusal.value) == (
        f"{quoted(text)} is too long for a path (304 characters). If it is an image in base64, "
        "write data:image/png;base64, before it."
    )
    assert len(str(refusal.value)) < 400
