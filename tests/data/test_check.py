"""What is odd about data is found before training, with names and the right exit code."""

import json

import cv2
import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from flaxcls import build, cli
from flaxcls.data import __main__ as commands
from flaxcls.data import open_source
from flaxcls.data.commands import check
from flaxcls.data.commands.shared import source_overrides
from flaxcls.data.scan import find_problems, scan
from flaxcls.data.source import Example, Source
from flaxcls.data.statistics import channel_histogram, channel_statistics, mean_and_std
from flaxcls.errors import ConfigError
from flaxcls.runtime import sharding


class Listed(Source):
    """A list of (image, label) as a source."""

    def __init__(self, examples, split="train", classes=3, channels=3):
        super().__init__(
            name="listed",
            split=split,
            class_names=["ant", "bee", "cow", *map(str, range(3, classes))][:classes],
            image_shape=(None, None, channels),
            fingerprint="",
        )
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return Example(*self.examples[index])


def picture(seed, height=4, width=5, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def encode(image, suffix=".png"):
    return cv2.imencode(suffix, image[..., ::-1])[1].tobytes()


def pictures(count, first=0):
    """Different ones, with the labels 0, 1, 2, 0, ..."""
    return [(picture(first + number), number % 3) for number in range(count)]


def problems_of(train, evaluation, max_broken=0.001):
    scans = [scan(Listed(train), 2), scan(Listed(evaluation, "test"), 2)]
    problems = find_problems(scans[0], scans[1:], max_broken)
    return sorted(problems, key=lambda problem: not problem.is_error)


@pytest.fixture
def write_folder(tmp_path):
    """Writes TMP/pictures/SPLIT/CLASS/NUMBER.png of different pictures; returns the folder."""

    def write(splits, classes=("ant", "bee")):
        seed = 0
        for split, count in splits.items():
            for name in classes:
                folder = tmp_path / "pictures" / split / name
                folder.mkdir(parents=True)
                for number in range(count):
                    (folder / f"{number}.png").write_bytes(encode(picture(seed, 8, 6)))
                    seed += 1
        return tmp_path / "pictures"

    return write


@pytest.fixture
def run_check(tmp_path, capfd):
    """Runs the command in this process: exit code, output, report."""

    def run(*arguments):
        for name in check.FLAGS:
            check.FLAGS[name].unparse()
        place = tmp_path / "report.json"
        code = commands.main(["data", "check", f"--json={place}", *map(str, arguments)])
        return code, capfd.readouterr().out, json.loads(place.read_text())

    return run


def test_counts_sizes_and_formats_are_reported_by_class_and_split(write_folder, run_check):
    root = write_folder({"train": 4, "val": 3})
    (root / "train/ant/wide.jpg").write_bytes(encode(picture(99, 10, 30), ".jpg"))
    code, output, report = run_check(f"--source={root}", "--config.data.eval_split=val")
    assert code == 0 and "No problem found" in output
    train, val = report["splits"]
    assert (train["split"], train["pictures"], train["class_counts"]) == ("train", 9, [5, 4])
    assert (val["split"], val["pictures"], val["class_counts"]) == ("val", 6, [3, 3])
    assert train["widths"] == [6, 6, 30] and train["heights"] == [8, 8, 10]
    assert train["formats"] == {"PNG": 8, "JPEG": 1} and report["classes"] == ["ant", "bee"]
    for word in ("PNG 8, JPEG 1", "6, 6, 30", "ant", "bee", "--config.data.mean='(0."):
        assert word in output


def test_statistics_are_those_of_all_training_pixels_exactly():
    images = np.stack([picture(seed, 7, 9) for seed in range(50)])
    labelled = [(image, 0) for image in images]
    read = scan(Listed(labelled), threads=3)
    mean, std = channel_statistics(images)
    assert mean_and_std(read.histogram) == (mean, std)

    sizes = [picture(seed, 3 + seed, 40 - seed) for seed in range(20)]
    read = scan(Listed([(encode(image), 0) for image in sizes]), threads=3)
    pixels = np.concatenate([image.reshape(-1, 3) for image in sizes]) / 255
    np.testing.assert_allclose(mean_and_std(read.histogram), (pixels.mean(0), pixels.std(0)))


def test_histogram_counts_more_pixels_than_float32_can():
    white = np.full((4097, 4097, 1), 255, np.uint8)
    white[0, 0] = 7
    counts = channel_histogram(white)
    assert counts[0, 255] == 4097**2 - 1 and counts[0, 7] == 1 and counts.sum() == 4097**2


def test_result_does_not_depend_on_the_threads():
    examples = pictures(100) + [(b"junk", 1)] + pictures(30)
    one, four = (scan(Listed(examples), threads) for threads in (1, 4))
    for name in ("labels", "sizes", "digests", "histogram"):
        np.testing.assert_array_equal(getattr(one, name), getattr(four, name))
    assert one.broken == four.broken and one.formats == four.formats


def test_rotated_picture_has_the_size_that_is_shown():
    image = pytest.importorskip("PIL.Image")
    import io

    exif = image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.fromarray(picture(0, 10, 30)).save(file, "JPEG", exif=exif)
    assert scan(Listed([(file.getvalue(), 0)]), 1).sizes.tolist() == [[30, 10]]


def test_unreadable_pictures_are_named_with_their_cause():
    good = pictures(2000)
    broken = [*good[:1000], (b"junk", 0), *good[1000:]]
    (problem,) = problems_of(broken, pictures(9, 5000))
    assert not problem.is_error
    assert problem.sentence.startswith("unreadable: 1 of the 2,001 pictures of 'train' (0.05 %)")
    assert problem.examples == ["example 1000 of listed 'train' is not a readable image (4 bytes)"]


def test_unreadable_pictures_are_an_error_above_the_share_and_in_evaluation():
    good, half = pictures(30), encode(picture(1, 50, 50))[:400]
    for allowed, is_error in ((0.001, True), (0.1, False)):
        (problem,) = problems_of([*good, (half, 0)], pictures(9, 5000), allowed)
        assert problem.is_error == is_error
        assert ("max_broken = 0.001 allows fewer" in problem.sentence) == is_error
    (problem,) = problems_of(good, [*pictures(9, 5000), (b"", 0)], 0.5)
    assert problem.is_error and "'test'" in problem.sentence


def test_too_many_pixels_are_unreadable():
    read = scan(Listed([(encode(picture(0, 20, 20)), 0), (encode(picture(0, 9, 9)), 0)]), 1, 100)
    assert list(read.broken) == [0] and "config.input.max_pixels" in read.broken[0]


@pytest.mark.parametrize("label", [-1, 3])
def test_label_out_of_range_is_an_error_that_names_the_example(label):
    (problem,) = problems_of([*pictures(30), (picture(99), label)], pictures(9, 5000))
    assert problem.is_error and "none of the 3 classes, 0 to 2" in problem.sentence
    assert problem.examples == [f"example 30 of listed 'train' has label {label}"]


def test_class_that_is_only_evaluated_is_an_error_and_others_are_warnings():
    cows_only = [(picture(seed), 2) for seed in range(10)]
    ants_only = [(picture(seed), 0) for seed in range(20, 30)]
    untrained, untested, empty = problems_of(cows_only, ants_only)
    assert untrained.is_error and untrained.examples == ["ant"]
    assert not untested.is_error and untested.examples == ["cow"]
    assert not empty.is_error and empty.examples == ["bee"]


def test_unreadable_pictures_do_not_fill_a_class():
    good = [(picture(seed), seed % 2) for seed in range(10)]
    unlearned = problems_of([*good, (b"junk", 2)], pictures(9, 5000), 0.5)[0]
    assert unlearned.is_error and unlearned.examples == ["cow"]


def test_pictures_in_both_splits_are_named_and_an_error_above_a_share():
    train, evaluation = pictures(1500), pictures(1000, 5000)
    assert problems_of(train, evaluation) == []
    (problem,) = problems_of(train, [*evaluation[:999], train[40]])
    assert not problem.is_error
    assert problem.examples == [
        "example 999 of listed 'test' [bee] = example 40 of listed 'train' [bee]"
    ]
    (problem,) = problems_of(train, [*evaluation[:997], *train[40:43]])
    assert (
        problem.is_error
        and "'train' as well, byte for byte: 3 of the 1,000 pictures" in problem.sentence
    )


def test_copies_within_a_split_are_counted_with_their_labels():
    train = pictures(30)
    repeated = [*train, train[4], train[4], train[7], (train[9][0], 1)]
    (problem,) = problems_of(repeated, pictures(9, 5000))
    assert not problem.is_error
    assert problem.sentence.startswith("copies of others in the same split: 4 of the 34 ")
    assert problem.sentence.endswith("; pictures with several labels: 1")
    assert problem.examples == [
        "example 9 of listed 'train' [ant] = example 33 of listed 'train' [bee]",
        "example 4 of listed 'train' [bee] = example 30 of listed 'train' [bee] = "
        "example 31 of listed 'train' [bee]",
        "example 7 of listed 'train' [bee] = example 32 of listed 'train' [bee]",
    ]


def test_report_names_problems_and_the_json_has_all_of_them(write_folder, run_check):
    root = write_folder({"train": 9, "val": 3})
    for number in range(8):
        (root / f"val/bee/{number}.jpg").write_bytes(b"no picture")
    (root / "val/ant/again.png").write_bytes((root / "train/ant/0.png").read_bytes())
    code, output, report = run_check(f"--source={root}", "--config.data.eval_split=val")
    assert code == report["exit_code"] == 45
    assert "ERROR: unreadable: 8 of the 15 pictures of 'val' (53.33 %)" in output
    assert f"{root}/val/ant/again.png [ant] = {root}/train/ant/0.png [ant]" in output
    assert "and 3 more; --json=FILE lists all" in output and "2 errors, 0 warnings" in output
    unreadable = report["problems"][0]["examples"]
    assert len(unreadable) == 8
    assert f"{root}/val/bee/7.jpg is not a readable image (10 bytes)" in unreadable


def test_every_split_that_is_there_is_checked(write_folder, run_check, tmp_path):
    root = write_folder({"train": 4, "val": 2, "test": 3})
    code, _, report = run_check(f"--source={root}")
    assert code == 0 and [s["split"] for s in report["splits"]] == ["train", "test", "val"]
    (root / "val/bee/broken.png").write_bytes(b"no picture")
    (root / "test/ant/again.png").write_bytes((root / "train/ant/0.png").read_bytes())
    for arguments, name in (([], "val"), (["--config=configs/folder.py"], "validation")):
        code, output, report = run_check(f"--source={root}", *arguments)
        assert code == 45 and f"unreadable: 1 of the 5 pictures of '{name}'" in output, output
        assert "'train' as well, byte for byte: 1 of the 7 pictures of 'test'" in output
    assert run_check(f"--source={root}", "--config.data.train_split=train+val")[0] == 45
    code, output, report = run_check(f"--source={root}", "--config.data.eval_split=test[:2]")
    assert "'val'" not in output and len(report["splits"]) == 2
    for arguments, splits in (
        (["--source=fake"], ["train", "validation", "test"]),
        (["--source=digits"], ["train", "test"]),
        (["--config=configs/digits_cnn.py"], ["train", "test"]),
        ([f"--source={root}/train"], ["train", "validation"]),
    ):
        assert [s["split"] for s in run_check(*arguments)[2]["splits"]] == splits


def test_check_goes_on_after_what_training_refuses(write_folder, run_check):
    root = write_folder({"train": 4, "val": 2}, classes=("ant", "bee", "cow"))
    for name in ("dot", "elk"):
        (root / "train" / name).mkdir()
    (root / "val/cow").rename(root / "val/crow")
    (root / "val/ant/broken.png").write_bytes(b"")
    code, output, report = run_check(f"--source={root}")
    assert code == report["exit_code"] == 45
    assert report["classes"] == ["ant", "bee", "cow", "crow", "dot", "elk"]
    found = {problem["sentence"]: problem["examples"] for problem in report["problems"]}
    for sentence, examples in (
        ("/train/dot has no images", []),
        ("class 'crow' is in", []),
        ("classes: 1 of the 6 in 'val' but not in 'train'", ["crow"]),
        ("classes: 1 of the 6 in 'train' but not in 'val'", ["cow"]),
        ("classes: 2 of the 6 without any picture", ["dot", "elk"]),
        ("unreadable: 1 of the 7 pictures of 'val'", [f"{root}/val/ant/broken.png is not"]),
    ):
        (names,) = (found[full] for full in found if sentence in full)
        assert len(names) == len(examples), sentence
        assert all(map(str.startswith, names, examples)) and sentence in output


def test_single_class_and_missing_splits_are_errors_of_the_report(write_folder, run_check):
    root = write_folder({"train": 3, "val": 2}, classes=("ant",))
    code, output, report = run_check(f"--source={root}")
    assert code == 45 and "has a single class, 'ant'" in output and len(report["problems"]) == 1
    assert [split["pictures"] for split in report["splits"]] == [3, 2]
    root = write_folder({"new/train": 3})
    code, output, report = run_check(f"--source={root}/new")
    assert code == 45 and "there is nothing to evaluate on but 'train'" in output
    assert report["splits"][0]["pictures"] == 6


def test_pictures_without_classes_are_no_error_where_nobody_evaluates_on_them(
    write_folder, run_check
):
    root = write_folder({"train": 3, "val": 2})
    (root / "test").mkdir()
    (root / "test/1.png").write_bytes(encode(picture(77)))
    code, output, _ = run_check(f"--source={root}")
    assert code == 0 and "WARNING: " in output and "test has images (1) but no class" in output
    (root / "val").rename(root / "elsewhere")
    assert run_check(f"--source={root}")[0] == 45


def test_ignored_files_are_counted_and_named(write_folder, run_check):
    root = write_folder({"train": 3, "val": 2})
    passed_over = ("train/ant/a.avif", "val/bee/b.HEIC", "train/c.png", "d.jpg")
    others = ("train/ant/notes.txt", "labels.csv", "val/README")
    for name in (*passed_over, *others, "train/ant/.hidden.avif"):
        (root / name).write_bytes(b"x")
    code, output, report = run_check(f"--source={root}")
    assert code == 0 and "0 errors, 1 warning" in output
    for line in (
        "ignored: 2 whose format is not read (.avif, .heic) and 2 beside the folders of the",
        "ignored: 3 files that are no pictures (",
        *passed_over,
    ):
        assert line in output, output
    ignored = report["ignored"]
    assert ignored["not_read"] == ["train/ant/a.avif", "val/bee/b.HEIC"]
    assert ignored["misplaced"] == ["d.jpg", "train/c.png"]
    assert sorted(ignored["others"]) == sorted(others)


def test_training_says_in_a_line_that_pictures_are_ignored(write_folder, tiny_config):
    root = write_folder({"train": 8, "val": 2})
    config = tiny_config(
        data__name="folder",
        data__path=str(root),
        data__image_shape=None,
        data__num_classes=None,
        data__num_examples=None,
        image_size=8,
    )
    (root / "labels.csv").touch()
    assert build.make_experiment(config, sharding.make_mesh()).notes == ()
    for name in ("train/ant/a.avif", "val/bee/b.avif", "val/c.png"):
        (root / name).touch()
    assert build.make_experiment(config, sharding.make_mesh()).notes == (
        "pictures that are ignored: 2 whose format is not read (.avif) and 1 beside the folders of "
        "the classes, such as train/ant/a.avif",
    )


def test_split_of_a_list_that_lacks_a_class_is_checked(write_folder, run_check):
    root = write_folder({"train": 4, "val": 2})
    rows = [f"train/ant/{n}.png,ant,train" for n in range(4)]
    rows += [f"train/bee/{n}.png,bee,train" for n in range(4)]
    rows += ["val/ant/0.png,ant,val", "val/bee/0.png,cow,test", "val/bee/1.png,bee,test"]
    (root / "list.csv").write_text("\n".join(rows))
    code, output, report = run_check(f"--source={root}/list.csv")
    assert code == 45 and report["classes"] == ["ant", "bee", "cow"]
    assert "class 'bee' is in split 'train' of" in output
    assert "classes: 1 of the 3 in 'test' but not in 'train'" in output
    assert [split["pictures"] for split in report["splits"]] == [8, 2, 1]


def test_flipped_label_in_a_tfrecord_file_is_found_by_its_checksum(
    write_dataset, run_check, tmp_path
):
    write_dataset(shards={"train": [40, 40], "test": [9]})
    arguments = ("--source=tiny", f"--config.data.dir={tmp_path}", "--config.input.max_broken=0.5")
    assert run_check(*arguments)[0] == 0
    source = open_source("tiny", "train", data_dir=tmp_path)
    path = tmp_path / "tiny/1.0.0/tiny-train.tfrecord-00001-of-00002"
    image, label = source[50]
    record = tf_example_pb2.Example.FromString(source._records[50])
    assert record.features.feature["label"].int64_list.value.pop() == label
    record.features.feature["label"].int64_list.value.append((label + 1) % 3)
    whole, other = source._records[50], record.SerializeToString()
    assert len(other) == len(whole) and path.read_bytes().count(whole) == 1
    path.write_bytes(path.read_bytes().replace(whole, other))
    code, output, report = run_check(*arguments)
    assert "unreadable: 1 of the 80 pictures of 'train'" in output and code == 0
    (name,) = report["problems"][0]["examples"]
    assert name.startswith(f"{path} is damaged: the checksum of the record at byte ")
    assert run_check(*arguments[:2])[0] == 45


def test_split_without_labels_is_a_warning():
    unlabelled = [(image, -1) for image, _ in pictures(10, 5000)]
    (problem,) = problems_of(pictures(30), unlabelled)
    assert not problem.is_error and problem.sentence.startswith("no labels: 10 of the 10 pictures")


def test_brackets_in_names_are_shown_as_they_are(write_folder, run_check):
    root = write_folder({"train": 3, "val": 2}, classes=("ant [red]", "bee [b]"))
    _, output, _ = run_check(f"--source={root}", "--config.data.eval_split=val[:4]")
    for name in ("ant [red]", "bee [b]", "val[:4]"):
        assert name in output


def test_many_classes_are_shown_as_the_largest_and_the_smallest(run_check):
    arguments = ["--config.data.name=fake", "--config.data.num_classes=300"]
    arguments += ["--config.data.num_examples=1250", "--config.data.image_shape=(4, 4, 1)"]
    code, output, report = run_check(*arguments)
    assert code == 0
    lines = output.splitlines()
    assert sum(line.strip().startswith("class_") for line in lines) == 19
    assert any("281 classes between" in line and "4 to 5" in line for line in lines)
    assert sum(report["splits"][0]["class_counts"]) == 1250


def test_real_process_ends_with_the_exit_code(write_folder, run_main):
    root = write_folder({"train": 3, "val": 2})
    arguments = ["check", f"--source={root}", "--config.data.eval_split=val"]
    assert run_main(*arguments, module="flaxcls.data").returncode == 0
    (root / "val/bee/broken.jpg").write_bytes(b"")
    result = run_main(*arguments, module="flaxcls.data")
    assert result.returncode == 45
    assert f"{root}/val/bee/broken.jpg is not a readable image (0 bytes)" in result.stdout


def test_help_is_fast_and_unknown_commands_are_one_sentence(run_main):
    for arguments in (["--help"], ["check", "--help"]):
        result = run_main(*arguments, module="flaxcls.data")
        assert result.returncode == 0 and "python -m flaxcls.data check" in result.stdout
        assert result.seconds < 3
    for arguments, sentence in (
        ([], "a command is missing; known: check, prepare, preview"),
        (["chekc"], "'chekc' is not a command, did you mean 'check'?"),
        (["check"], "--source=NAME-or-PATH is missing"),
        (["check", "--source=digits", "--threads=0"], "threads"),
        (["check", "--source=digits", "--json=/nowhere/report.json"], "does not exist"),
    ):
        result = run_main(*arguments, module="flaxcls.data")
        assert result.returncode == 2 and sentence in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_source_is_a_name_a_folder_or_a_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("pictures/train/ant", "digits", "mnist", "tfds/cifar10/3.0.2"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "mnist/train-images-idx3-ubyte.gz").touch()
    (tmp_path / "tfds/cifar10/3.0.2/dataset_info.json").touch()
    for source, expected in {
        "digits": ["data.name=digits"],  # though there is a folder of that name
        "cifar10:3.0.2": ["data.name=cifar10:3.0.2"],
        "ds/config": ["data.name=ds/config"],
        "pictures": ["data.name=folder", "data.path=pictures"],
        f"{tmp_path}/pictures": ["data.name=folder", f"data.path={tmp_path}/pictures"],
        "a/list.CSV": ["data.name=list", "data.path=a/list.CSV"],
        "list.jsonl": ["data.name=list", "data.path=list.jsonl"],
        "mnist": ["data.name=idx", "data.path=mnist"],
    }.items():
        assert source_overrides(source) == expected
    for name, message in (
        ("pictures.zip", "is an archive: unpack it, and give the folder that comes out of it"),
        ("mnist/train-images-idx3-ubyte.gz", "is one of the files of a data set"),
        ("recipe.py", "is a recipe: give it as --config=recipe.py"),
        ("a.JPG", "is a picture: give the folder whose folders are the classes"),
        ("mnist/t10k-labels-idx1-ubyte", "is one of the files of a data set: give their folder"),
        ("notes.txt", "is a file, but no list of pictures, whose name ends in .csv or .jsonl"),
    ):
        (tmp_path / name).touch()
        with pytest.raises(ConfigError, match=f"^--source={name} {message}"):
            source_overrides(name)
    with pytest.raises(ConfigError, match="^--source=L/k.zip does not exist$"):
        source_overrides("L/k.zip")
    with pytest.raises(ConfigError, match="there is no folder ./picture"):
        source_overrides("./picture")
    with pytest.raises(ConfigError, match="is a data set of TFDS: give its name as --source"):
        source_overrides("tfds/cifar10")
    monkeypatch.chdir(tmp_path / "tfds")
    assert source_overrides("cifar10") == ["data.name=cifar10"]


def test_unknown_data_set_is_named_before_the_options_it_would_not_take(tmp_path):
    for name, hint in (("foo", ""), ("foldr", ", did you mean 'folder'"), ("cifar1", "")):
        config = cli.load_config(None, [f"data.name={name}", "data.path=x", f"data.dir={tmp_path}"])
        with pytest.raises(ConfigError, match=f"^unknown data set '{name}'{hint}"):
            build.source(config, "train")
    for name in ("cifar10", "tiny"):
        (tmp_path / "tiny/1.0.0").mkdir(parents=True, exist_ok=True)
        (tmp_path / "tiny/1.0.0/features.json").touch()
        config = cli.load_config(None, [f"data.name={name}", "data.path=x", f"data.dir={tmp_path}"])
        with pytest.raises(ConfigError, match=f"config.data.path is not used by {name}; it takes"):
            build.source(config, "train")


def test_overrides_win_over_the_recipe_and_the_source(recipe):
    config = cli.load_config(None, [*source_overrides("fake"), "data.train_split=test"])
    assert (config.data.name, config.data.train_split) == ("fake", "test")
    config = cli.load_config(str(recipe), source_overrides("fake"))
    assert (config.data.name, config.data.eval_split) == ("fake", "test[:50]")
