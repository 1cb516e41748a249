"""Opening images: grey values of any depth, EXIF orientation, transparency."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.helpers.real import real, settled
from tests.helpers.tiny import QUESTION, tiny_vlm
from xmodal_interp.capturing.run import capture
from xmodal_interp.errors import InputError
from xmodal_interp.models import VLM, Video, open_image
from xmodal_interp.models.processor_calls import composite_of

IN_16_BITS = pytest.mark.filterwarnings("ignore:Grey values of 16 bits are scaled:UserWarning")
RAMP = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
BYTES = np.rint(RAMP / 257)


def grey(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    values = np.asarray(image)
    assert (values == values[..., :1]).all()
    return values[..., 0]


@IN_16_BITS
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_of_a_file_become_bytes(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"ramp.{ending}"
    Image.fromarray(RAMP).save(path)
    for given in (path, Image.open(path)):
        np.testing.assert_array_equal(grey(open_image(given)), BYTES)


@IN_16_BITS
@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_sixteen_bits_in_memory_become_bytes(mode: str) -> None:
    raw = RAMP.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    image = Image.frombytes(mode, (64, 64), raw)
    assert image.mode == mode
    np.testing.assert_array_equal(grey(open_image(image)), BYTES)


@IN_16_BITS
def test_sixteen_bits_opened_as_32_bits_become_bytes(tmp_path: Path) -> None:
    path = tmp_path / "ramp.pgm"
    path.write_bytes(b"P5 64 64 65535\n" + RAMP.astype(">u2").tobytes())
    with Image.open(path) as opened:
        assert opened.mode == "I"
        np.testing.assert_array_equal(grey(open_image(opened)), BYTES)
    np.testing.assert_array_equal(grey(open_image(path)), BYTES)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_grey_values_of_an_unknown_range_are_refused(mode: str, tmp_path: Path) -> None:
    values = np.linspace(0, 1, 64).reshape(8, 8).astype({"F": np.float32, "I": np.int32}[mode])
    image = Image.fromarray(values)
    assert image.mode == mode
    image.save(tmp_path / "grey.tif")
    for given in (image, tmp_path / "grey.tif"):
        with pytest.raises(InputError) as refusal:
            open_image(given)
        assert str(refusal.value) == (
            f"The range of grey values of an image of mode {mode!r} is not known. Convert it "
            "first: Image.fromarray(array) of an array of np.uint8 [row, col], 0 to 255, or of "
            "np.uint16, 0 to 65535."
        )


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A photo with EXIF rotation: 40 x 20 in the file, 20 x 40 upright, with a white top."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :10] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[274] = 6
    image.save(tmp_path / "photo.png", exif=exif)
    return tmp_path / "photo.png"


def test_a_path_and_its_opened_image_are_the_same_picture(photo: Path) -> None:
    by_path, by_image = (
        capture(tiny_vlm("llava"), given, QUESTION) for given in (photo, Image.open(photo))
    )
    assert by_path.images[0].size == by_image.images[0].size == (20, 40)
    assert np.array_equal(by_path.images[0], by_image.images[0])
    assert by_path.tokens.equals(by_image.tokens)
    assert by_path.probs().equal(by_image.probs())


def test_no_image_is_rotated_twice(photo: Path) -> None:
    for given in (photo, Image.open(photo), Image.open(photo).convert("L")):
        once = open_image(given)
        assert once.size == (20, 40)
        assert np.asarray(once)[0].min() == 255
        assert np.asarray(once)[-1].max() == 0
        assert open_image(once) is once
        assert Video([once] * 2).opened().size == (20, 40)
        assert Video([given] * 2).opened().pixels().shape == (2, 40, 20, 3)


def test_values_of_twelve_bits_are_scaled_with_a_warning() -> None:
    """Pillow 12.3 and transformers 5.23 (``convert_to_rgb``) clip values above 255 to white."""
    values = np.linspace(0, 4095, 256).astype(np.uint16).reshape(16, 16)
    with pytest.warns(UserWarning, match=r"65535 is white; this image has the values 0 to 4095\."):
        opened = open_image(Image.fromarray(values))
    np.testing.assert_array_equal(grey(opened), np.rint(values / 257))
    clipped = Image.fromarray(values).convert("RGB")  # the alternative named in the warning
    assert np.asarray(open_image(clipped)).max() == 255


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl", "inkling2"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_pixels_of_transparent_images_are_those_of_transformers(
    mode: str, model_type: str, tmp_path: Path
) -> None:
    """Processors use a white background (``image_transforms.convert_to_rgb``), Inkling 2 uses a
    checkerboard. Pillow alone shows the hidden colour."""
    path = tmp_path / "shapes.png"
    colours = np.zeros((96, 96, 4), np.uint8)
    colours[:48] = (200, 30, 30, 255)
    colours[48:] = (0, 0, 0, 0)
    colours[40:56, 40:56] = (10, 200, 10, 128)
    image = Image.fromarray(colours)
    if mode == "P":
        shown = Image.fromarray((colours[..., 0] > 100).astype(np.uint8), mode="P")
        shown.putpalette([0, 0, 0, 200, 30, 30])
        shown.save(path, transparency=0)
    elif mode == "RGB":
        image.convert("RGB").save(path, transparency=(0, 0, 0))
    else:
        image.convert(mode).save(path)
    vlm = VLM(real(model_type)[0], settled(model_type))
    inputs, (prompt,) = vlm.prepare([[path]], ["what is it?"])
    with Image.open(path) as plain:
        theirs = vlm.processor(images=[[plain]], text=[prompt.text], return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], theirs["pixel_values"], atol=0, rtol=0)
    if model_type != "inkling2":
        assert np.asarray(prompt.images[0])[-1, 0].tolist() == [255, 255, 255]


def test_the_background_of_a_bare_image_processor() -> None:
    """The processor of a vision model is an image processor itself."""
    kind = getattr(transformers, "Inkling2ImageProcessor", None)
    if kind is None:
        pytest.skip("This release of transformers has no Inkling2ImageProcessor.")
    composite = composite_of(kind())
    assert composite is not None
    clear = Image.new("RGBA", (16, 16), (200, 0, 0, 0))
    assert np.unique(np.asarray(composite(clear))).tolist() == [153, 204]  # a checkerboard
    assert composite_of(transformers.ViTImageProcessor()) is None


@pytest.mark.parametrize("fps", [0, 0.0, float("inf")])
def test_a_rate_of_no_or_infinite_frames_per_second_is_an_error(fps) -> None:
    with pytest.raises(InputError) as refusal:
        Video([Image.new("RGB", (4, 4))], fps=fps)
    assert str(refusal.value) == (
        f"fps must be a finite number above 0; got {fps}. Leave it out if it is not known."
    )


def test_tensors_that_numpy_cannot_hold_are_errors() -> None:
    for tensor in (torch.zeros(4, 4).to_sparse(), torch.zeros(4, 4, device="meta")):
        with pytest.raises(InputError) as refusal:
            open_image(tensor)
        assert str(refusal.value) == (
            f"A tensor of torch.float32 on {tensor.device} ({tensor.layout}) cannot be read as an "
            "image. Convert it to bytes, 0 to 255: a dense tensor of torch.uint8 on the CPU."
        )
