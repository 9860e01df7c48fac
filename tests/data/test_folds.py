"""Folds are exact partitions, stratified, and divide no group."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxcls import build
from flaxcls.config import default
from flaxcls.data import open_source
from flaxcls.data.folds import Fold, assign_folds, open_fold, parse_fold, read_groups
from flaxcls.data.loader import materialize
from flaxcls.errors import ConfigError


def test_folds_are_named_in_words_and_have_folds_too():
    assert parse_fold("train[:90%]") is None and parse_fold("train+test") is None
    fold = parse_fold("train+test, all but fold 3 of 5")
    assert fold == Fold("train+test", 3, 5, is_rest=True)
    assert str(fold) == "train+test, all but fold 3 of 5"
    inner = parse_fold(f"{fold}, fold 0 of 4")
    assert inner == Fold(str(fold), 0, 4) and parse_fold(inner.split) == fold


@pytest.mark.parametrize("spec", ["train, fold 5 of 5", "train, fold 0 of 1", "a, fold 0 of 0"])
def test_fold_that_is_not_there_is_an_error(spec):
    with pytest.raises(ConfigError, match=f"split '{spec}': folds are counted from 0"):
        parse_fold(spec)


@settings(max_examples=30)
@given(
    labels=st.lists(st.integers(0, 4), min_size=12, max_size=60),
    count=st.integers(2, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_example_is_in_one_fold_and_every_class_is_spread_evenly(labels, count, seed):
    labels = np.array(labels)
    if np.bincount(labels).max() < count:
        with pytest.raises(ConfigError, match=f"no class has {count} examples"):
            assign_folds(labels, count, seed=seed)
        return
    folds = assign_folds(labels, count, seed=seed)
    assert set(folds) == {*range(count)}
    for label in np.unique(labels):
        counts = np.bincount(folds[labels == label], minlength=count)
        assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(folds, assign_folds(labels, count, seed=seed))


def test_another_seed_divides_in_another_way():
    labels = np.arange(100) % 5
    assert (assign_folds(labels, 5, seed=0) != assign_folds(labels, 5, seed=1)).any()


def test_no_group_is_in_two_folds():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 40, 400)
    labels = (groups + rng.integers(0, 2, 400)) % 4
    folds = assign_folds(labels, 5, seed=3, groups=groups)
    assert all(len(np.unique(folds[groups == group])) == 1 for group in np.unique(groups))
    assert set(folds) == {*range(5)}
    by_class = np.array([np.bincount(folds[labels == k], minlength=5) for k in range(4)])
    assert by_class.min() >= 10  # of 20, were it even
    with pytest.raises(ConfigError, match="3 groups can't be divided into 5 folds"):
        assign_folds(labels, 5, groups=groups % 3)


def test_fold_and_the_rest_of_a_split_are_that_split():
    whole = open_source("digits", "train")
    images, labels = materialize(whole, None, None)
    held_out, rest = (open_fold(whole, Fold("train", 1, 4, is_rest)) for is_rest in (False, True))
    np.testing.assert_array_equal(np.union1d(held_out.indices, rest.indices), np.arange(1437))
    assert len(held_out) + len(rest) == 1437 and abs(len(held_out) - 1437 / 4) < 10
    for part in (held_out, rest):
        found = materialize(part, None, None)
        np.testing.assert_array_equal(found[0], images[part.indices])
        np.testing.assert_array_equal(found[1], labels[part.indices])
        np.testing.assert_array_equal(part.labels(), labels[part.indices])
        assert part.where(3) == whole.where(int(part.indices[3]))
    assert held_out.others().fingerprint == rest.fingerprint != held_out.fingerprint


@pytest.fixture
def folder(tmp_path):
    """Pictures of two classes, ten each: two of each of five patients."""
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(10):
            picture = np.full((8, 8, 3), 10 * i, np.uint8)
            cv2.imwrite(str(tmp_path / "data" / name / f"{i}.png"), picture)
    return tmp_path / "data"


def open_pictures(folder):
    return open_source("folder", "train", path=str(folder), held_out=0.01)


def patient(file):
    return file.rpartition("/")[2].partition(".")[0]


@pytest.mark.parametrize("how", ["in the data", "beside the CSV", "absolute", "index"])
def test_groups_are_read_by_file_or_index(folder, how):
    source = open_pictures(folder)
    csv = folder / "groups.csv" if how == "beside the CSV" else folder.parent / "groups.csv"
    names = [source.file(i) for i in range(len(source))]
    column = "index" if how == "index" else "File"
    rows = {
        "in the data": [name.removeprefix(f"{folder}/") for name in names],
        "beside the CSV": [name.removeprefix(f"{folder}/") for name in names],
        "absolute": names,
        "index": range(len(names)),
    }[how]
    lines = [f"p{patient(name)},{row}" for name, row in zip(names, rows, strict=True)]
    csv.write_text(f"Group,{column}\n" + "\n".join([*reversed(lines), "other,elsewhere.png"]))
    groups = read_groups(str(csv), source)
    same = [[patient(a) == patient(b) for b in names] for a in names]
    np.testing.assert_array_equal(groups[:, None] == groups, same)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,group\na,b\n", "must have the columns file,group or index,group, got path,group"),
        ("", "must have the columns file,group or index,group, got nothing"),
        ("index,group\n0,a\n0,b\n", "has two groups for index 0"),
        ("index,group\n0,a\n1,\n", r"has no group for .*png \(index 1\)"),
        ("file,group\nx.png,a\n", r"has no group for .*png \(file (cat|dog)/\d.png\)"),
        ('index,group\n0,"a\n', "is not CSV: unexpected end of data"),
    ],
)
def test_wrong_file_of_groups_is_one_sentence(folder, text, message):
    csv = folder.parent / "groups.csv"
    csv.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_groups(str(csv), open_pictures(folder))


def test_groups_need_a_file_that_is_there_and_files_to_name(tmp_path):
    source = open_source("digits", "test")
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        read_groups(str(tmp_path / "none.csv"), source)
    (tmp_path / "groups.csv").write_text("file,group\n0.png,a\n")
    with pytest.raises(ConfigError, match="names files, but the examples of digits are none"):
        read_groups(str(tmp_path / "groups.csv"), source)


def test_config_names_folds_and_groups(folder):
    config = default()
    config.data.name, config.data.path = "folder", str(folder)
    config.data.held_out = 0.01
    config.data.fold_groups = str(folder.parent / "groups.csv")
    names = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(10)]
    rows = "".join(f"{name},{patient(name)}\n" for name in names)
    (folder.parent / "groups.csv").write_text("file,group\n" + rows)
    parts = [build.source(config, f"train, fold {number} of 3") for number in range(3)]
    patients = [{patient(part.file(i)) for i in range(len(part))} for part in parts]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 10
    config.data.fold_seed = 1
    other = build.source(config, "train, fold 0 of 3")
    assert other.fingerprint != parts[0].fingerprint
