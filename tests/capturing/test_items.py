"""Items of a data set: their entries, digests and errors."""

import numpy as np
import pytest

from tests.helpers.store_samples import items, shipped
from xmodal_interp.capturing.dataset import capture_dataset
from xmodal_interp.capturing.items import item_of
from xmodal_interp.errors import InputError
from xmodal_interp.store import open_store


def run(path, asked, **options):
    return capture_dataset(shipped(), asked, path, progress=False, **options)


def test_entries_of_an_item(tmp_path):
    image = items(1)[0]["image"]
    image.save(tmp_path / "scene.png")
    asked = [
        {
            "images": [tmp_path / "scene.png"],
            "question": "how many shapes ?",
            "id": 7,
            "split": "a",
        },
        {"image": image, "prompt": "how many shapes ?", "name": "b", "id": 8, "n": np.int64(3)},
        {"image": [], "prompt": "how many shapes ?"},
    ]
    store = run(tmp_path / "run", asked, images=False)
    assert store.names == ("7", "b", "item-000002")
    assert [each.labels for each in store] == [{"split": "a"}, {"id": 8, "n": 3}, {}]
    assert [len(each.images) for each in store] == [1, 0, 0]
    assert store[0].images[0].tobytes() == image.tobytes()
    assert store[0].provenance["images"] == [str(tmp_path / "scene.png")]
    assert store.manifest["settings"]["kept"]["images"] is False


PICTURE = items(1)[0]["image"]
UNUSABLE = {
    "no dict": ("a.png", "Item 0 is a str; it must be a dict with image and prompt."),
    "no image": (
        {"prompt": "?", "picture": 1},
        "Item 0 ('item-000000') has no 'image' or 'images' (its entries are prompt, picture). Give "
        "exactly one that is not None.",
    ),
    "two prompts": (
        {"image": PICTURE, "prompt": "?", "question": "?", "name": "x"},
        "Item 0 ('x') has both 'prompt' and 'question' (its entries are image, prompt, question, "
        "name). Give exactly one that is not None.",
    ),
    "wrong image": (
        {"image": 7, "prompt": "?"},
        "Item 0 ('item-000000'): An image must be a path, a URL, a PIL image, an array, the bytes "
        "of a file or a dict with bytes or path; got int.",
    ),
    "missing image": (
        {"image": "nowhere.png", "prompt": "?", "id": 5},
        "Item 0 ('5'): There is no image file 'nowhere.png'. Pass the path of an existing file, or "
        "a PIL image.",
    ),
    "empty prompt": (
        {"image": PICTURE, "prompt": " "},
        "Item 0 ('item-000000'): the prompt must be a non-empty string; got ' '.",
    ),
    "no json": (
        {"image": PICTURE, "prompt": "?", "words": {"a"}},
        "Item 0 ('item-000000'): JSON cannot represent a value that the store must keep: got {'a'} "
        "(set). Use strings, finite numbers, booleans, None, lists and dicts.",
    ),
    "unsafe name": (
        {"image": PICTURE, "prompt": "?", "name": "train/7"},
        "Item 0: 'train/7' is not a valid sample name: it contains '/'. Use up to 200 bytes of "
        'printable characters without " * / : < > ? \\ |, and no dot or space at either end.',
    ),
}


@pytest.mark.usefixtures("any_type")
@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_item(tmp_path, case):
    item, message = UNUSABLE[case]
    with pytest.raises(InputError) as refusal:
        run(tmp_path, [item])
    assert str(refusal.value) == message
    assert len(open_store(tmp_path)) == 0


def test_two_items_of_the_same_name(tmp_path):
    with pytest.raises(InputError) as refusal:
        run(tmp_path, [{**each, "name": name} for each, name in zip(items(2), "xX", strict=True)])
    assert str(refusal.value) == (
        "Item 1 ('X') has the same name as item 0; names must be unique, ignoring case."
    )
    assert open_store(tmp_path).names == ("x",)


def test_a_truncated_image_file(tmp_path):
    PICTURE.save(tmp_path / "whole.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with pytest.raises(
        InputError, match=r"Item 0 \('item-000000'\): Pillow cannot read the image file"
    ):
        run(tmp_path / "run", [{"image": cut, "prompt": "?"}])


def test_pictures_are_identified_by_their_content(tmp_path):
    def digest(image):
        return item_of(0, "x", {"image": image, "prompt": "?"}).digest

    paths = [tmp_path / folder / "scene.png" for folder in "abc"]
    for path, angle in zip(paths, (0, 0, 180), strict=True):
        path.parent.mkdir()
        PICTURE.rotate(angle).save(path)
    one, moved, other = map(digest, paths)
    assert one == moved != other
    palettes = [PICTURE.convert("P"), PICTURE.convert("P"), PICTURE.convert("P")]
    palettes[2].putpalette(bytes(range(256)) * 3)
    assert digest(palettes[0]) == digest(palettes[1]) != digest(palettes[2])
    with pytest.raises(InputError) as refusal:
        digest(tmp_path / "nowhere.png")
    assert str(refusal.value) == (
        f"Item 0 ('x'): The image {str(tmp_path / 'nowhere.png')!r} cannot be read: No such file "
        "or directory."
    )
