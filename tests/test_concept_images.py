"""A folder of pictures becomes a training set."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from weaver.concepts.images import TrainingSet, caption_of, load_class_images, load_images, mask_of
from weaver.concepts.picture_folder import PassedOverWarning
from weaver.errors import WeaverError
from weaver.pictures import PictureError


def save(path, size=(6, 4), colour=(200, 10, 10), **options):
    Image.new("RGB", size, colour).save(path, **options)


def test_pictures_in_the_order_of_their_names(tmp_path):
    for number, name in enumerate(["b.png", "a.JPG", "c.webp"]):
        save(tmp_path / name, size=(4 + number, 4))
    save(tmp_path / ".hidden.png")
    (tmp_path / "notes.md").write_text("not a picture")
    data = load_images(tmp_path, "<v1>", "cat")
    assert [image.width for image in data.images] == [5, 4, 6]
    assert data.captions == ("a <v1> cat",) * 3


def test_captions_from_files_beside_the_pictures_and_from_a_template(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a {token} {word}, beach background\n")
    (tmp_path / "b.txt").write_text("<v1> cat at night")
    data = load_images(tmp_path, "<v1>", "cat", template="photo of a {token} {word}")
    assert data.captions == ("a <v1> cat, beach background", "<v1> cat at night", "photo of a <v1> cat")


def test_single_files_in_the_order_given(tmp_path):
    for name, width in (("a.png", 3), ("b.png", 5)):
        save(tmp_path / name, size=(width, 4))
    data = load_images([tmp_path / "b.png", str(tmp_path / "a.png")], "<v1>", "cat")
    assert [image.width for image in data.images] == [5, 3]


def test_rotation_and_transparency_are_seen_to(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a.jpg", size=(6, 4), exif=exif)
    Image.new("RGBA", (6, 4), (0, 0, 0, 0)).save(tmp_path / "b.png")
    turned, clear = load_images(tmp_path, "<v1>", "cat").images
    assert turned.size == (4, 6)
    assert clear.mode == "RGB" and (np.asarray(clear) == 255).all()


def test_an_unreadable_picture_is_named(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(PictureError, match=r"b\.png: not a readable picture") as raised:
        load_images(tmp_path, "<v1>", "cat")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("broken", "more"), [(2, ""), (5, ""), (8, "; and 3 more")])
def test_every_unreadable_picture_is_told_of_up_to_five_by_name(tmp_path, broken, more):
    save(tmp_path / "a.png")
    for number in range(broken):
        (tmp_path / f"b{number}.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(PictureError, match=f"^{broken} of {broken + 1} pictures can't be used: ") as raised:
        load_images(tmp_path, "<v1>", "cat")
    message = str(raised.value)
    assert [f"b{number}.png: not a readable picture" in message for number in range(broken)] == [
        number < 5 for number in range(broken)
    ]
    assert message.endswith(more or ")") and ("more" in message) == bool(more) and "\n" not in message


def test_pictures_and_captions_that_cant_be_used_are_told_together(tmp_path):
    for name in "abc":
        save(tmp_path / f"{name}.png")
    (tmp_path / "a.png").write_bytes(b"\x89PNG broken")
    (tmp_path / "b.txt").write_text("a cat")
    with pytest.raises(
        WeaverError, match=r"2 of 3 .*a\.png: not a readable.*; .*b\.txt: caption 'a cat' lacks"
    ) as raised:
        load_images(tmp_path, "<v1>", "cat")
    assert not isinstance(raised.value, PictureError)
    with pytest.raises(WeaverError, match="^caption 'a {word}' lacks the token '<v1>'[^;]*$"):
        load_images([tmp_path / "c.png"] * 2, "<v1>", "cat", template="a {word}")


def test_folders_without_pictures(tmp_path):
    with pytest.raises(WeaverError, match=r"no pictures in this folder \(\.png"):
        load_images(tmp_path, "<v1>", "cat")
    (tmp_path / "a.HEIC").write_bytes(b"no picture that is read")
    with pytest.raises(WeaverError, match=r"no pictures in this folder .*; save a\.HEIC as PNG or JPEG"):
        load_images(tmp_path, "<v1>", "cat")
    with pytest.raises(WeaverError, match="no such folder of pictures"):
        load_images(tmp_path / "none", "<v1>", "cat")
    with pytest.raises(WeaverError, match="no pictures to learn from"):
        load_images([], "<v1>", "cat")


def test_what_is_passed_over_is_told(tmp_path):
    for number in range(7):
        save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a {token} {word}")
    save(tmp_path / "3.mask.png")
    (tmp_path / "notes.md").write_text("meant for nobody")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_images(tmp_path, "<v1>", "cat")
    for number in range(7):
        (tmp_path / f"photo-{number}.avif").write_bytes(b"no picture that is read")
    with pytest.warns(PassedOverWarning, match=r"photo-0.avif, .*, photo-4.avif and 2 more: save as PNG or JPEG$"):
        load_images([tmp_path], "<v1>", "cat")


def test_captions_need_the_token(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(WeaverError, match="caption 'a {word}' lacks the token '<v1>'"):
        load_images(tmp_path, "<v1>", "cat", template="a {word}")
    (tmp_path / "a.txt").write_text("a cat")
    with pytest.raises(WeaverError, match=r"a\.txt: caption 'a cat' lacks the token"):
        load_images(tmp_path, "<v1>", "cat")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WeaverError, match=r"a\.txt: not a readable caption in UTF-8"):
        load_images(tmp_path, "<v1>", "cat")


def test_class_pictures_have_captions_beside_them_too(tmp_path):
    for name in ("a.png", "a.mask.png", "b.png"):
        save(tmp_path / name)
    (tmp_path / "a.txt").write_text("two {word}s on a sofa\n")
    data = load_class_images(tmp_path, "<v1>", "cat")
    assert (data.captions, data.masks) == (("two cats on a sofa", "a cat"), ())


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a {token} {word}", r"caption 'a {token} {word}' has the token '<v1>', and shows others: write {word} alone"),
        ("a <v1> cat", r"caption 'a <v1> cat' has the token '<v1>'"),
        (" \n", "the caption is empty: write what the picture shows, or remove the file"),
    ],
)
def test_captions_that_class_pictures_cant_have(tmp_path, caption, message):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(caption)
    with pytest.raises(WeaverError, match=rf"a\.txt: {message}"):
        load_class_images(tmp_path, "<v1>", "cat")


def test_as_many_captions_as_pictures():
    with pytest.raises(WeaverError, match="1 pictures and 2 captions"):
        TrainingSet((Image.new("RGB", (4, 4)),), ("a", "b"))


def test_a_token_is_a_whole_word(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a photo of sksy cat")
    with pytest.raises(WeaverError, match="lacks the token 'sks'"):
        load_images(tmp_path, "sks", "cat")


def _cut_out(inside: np.ndarray) -> Image.Image:
    picture = Image.new("RGBA", inside.shape[::-1], "white")
    picture.putalpha(Image.fromarray(np.uint8(255 * inside)))
    return picture


@pytest.mark.parametrize(
    "drawn",
    [
        lambda inside: Image.fromarray(np.uint8(255 * inside)),
        lambda inside: Image.fromarray(np.uint8(255 * inside)).convert("RGBA"),  # opaque everywhere: it says nothing
        lambda inside: Image.fromarray(np.uint8(inside)),  # a label map of 0 and 1
        lambda inside: Image.fromarray(inside),  # one bit
        _cut_out,
    ],
    ids=["grey", "opaque", "labels", "bits", "cut-out"],
)
def test_a_mask_says_the_same_in_whatever_way_it_is_drawn(tmp_path, drawn):
    inside = np.zeros((8, 12), bool)
    inside[2:5, 3:9] = True
    save(tmp_path / "a.png")
    drawn(inside).save(tmp_path / "a.mask.png")
    mask = mask_of(tmp_path / "a.png")
    assert mask.mode == "L" and np.array_equal(np.asarray(mask), np.uint8(255 * inside))


def test_a_mask_that_is_transparent_everywhere_is_empty(tmp_path):
    save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        Image.new("RGBA", picture.size, (255, 255, 255, 0)).save(tmp_path / "a.mask.png")
    with pytest.raises(WeaverError, match="its mask is empty"):
        load_images(tmp_path, "<v1>", "dog")


def test_soft_masks_stay_soft_and_captions_may_have_their_encoding_marked(tmp_path):
    save(tmp_path / "a.png")
    grey = np.arange(0, 96, dtype=np.uint8).reshape(8, 12)
    Image.fromarray(grey).save(tmp_path / "a.mask.png")
    assert np.array_equal(np.asarray(mask_of(tmp_path / "a.png")), grey)
    (tmp_path / "a.txt").write_text("a {token} {word} in the snow", encoding="utf-8-sig")
    assert caption_of(tmp_path / "a.png", "<v1>", "dog") == "a <v1> dog in the snow"


def test_names_beside_a_picture_are_compared_in_lower_case(tmp_path):
    for name in ("0.png", "1.PNG", "2.jpg"):
        Image.new("RGB", (16, 16), "red").save(tmp_path / name)
    for name in ("0.mask.jpg", "1.mask.PNG", "2.MASK.png"):
        Image.new("L", (16, 16), 255).save(tmp_path / name)
    (tmp_path / "0.TXT").write_text("a {token} {word} in letters")
    (tmp_path / "1.txt").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_images(tmp_path, "<v1>", "cat")
    assert [Path(name).name for name in found.names] == ["0.png", "1.PNG", "2.jpg"] and all(found.masks)
    assert found.captions == ("a <v1> cat in letters", "a <v1> cat", "a <v1> cat")


@pytest.mark.parametrize("name", ["0_mask.png", "0-Mask.jpg", "0 mask.png"])
def test_what_looks_like_another_picture_s_mask_is_not_learned_from(tmp_path, name):
    for file in ("0.jpg", name):
        Image.new("RGB", (16, 16), "red").save(tmp_path / file)
    with pytest.raises(WeaverError, match=r"to learn from, or the mask of '0'\? Call a mask 0\.mask\.(png|jpg)"):
        load_images(tmp_path, "<v1>", "cat")
    (tmp_path / "0.jpg").unlink()
    assert len(load_images(tmp_path, "<v1>", "cat").images) == 1


def test_a_caption_of_a_mask_is_no_caption(tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "0.png")
    (tmp_path / "0.mask.txt").write_text("a {token} {word}, wrongly")
    with pytest.warns(PassedOverWarning, match=r"0\.mask\.txt: beside no picture"):
        assert load_images(tmp_path, "<v1>", "cat").captions == ("a <v1> cat",)
