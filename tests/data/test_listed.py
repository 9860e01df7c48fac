"""Lists of pictures are read as they are meant, and a wrong row is named by its line."""

import json

import numpy as np
import pytest

from flaxcls.data import open_source
from flaxcls.errors import ConfigError, DataError


@pytest.fixture
def write(tmp_path):
    """Writes a list, and the files a.jpg to d.jpg beside it whose content is their name."""

    def write(text: str | bytes, name: str = "list.csv") -> str:
        for picture in ("a.jpg", "b.jpg", "sub folder/c.jpg", "d.jpg"):
            (tmp_path / picture).parent.mkdir(exist_ok=True)
            (tmp_path / picture).write_text(picture)
        content = text if isinstance(text, bytes) else text.encode()
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write


def open_list(path: str, split: str = "all", **options):
    return open_source("list", split, path=path, **options)


def contents(source) -> list[tuple[str, str]]:
    return sorted(
        (image.decode(), source.class_names[label])
        for image, label in map(source.__getitem__, range(len(source)))
    )


PLAIN = "a.jpg,cat\nb.jpg,dog\nsub folder/c.jpg,cat\nd.jpg,dog\n"
PAIRS = [("a.jpg", "cat"), ("b.jpg", "dog"), ("d.jpg", "dog"), ("sub folder/c.jpg", "cat")]


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        PLAIN.rstrip(),
        "path,label\n" + PLAIN,
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\n\n"),
        b"\xef\xbb\xbfPath, Label\n" + PLAIN.encode(),
        PLAIN.replace("b.jpg", '"b.jpg"').replace(",cat", ", cat "),
        "filename,class\n" + PLAIN,
        "id,Image Path,width,Category,x\n" + "".join(f"7,{p},3,{c},\n" for p, c in PAIRS),
        "file;label;class\n" + "".join(f"{p};{c};3\n" for p, c in PAIRS),
        PLAIN.replace(",", ";"),
        PLAIN.replace(",", "\t"),
        b"\xef\xbb\xbf\n\nFILE_NAME\ttargets?\tLabels\n"
        + "".join(f"{p}\t0,5;x\t{c}\n" for p, c in PAIRS).encode(),
        "label,age,path\ncat,3,a.jpg\ndog,,b.jpg\ncat,1,sub folder/c.jpg\ndog,2,d.jpg",
    ],
)
def test_csv_with_and_without_a_header(write, text):
    source = open_list(write(text))
    assert contents(source) == PAIRS
    assert source.class_names == ("cat", "dog") and source.image_shape == (None, None, 3)


def test_jsonl_and_absolute_paths(write, tmp_path):
    rows = [{"path": path, "label": label, "note": None} for path, label in PAIRS]
    rows[0]["path"] = str(tmp_path / "a.jpg")
    source = open_list(write("\n".join(map(json.dumps, rows)) + "\n\n", "list.JSONL"))
    assert contents(source) == PAIRS
    assert {source.where(index) for index in range(4)} == {str(tmp_path / p) for p, _ in PAIRS}


def test_names_of_columns_are_understood_in_jsonl_too(write):
    rows = [{"file_name": path, "Class": label} for path, label in PAIRS]
    assert contents(open_list(write("\n".join(map(json.dumps, rows)), "list.jsonl"))) == PAIRS
    with pytest.raises(DataError, match="line 1: the columns are called 'a'; none is the path, "):
        open_list(write('{"a": 1}', "list.jsonl"))
    with pytest.raises(DataError, match="line 1: not JSON: it is nested too deeply"):
        open_list(write("[" * 100_000, "list.jsonl"))


def test_names_may_have_what_separates_other_lists(write):
    source = open_list(write("a;b.jpg,cat\nc;d.jpg,dog\n"))
    assert sorted(source.where(i).rpartition("/")[2] for i in range(2)) == ["a;b.jpg", "c;d.jpg"]
    source = open_list(write('"a,b.jpg";"cat; black"\nd.jpg;dog\n'))
    assert source.class_names == ("cat; black", "dog")


@pytest.mark.parametrize(
    "text, name",
    [
        ("a.jpg,cat,Train\nb.jpg,dog,train\nd.jpg,dog,valid\nsub folder/c.jpg,cat,valid", "x.csv"),
        (
            '{"path": "a.jpg", "label": "cat", "split": "train"}\n'
            '{"path": "b.jpg", "label": "dog", "split": "training"}\n'
            '{"path": "d.jpg", "label": "dog", "split": "valid"}\n'
            '{"path": "sub folder/c.jpg", "label": "cat", "split": "valid"}',
            "x.jsonl",
        ),
    ],
)
def test_splits_of_a_list(write, text, name):
    path = write(text, name)
    assert contents(open_list(path, "train")) == PAIRS[:2]
    for split in ("val", "valid", "test"):
        assert contents(open_list(path, split)) == PAIRS[2:]


def test_a_list_without_splits_is_divided_as_a_folder_is(write):
    path = write("".join(f"{n}.jpg,{n % 3}\n" for n in range(60)))
    labels = [open_list(path, split, held_out=0.2).labels() for split in ("train", "val")]
    for found, count in zip(labels, (16, 4), strict=True):
        np.testing.assert_array_equal(np.bincount(found), [count] * 3)
    where = [
        {source.where(index) for index in range(len(source))}
        for source in (open_list(path, "train"), open_list(path, "val"), open_list(path))
    ]
    assert where[0] | where[1] == where[2] and not where[0] & where[1]
    assert open_list(path, "val").fingerprint != open_list(path, "val", split_seed=1).fingerprint


def test_integer_labels_are_the_numbers_of_classes(write, capsys):
    source = open_list(write("a.jpg,10\nb.jpg,2\n" + "d.jpg,0\n" * 20))
    assert source.class_names == tuple(map(str, range(11)))
    np.testing.assert_array_equal(np.unique(source.labels()), [0, 2, 10])
    assert "8 of 11 classes in" in capsys.readouterr().err
    rows = [{"path": f"{number}.jpg", "label": number} for number in range(3)]
    source = open_list(write("\n".join(map(json.dumps, rows)), "list.jsonl"), "train")
    assert sorted(source.labels()) == [0, 1, 2] and not capsys.readouterr().err


@pytest.mark.parametrize("labels", [("007", "042"), ("1.0", "2.0"), ("1", "one"), ("1st", "2nd")])
def test_labels_that_are_not_all_integers_are_names(write, labels):
    source = open_list(write("".join(f"a.jpg,{label}\n" for label in labels[::-1])), "train")
    assert source.class_names == labels


def test_fingerprint_follows_the_rows(write):
    texts = (
        PLAIN,
        PLAIN + "e.jpg,dog\n",
        PLAIN.replace("b.", "e."),
        PLAIN.replace("a.jpg,cat", "a.jpg,dog"),
    )
    found = [open_list(write(text)).fingerprint for text in texts]
    assert len(set(found)) == 4
    assert (
        open_list(
            write("label,path\n" + "cat,a.jpg\ndog,b.jpg\ncat,sub folder/c.jpg\ndog,d.jpg")
        ).fingerprint
        == found[0]
    )


def test_missing_files_are_named_when_they_are_read(write, tmp_path):
    source = open_list(write(PLAIN + "gone.jpg,cat\n"))
    missing = [index for index in range(5) if source.where(index).endswith("gone.jpg")]
    with pytest.raises(DataError, match="gone.jpg cannot be read: No such file or directory"):
        source[missing[0]]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a.jpg,cat\nb.jpg\n", "line 2: must be path,label, got b.jpg$"),
        ("a.jpg,cat\n\nb.jpg,dog,train\n", "line 3: must be path,label, got b.jpg,dog,train"),
        ("path,label\na, b.jpg,cat\n", "line 2: must be path,label, got a, b.jpg,cat"),
        ("a.jpg,cat\n,dog\n", "line 2: path must be text, got ''"),
        ("a.jpg,cat\nb.jpg, \n", "line 2: label must be text, got ' '"),
        (
            "photo,kind\na.jpg,cat\n",
            "line 1: the columns are called 'photo', 'kind'; none is the path, which would be "
            "called path, file, filename, .*; a list without names of columns has path,label or ",
        ),
        (
            "Filename;kind\na.jpg;cat\n",
            "the columns are called 'Filename', 'kind'; none is the label",
        ),
        ("a.xyz,cat\n", "line 1: the columns are called 'a.xyz', 'cat'; none is the path"),
        ("a.jpg|cat\n", r"line 1: the columns are called 'a.jpg\|cat'; none is the path"),
        (
            "file,image,class\na.jpg,a.jpg,cat\n",
            "line 1: of the columns 'file', 'image', 'class', 'file' and 'image' may each be the "
            "path: call the one that is meant 'path', and no other",
        ),
        ("path,class,category\na.jpg,1,cat\n", "'class' and 'category' may each be the label"),
        ("path,Label,label\na.jpg,1,cat\n", "'Label' and 'label' may each be the label"),
        ("a.jpg;cat\nb.jpg\n", "line 2: must be path;label, got b.jpg$"),
        ('"a.jpg;cat\n', "not CSV: unexpected end of data"),
        ("a.jpg,cat,dev\n", "line 1: split must be one of train, val, valid, .*, got 'dev'"),
        ("a.jpg,cat,train\nb.jpg,dog,\n", "line 2: either all rows have a split, or none"),
        ("path,split,label\na.jpg,,cat\nb.jpg,val,cat\n", "line 3: either all rows have a split"),
        ("a.jpg,0\nb.jpg,-1\n", "line 2: label -1 is not the number of a class, counted from 0"),
        ("a.jpg,0\nb.jpg,2\nd.jpg,1\n" + "d.jpg,99999\n", "line 4: label 99999 is not the number"),
        ('a.jpg,cat\n"b"x.jpg,dog\n', "line 2: not CSV: ',' expected after '\"'"),
        ('a.jpg,cat\n"b.jpg,dog\n', "line 2: not CSV: unexpected end of data"),
        (b"caf\xe9.jpg,cat\n", "list.csv is not UTF-8 text"),
    ],
)
def test_wrong_rows_are_named_by_their_line(write, text, message):
    with pytest.raises(DataError, match=message) as caught:
        open_list(write(text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line, message",
    [
        ("path,label", "line 2: not JSON: Expecting value"),
        ('["a.jpg", "cat"]', "line 2: must be an object with path and label"),
        ('{"label": "cat"}', "line 2: path must be text, got None"),
        ('{"path": "a.jpg", "label": true}', "line 2: label must be text, got True"),
        ('{"path": "a.jpg", "label": 1.5}', "line 2: label must be text, got 1.5"),
        ('{"path": "a.jpg", "label": null}', "line 2: label must be text, got None"),
        ('{"path": "a\\u0000.jpg", "label": "cat"}', "line 2: path must be text, got 'a"),
        ('{"path": "\\ud800.jpg", "label": "cat"}', "line 2: path must be text, got "),
        ('{"path": "a.jpg", "label": "cat", "split": 3}', "line 2: split must be one of"),
    ],
)
def test_wrong_objects_are_named_by_their_line(write, line, message):
    with pytest.raises(DataError, match=message) as caught:
        open_list(write('{"path": "a.jpg", "label": "dog"}\n' + line, "list.jsonl"))
    str(caught.value).encode()  # can be printed


@pytest.mark.parametrize(
    "text, split, message",
    [
        ("", "train", "list.csv has no rows"),
        ("path,label\n", "train", "list.csv has no rows"),
        ("a.jpg,cat\nb.jpg,cat", "train", "list.csv has a single class, 'cat'"),
        ("a.jpg,cat,val\n", "train", "list.csv has no rows of split train, only of val"),
        ("a.jpg,cat,train\nb.jpg,dog,train\n", "val", "unknown split 'val'; there is train"),
        (
            "a.jpg,cat,train\nb.jpg,dog,train\nd.jpg,cat,val\n",
            "val",
            "class 'dog' is in split 'train' of .*list.csv but not in split 'val' of",
        ),
    ],
)
def test_lists_that_cannot_be_trained_on_are_refused(write, text, split, message):
    with pytest.raises(ConfigError, match=message):
        open_list(write(text), split)


def test_a_list_of_another_kind_or_a_missing_one_is_refused(write, tmp_path):
    with pytest.raises(ConfigError, match="must be a .csv or .jsonl file, got .*list.txt"):
        open_list(write(PLAIN, "list.txt"))
    (tmp_path / "folder.csv").mkdir()
    for folder in (tmp_path, tmp_path / "folder.csv"):
        with pytest.raises(ConfigError, match=f"{folder} is a folder, which config.data.name = 'f"):
            open_list(str(folder))
    with pytest.raises(ConfigError, match=r"none of the 2 has two pictures .* a column of splits$"):
        open_list(write("a.jpg,cat\nb.jpg,dog\n"), "test[:50%]")
    assert len(open_list(write("a.jpg,cat\nb.jpg,dog\n"))) == 2
    with pytest.raises(ConfigError, match="nowhere.csv cannot be read: No such file"):
        open_list(str(tmp_path / "nowhere.csv"))


def test_a_list_may_have_some_of_the_classes_that_are_known(write):
    for text, split in ((PLAIN, "all"), (PLAIN.replace("\n", ",test\n"), "test")):
        source = open_list(write(text), split, class_names=("cow", "dog", "cat"))
        assert contents(source) == PAIRS and source.class_names == ("cow", "dog", "cat")
    with pytest.raises(ConfigError, match="class 'dog' in .*list.csv is none of the 2 known"):
        open_list(write(PLAIN), class_names=("cow", "cat"))
    numbered = write("a.jpg,3\nb.jpg,1\n")
    assert sorted(open_list(numbered, class_names=tuple("01234")).labels()) == [1, 3]
