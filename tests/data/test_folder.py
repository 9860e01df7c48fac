"""Folders of pictures: every layout is understood or refused in a sentence, and splits hold."""

import collections
import hashlib
import os
import pickle
import shutil
import sys
import tempfile
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest

from flaxcls.config import options
from flaxcls.data import SOURCES, files, folder, open_source
from flaxcls.data.decode import decode
from flaxcls.errors import ConfigError, DataError


def write(root: Path, *names: str) -> Path:
    """Files whose content is their name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode("utf-8", "surrogateescape"))
    return root


def numbered(folder: str, count: int) -> list[str]:
    return [f"{folder}/{number}.jpg" for number in range(count)]


def open_folder(root: Path, split: str = "train", **given):
    return open_source("folder", split, path=str(root), **given)


def contents(source) -> list[tuple[str, str]]:
    """Name and class of every example, in their order."""
    return [
        (image.decode("utf-8", "surrogateescape"), source.class_names[label])
        for image, label in map(source.__getitem__, range(len(source)))
    ]


@pytest.fixture
def pets(tmp_path):
    """dog is created first, and sorts last."""
    names = (*numbered("train/dog", 3), *numbered("train/cat", 2), "val/dog/x.jpg", "val/cat/y.jpg")
    return write(tmp_path / "pets", *names)


@pytest.fixture
def unsplit(tmp_path):
    names = [*numbered("ant", 21), *numbered("bee", 10), *numbered("cow", 2), *numbered("dot", 1)]
    return write(tmp_path / "unsplit", *names)


def test_every_picture_has_the_class_of_its_folder(pets):
    train, val = open_folder(pets), open_folder(pets, "val")
    expected = [(f"train/cat/{n}.jpg", "cat") for n in range(2)]
    expected += [(f"train/dog/{n}.jpg", "dog") for n in range(3)]
    assert sorted(contents(train)) == expected
    assert sorted(contents(val)) == [("val/cat/y.jpg", "cat"), ("val/dog/x.jpg", "dog")]
    assert train.class_names == val.class_names == ("cat", "dog")
    for source in (train, val):
        labels = [source[index].label for index in range(len(source))]
        np.testing.assert_array_equal(source.labels(), labels)
        assert source.labels().dtype == np.int32
        for index in range(len(source)):
            assert source.where(index) == str(pets / source[index].image.decode())


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_every_kind_are_found_and_read(tmp_path, channels):
    pixels = np.full((6, 5, 3), (10, 200, 90), np.uint8)
    for extension in files.EXTENSIONS:
        for name in (f"one/a.{extension}", f"two/b.{extension.upper()}"):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            kind = {"jfif": "jpg"}.get(extension, extension)
            path.write_bytes(cv2.imencode(f".{kind}", pixels)[1].tobytes())
    source = open_folder(tmp_path, "all", channels=channels)
    assert len(source) == 2 * len(files.EXTENSIONS)
    assert source.image_shape == (None, None, channels)
    for index in range(len(source)):
        assert decode(source[index].image, channels).shape == (6, 5, channels)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test", "Test", "VAL", "testing"])
def test_any_name_of_held_out_data_means_the_one_there_is(tmp_path, name):
    write(tmp_path, "Train/a/1.jpg", "Train/b/2.jpg", f"{name}/a/3.jpg", f"{name}/b/4.jpg")
    for split in ("val", "valid", "validation", "test"):
        assert sorted(contents(open_folder(tmp_path, split)))[0] == (f"{name}/a/3.jpg", "a")
        assert len(open_folder(tmp_path, f"train[:1]+{split}[50%:]")) == 2
    assert len(open_folder(tmp_path, "all")) == 4
    assert len({open_folder(tmp_path, split).fingerprint for split in ("val", "test")}) == 1


def test_with_several_held_out_splits_names_are_exact(tmp_path):
    for split in ("train", "valid", "test"):
        write(tmp_path, f"{split}/a/1.jpg", f"{split}/b/2.jpg")
    for asked, found in (("val", "valid"), ("validation", "valid"), ("test", "test")):
        assert contents(open_folder(tmp_path, asked))[0][0].startswith(f"{found}/")
    write(tmp_path, "val/a/1.jpg", "val/b/2.jpg")
    for asked in ("val", "valid"):
        assert contents(open_folder(tmp_path, asked))[0][0].startswith(f"{asked}/")
    with pytest.raises(ConfigError, match="unknown split 'validation'; there is test, train, val"):
        open_folder(tmp_path, "validation")


@pytest.mark.parametrize("share, held_out", [(0.1, [2, 1, 1, 0]), (0.9, [19, 9, 1, 0])])
def test_held_out_share_is_stratified_disjoint_and_complete(unsplit, share, held_out):
    train, validation = (
        contents(open_folder(unsplit, split, held_out=share)) for split in ("train", "validation")
    )
    assert sorted(train + validation) == sorted(contents(open_folder(unsplit, "all")))
    assert len({name for name, _ in train + validation}) == 34
    counts = collections.Counter(name for _, name in validation)
    assert [counts[name] for name in ("ant", "bee", "cow", "dot")] == held_out
    for split in ("val", "valid", "test"):
        assert contents(open_folder(unsplit, split, held_out=share)) == validation


def test_held_out_share_is_chosen_by_the_seed_for_ever(unsplit):
    first, same, other = (
        contents(open_folder(unsplit, "validation", split_seed=seed)) for seed in (0, 0, 1)
    )
    assert first == same != other
    digest = hashlib.sha256(repr(contents(open_folder(unsplit, "all"))).encode()).hexdigest()
    assert digest[:16] == "647b672fc448d8eb"


def test_added_pictures_hardly_move_others_between_the_splits(unsplit):
    before = set(contents(open_folder(unsplit, "validation")))
    write(unsplit, *[f"ant/new{number}.jpg" for number in range(10)])
    after = set(contents(open_folder(unsplit, "validation")))
    old = {example for example in after if "new" not in example[0]}
    assert len(old - before) <= 1 and len(before - old) <= 3
    train = set(contents(open_folder(unsplit, "train")))
    assert len(train & before) == len(before - old)


def test_order_of_the_file_system_does_not_matter(unsplit, pets, monkeypatch):
    opened = {split: open_folder(unsplit, split) for split in ("train", "validation")}
    opened_pets = open_folder(pets)
    entries = folder.visible_entries
    monkeypatch.setattr(folder, "visible_entries", lambda path: reversed(list(entries(path))))
    for split, source in opened.items():
        again = open_folder(unsplit, split)
        assert contents(again) == contents(source)
        assert again.fingerprint == source.fingerprint
    assert contents(open_folder(pets)) == contents(opened_pets)


def test_slices_have_all_classes(tmp_path):
    write(tmp_path, *numbered("train/a", 100), *numbered("train/b", 100))
    halves = [open_folder(tmp_path, split) for split in ("train[:50%]", "train[50%:]")]
    for half in halves:
        assert 35 < half.labels().sum() < 65
    assert contents(halves[0]) + contents(halves[1]) == contents(open_folder(tmp_path))


def test_fingerprint_stays_where_only_the_place_changes(pets, tmp_path):
    fingerprint = open_folder(pets).fingerprint
    shutil.copytree(pets, tmp_path / "copy")
    os.utime(tmp_path / "copy/train/cat/0.jpg", ns=(1, 1))
    assert open_folder(tmp_path / "copy").fingerprint == fingerprint
    assert open_folder(f"{pets}/").fingerprint == fingerprint
    assert open_folder(pets, "train[:100%]").fingerprint == fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda train: (train / "cat/new.jpg").touch(),
        lambda train: (train / "cat/0.jpg").unlink(),
        lambda train: (train / "cat/0.jpg").rename(train / "cat/00.jpg"),
        lambda train: (train / "cat/0.jpg").rename(train / "dog/7.jpg"),
        lambda train: (train / "cat/0.jpg").write_bytes(b"other size"),
    ],
)
def test_fingerprint_follows_the_files(pets, change):
    before = [open_folder(pets, split).fingerprint for split in ("train", "val", "train[1:]")]
    assert len(set(before)) == 3
    change(pets / "train")
    assert open_folder(pets).fingerprint != before[0]
    assert open_folder(pets, "val").fingerprint == before[1]


def test_folders_in_a_class_are_searched_and_other_files_ignored(tmp_path):
    ignored = ("a/notes.txt", "a/.hidden.jpg", "a/.git/x.jpg", "a/__MACOSX/x.jpg", "a/Thumbs.db")
    outside = (".ipynb_checkpoints/x.jpg", "__MACOSX/a/x.jpg", "labels.csv", "preview.jpg")
    write(tmp_path, "a/deep/er/1.jpg", "a/2.png", "b/jpg", "b/x.jpg.txt", "b/3.webp")
    write(tmp_path, *ignored, *outside)
    expected = [("a/2.png", "a"), ("a/deep/er/1.jpg", "a"), ("b/3.webp", "b")]
    assert sorted(contents(open_folder(tmp_path, "all"))) == expected


def test_links_are_followed_and_loops_end(tmp_path):
    write(tmp_path / "store", "1.jpg", "more/2.jpg")
    root = write(tmp_path / "root", "train/a/3.jpg", "train/b/4.jpg")
    (root / "train/a/file.jpg").symlink_to(tmp_path / "store/1.jpg")
    (root / "train/b/folder").symlink_to(tmp_path / "store")
    (root / "train/c").symlink_to(tmp_path / "store/more")
    for name, target in (("here", "."), ("up", ".."), ("top", "../.."), ("self", "self")):
        (root / "train/a" / name).symlink_to(target)
    (tmp_path / "store/more/back").symlink_to(tmp_path / "store")
    (tmp_path / "link").symlink_to(root)
    found = sorted(contents(open_folder(tmp_path / "link")))
    assert [item for item in found if item[1] != "c"] == [
        ("1.jpg", "a"),
        ("1.jpg", "b"),
        ("more/2.jpg", "b"),
        ("train/a/3.jpg", "a"),
        ("train/b/4.jpg", "b"),
    ]
    assert ("more/2.jpg", "c") in found


@pytest.mark.parametrize(
    "name", ["with space", 'it\'s "q"', "日本 😀", "new\nline", "a%sb", "café"]
)
def test_names_of_any_kind_are_fine(tmp_path, name):
    write(tmp_path, f"{name}/{name}.jpg", f"{name}/1.jpg", "zzz/2.jpg", "zzz/3.jpg")
    source = open_folder(tmp_path, "all")
    assert {name for _, name in contents(source)} == {name.replace("\n", "\\n"), "zzz"}


@pytest.mark.skipif(sys.platform != "linux", reason="names are always text elsewhere")
def test_names_that_are_not_utf8_can_be_read_and_printed(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write(tmp_path, f"train/{name}/{name}.jpg", "train/tea/1.jpg")
    source = open_folder(tmp_path)
    assert source.class_names == ("caf\\xe9", "tea")
    assert sorted(contents(source))[0] == (f"train/{name}/{name}.jpg", "caf\\xe9")
    assert f"{tmp_path}/train/caf\\xe9/caf\\xe9.jpg" in [source.where(index) for index in range(2)]


def test_a_class_is_the_same_however_its_accents_are_encoded(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write(tmp_path, f"train/{composed}/1.jpg", "train/tea/2.jpg")
    write(tmp_path, f"val/{decomposed}/3.jpg", "val/tea/4.jpg")
    assert open_folder(tmp_path).class_names == (composed, "tea")
    assert (f"val/{decomposed}/3.jpg", composed) in contents(open_folder(tmp_path, "val"))


def test_a_class_may_be_called_train(tmp_path):
    write(tmp_path, *(f"{name}/{number}.jpg" for name in ("bus", "train") for number in "12"))
    assert open_folder(tmp_path, "val").class_names == ("bus", "train")


def test_splits_that_nobody_asked_for_do_not_matter(pets):
    write(pets, "test/unlabelled.jpg", "annotations/list.xml")
    assert (len(open_folder(pets)), len(open_folder(pets, "val"))) == (5, 2)


FLAT = ("train/a/1.jpg", "train/b/2.jpg")
LAYOUT = "the layout should be DIR/train/CLASS/.* or DIR/CLASS/"


@pytest.mark.parametrize(
    "names, split, message",
    [
        ([], "train", f"root has no class folders: {LAYOUT}"),
        (["readme.txt"], "train", f"root has no class folders: {LAYOUT}"),
        (["1.jpg", "2.png", "3.txt"], "train", r"root has images \(2\) but no class folders"),
        (["train/1.jpg", "val/2.jpg"], "val", r"root/train has images \(1\) but no class folders"),
        (
            [*FLAT, "val/3.jpg", "val/4.jpg"],
            "val",
            r"root/val has images \(2\) but no class folders",
        ),
        ([*FLAT, "val/empty.txt"], "val", f"root/val has no class folders: {LAYOUT}"),
        (["a/1.jpg", "b/2.txt"], "train", r"class folder .*root/b has no images \(jpg, jpeg, jpe"),
        ([*FLAT, "train/c/3.txt"], "train", "class folder .*root/train/c has no images"),
        (["a/1.jpg", "a/2.jpg"], "train", "root has a single class, 'a': a classifier needs two"),
        (["data/train/a/1.jpg", "data/val/a/2.jpg"], "train", "a single class, 'data'"),
        (["val/a/1.jpg", "test/b/2.jpg"], "train", f"root has test, val but no train: {LAYOUT}"),
        (
            [*FLAT, "val/a/3.jpg"],
            "val",
            "class 'b' is in .*root/train but not in .*root/val: all splits must have the same",
        ),
        (
            [*FLAT, "val/a/3.jpg", "val/b/4.jpg", "val/c/5.jpg"],
            "val",
            "class 'c' is in .*root/val but not in .*root/train",
        ),
        (
            [f"train/{n}/1.jpg" for n in "abcdefg"] + ["val/a/1.jpg"],
            "val",
            "class 'b', 'c', 'd' and 3 more is in",
        ),
        ([*FLAT, "training/a/1.jpg"], "train", "two folders for 'train': train and training"),
        (FLAT, "validation", "unknown split 'validation'; there is train"),
        (FLAT, "dev", "unknown split 'dev'; there is train"),
        (["a/1.jpg", "b/2.jpg"], "train[50%:50%]", "split 'train.*' is empty"),
        (
            ["a/1.jpg", "b/2.jpg"],
            "validation",
            "split 'validation' is empty: a part of each class is held out, but none of the 2 "
            r"has two pictures \('a' has 1, 'b' has 1\); add pictures, or say .* DIR/val/CLASS/",
        ),
        (
            numbered("a", 1) + numbered("b", 1) + numbered("c", 1) + numbered("d", 1),
            "val",
            "1 more",
        ),
    ],
)
def test_other_layouts_are_refused_in_a_sentence(tmp_path, names, split, message):
    (tmp_path / "root").mkdir()
    root = write(tmp_path / "root", *names)
    with pytest.raises(ConfigError, match=message) as caught:
        open_folder(root, split)
    assert "\n" not in str(caught.value)


def test_a_place_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for name, message in (("file", "is a file"), ("nowhere", "does not exist")):
        with pytest.raises(ConfigError, match=f"must be a folder of pictures, but .*{message}"):
            open_folder(tmp_path / name)


def test_a_folder_that_cannot_be_listed_is_named(pets, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="train/dog cannot be listed: Permission denied"):
        open_folder(pets)


@pytest.mark.skipif(sys.platform == "win32" or os.getuid() != 0, reason="root becomes nobody")
def test_folders_that_may_not_be_looked_into_are_one_sentence():
    with tempfile.TemporaryDirectory() as place:  # where nobody may go
        os.chmod(place, 0o755)
        root = write(Path(place) / "root", "train/cat/1.jpg", "train/dog/2.jpg", "val/dog/3.jpg")
        for path, mode, message in (
            ("train/cat", 0o000, "root/train/cat cannot be listed: Permission denied"),
            ("train", 0o444, "root/train.* cannot be listed: Permission denied"),
            ("train", 0o000, "root/train cannot be listed: Permission denied"),
            (".", 0o444, "root.* cannot be listed: Permission denied"),
            ("..", 0o000, "must be a folder of pictures, but .*root can't be reached: Permission"),
        ):
            (root / path).chmod(mode)
            os.seteuid(65534)
            try:
                with pytest.raises((DataError, ConfigError), match=message):
                    open_folder(root)
            finally:
                os.seteuid(0)
                (root / path).chmod(0o755)


def test_files_that_cannot_be_read_are_named(pets):
    (pets / "train/cat/nowhere.jpg").symlink_to(pets / "missing.jpg")
    source = open_folder(pets)
    (pets / "train/cat/1.jpg").unlink()
    (pets / "train/cat/0.jpg").unlink()
    (pets / "train/cat/0.jpg").mkdir()
    sentences = []
    for index in range(len(source)):
        if source.class_names[source.labels()[index]] == "cat":
            with pytest.raises(DataError) as caught:
                source[index]
            sentences.append(str(caught.value))
    assert sorted(sentences) == [
        f"{pets}/train/cat/0.jpg cannot be read: Is a directory",
        f"{pets}/train/cat/1.jpg cannot be read: No such file or directory",
        f"{pets}/train/cat/nowhere.jpg cannot be read: No such file or directory",
    ]


def test_a_source_can_be_sent_to_another_process(pets):
    source = open_folder(pets)
    sent = pickle.loads(pickle.dumps(source))
    assert contents(sent) == contents(source) and sent.fingerprint == source.fingerprint


def test_options_are_checked_and_the_path_is_needed():
    hidden = ("split", "max_bytes", "class_names")
    known = options.accepted(SOURCES["folder"], hidden)
    assert known == options.accepted(SOURCES["list"], hidden)
    good = {"path": "x", "held_out": 0.2, "split_seed": 3, "channels": 1}
    assert options.check("config.data", "folder", good, known) == good
    for option, value in (("held_out", 0), ("held_out", 1), ("split_seed", -1), ("channels", 4)):
        with pytest.raises(ConfigError, match=f"config.data.{option} must be"):
            options.check("config.data", "folder", {option: value}, known)
    for name in ("folder", "list", "idx"):
        with pytest.raises(ConfigError, match="config.data.path is missing: the "):
            open_source(name, "train")


def test_a_split_may_have_some_of_the_classes_that_are_known(tmp_path):
    known = ("zebra", "ant", "bee", "cow")  # by label, in no order of their own
    write(tmp_path / "a", "test/cow/1.jpg", "test/ant/2.jpg", "test/ant/3.jpg", "test/bee/x.txt")
    write(tmp_path / "b", "cow/1.jpg", "ant/2.jpg")  # a single split, perhaps a single class
    write(tmp_path / "c", "train/dog/1.jpg", "val/cow/1.jpg")
    for root, split, expected in (
        ("a", "test", [("test/ant/2.jpg", 1), ("test/ant/3.jpg", 1), ("test/cow/1.jpg", 3)]),
        ("b", "all", [("ant/2.jpg", 1), ("cow/1.jpg", 3)]),
        ("c", "val", [("val/cow/1.jpg", 3)]),
    ):
        source = open_folder(tmp_path / root, split, class_names=known)
        assert source.class_names == known
        examples = sorted((source[i].image.decode(), source[i].label) for i in range(len(source)))
        assert examples == expected
        assert source.labels().tolist() == [source[i].label for i in range(len(source))]
    with pytest.raises(ConfigError, match="class 'cow' in .*b is none of the 2 known classes,"):
        open_folder(tmp_path / "b", "all", class_names=("ant", "bee"))
    with pytest.raises(ConfigError, match="a has test but no train"):
        open_folder(tmp_path / "a", "test")


def test_data_of_another_kind_must_have_the_very_classes():
    names = tuple("0123456789")
    assert len(open_source("digits", "test", class_names=names)) == 360
    for other, message in (
        ((*names[:9], "x"), "10 classes of digits are not .*: it has '9' besides, it lacks 'x'$"),
        (names[:4], "it has '4', '5', '6' and 3 more besides$"),
        (names[::-1], "their order is another$"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_source("digits", "test", class_names=other)
