"""A prepared data set holds the same pictures, smaller; it is there whole or not at all."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from flaxcls import cli
from flaxcls.data import __main__ as commands
from flaxcls.data import open_source, writer
from flaxcls.data.commands import prepare
from flaxcls.data.decode import decode, read_header
from flaxcls.data.source import Example, Source
from flaxcls.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
ROTATED = Image.Exif()
ROTATED[0x0112] = 6


class Listed(Source):
    """A list of (image, label) as a source."""

    def __init__(self, examples, split="train", shape=(None, None, 3), fingerprint="a"):
        super().__init__(
            name="listed",
            split=split,
            class_names=["ant", "bee eater", "çöw"],
            image_shape=shape,
            fingerprint=fingerprint,
        )
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return Example(*self.examples[index])


def smooth(seed, height, width, channels=3):
    """Something like a photograph: it survives JPEG."""
    noise = np.random.default_rng(seed).integers(0, 256, (3, 3, channels), np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC).reshape(
        height, width, channels
    )


def save(image, file_format, mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).convert(mode).save(file, file_format, **options)
    return file.getvalue()


def photos(count, first=0):
    """JPEGs of many sizes, about a third of them small; labels 0, 1, 2, 0, ..."""
    sizes = [(30 + 7 * (seed % 5), 25 + 9 * (seed % 7)) for seed in range(first, first + count)]
    images = [save(smooth(first + n, *size), "JPEG") for n, size in enumerate(sizes)]
    return [(image, number % 3) for number, image in enumerate(images)]


def run(tmp_path, train, evaluation=None, name="small", threads=2, max_broken=0.0, **recipe):
    """Prepares TMP/small at 32 pixels a short side; returns what was done."""
    evaluation = evaluation or photos(4, 900)
    train = train if isinstance(train, Source) else Listed(train, "train")
    return prepare.prepare(
        train,
        Listed(evaluation, "test", train.image_shape),
        tmp_path / name,
        prepare.Recipe(**{"short_side": 32, **recipe}),
        max_broken=max_broken,
        threads=threads,
    )


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_nothing_there(tmp_path, name="small"):
    assert not (tmp_path / name).exists()
    with pytest.raises(ConfigError, match="unknown data set"):
        open_source(name, "train", data_dir=tmp_path)


@pytest.fixture
def run_prepare(capsys):
    """Runs the command in this process: its output."""

    def runner(*arguments):
        for name in prepare.FLAGS:
            prepare.FLAGS[name].unparse()
        assert commands.main(["data", "prepare", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return runner


def test_every_example_comes_back_in_order_and_small(tmp_path):
    examples = photos(50)
    totals = run(tmp_path, examples)
    source = open_source("small", "train", data_dir=tmp_path)
    assert source.class_names == ("ant", "bee eater", "çöw")
    assert source.image_shape == (None, None, 3)
    assert source.labels().tolist() == [label for _, label in examples]
    for index, (before, _) in enumerate(examples):
        old, new = decode(before, 3), decode(source[index].image, 3)
        assert min(new.shape[:2]) == min(32, *old.shape[:2])
        wanted = prepare.shrunk(*old.shape[:2], 32)
        expected = Image.fromarray(old).resize(wanted[::-1], Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(expected, np.int32) - new).mean() < 4
    assert totals["train"].written == 50 and totals["test"].written == 4
    assert totals["train"].bytes == sum(len(source[i].image) for i in range(50))
    assert len(open_source("small", "test", data_dir=tmp_path)) == 4


def test_small_pictures_keep_their_bytes(tmp_path):
    kept = [
        save(smooth(1, 20, 90), "JPEG"),
        save(smooth(2, 32, 32), "PNG"),
        save(smooth(3, 5, 7, 1), "PNG", "L"),
        save(smooth(4, 31, 64), "JPEG", "L"),
    ]
    totals = run(tmp_path, [(image, 0) for image in kept])
    source = open_source("small", "train", data_dir=tmp_path)
    assert [source[index].image for index in range(4)] == kept
    assert totals["train"].kept == 4


@pytest.mark.parametrize(
    "image, file_format, tolerance",
    [
        (save(smooth(1, 20, 30), "JPEG", exif=ROTATED), "JPEG", 3),
        (save(smooth(2, 20, 30), "JPEG", "CMYK"), "JPEG", 3),
        (save(smooth(3, 20, 30), "WEBP", quality=80), "JPEG", 3),
        (save(smooth(4, 20, 30), "PNG", "P"), "PNG", 0),
        (save(smooth(5, 20, 30), "PNG", "RGBA"), "PNG", 0),
        (save(smooth(6, 20, 30), "BMP"), "PNG", 0),
        (save(smooth(7, 20, 30), "GIF"), "PNG", 0),
        (save(smooth(8, 20, 30), "TIFF"), "PNG", 0),
    ],
)
def test_other_small_pictures_become_plain_and_look_the_same(image, file_format, tolerance):
    stored = prepare.smaller(image, 3, prepare.Recipe(32))
    header = read_header(stored)
    assert (header.format, header.mode, header.orientation) == (file_format, "RGB", 1)
    old, new = decode(image, 3).astype(int), decode(stored, 3)
    assert old.shape == new.shape and np.abs(old - new).mean() <= tolerance


def test_rotated_pictures_are_upright_after_resizing():
    image = smooth(0, 100, 60)
    stored = prepare.smaller(save(image, "JPEG", exif=ROTATED), 3, prepare.Recipe(32))
    header = read_header(stored)
    assert (header.height, header.width, header.orientation) == (32, 53, 1)
    expected = Image.fromarray(np.rot90(image, -1).copy()).resize((53, 32))
    assert np.abs(np.asarray(expected, int) - decode(stored, 3)).mean() < 4


@pytest.mark.parametrize("channels", [1, 3])
def test_large_pictures_decoded_at_a_fraction_look_the_same(channels):
    """JPEG's own reduction by 2, 4 and 8, which leaves three times the side at least."""
    for short_side in (20, 40, 81):
        image = save(smooth(3, 500, 701, channels), "JPEG", "RGB" if channels == 3 else "L")
        stored = decode(prepare.smaller(image, channels, prepare.Recipe(short_side, 100)), channels)
        full = Image.fromarray(decode(image, channels).squeeze())
        size = prepare.shrunk(500, 701, short_side)
        expected = np.asarray(full.resize(size[::-1], Image.Resampling.BICUBIC))
        expected = decode(prepare._encode(expected, ".jpg", prepare.Recipe(quality=100)), channels)
        difference = np.abs(expected.astype(int) - stored)
        assert difference.mean() < 1 and difference.max() <= 6


def test_quality_is_that_of_the_jpegs():
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)
    sizes = [len(prepare.smaller(noise, 3, prepare.Recipe(60, q))) for q in (50, 90, 100)]
    assert 1.5 * sizes[0] < sizes[1] and 1.5 * sizes[1] < sizes[2]


def test_pixels_without_a_file_are_stored_without_loss(tmp_path):
    images = [np.random.default_rng(n).integers(0, 256, (9, 8, 1), np.uint8) for n in range(6)]
    examples = [(image, n % 3) for n, image in enumerate(images)]
    run(tmp_path, Listed(examples, shape=(9, 8, 1)), examples[:2])
    source = open_source("small", "train", data_dir=tmp_path)
    assert source.image_shape == (9, 8, 1)  # so that they still can lie on the device
    for index, image in enumerate(images):
        np.testing.assert_array_equal(decode(source[index].image, 1), image)


def test_large_pixels_of_one_size_keep_one_size(tmp_path):
    examples = [(smooth(n, 64, 100), 0) for n in range(3)]
    run(tmp_path, Listed(examples, shape=(64, 100, 3)), examples)
    source = open_source("small", "train", data_dir=tmp_path)
    assert source.image_shape == (32, 50, 3)
    assert decode(source[0].image, 3).shape == (32, 50, 3)


def test_result_is_the_same_bytes_for_any_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_BYTES", 9000)
    for name, threads in (("one", 1), ("four", 4)):
        run(tmp_path / name, photos(60), threads=threads)
    first, second = contents(tmp_path / "one"), contents(tmp_path / "four")
    assert first == second
    assert sum("train.array_record" in path.name for path in first) > 3


def test_shards_have_about_their_size_and_keep_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_BYTES", 10_000)
    examples = photos(100)
    run(tmp_path, examples)
    shards = sorted((tmp_path / "small/1.0.0").glob("*train*"))
    images = run(tmp_path, examples, name="other")["train"].bytes
    assert len(shards) == pytest.approx(images / 10_000, abs=1.5)
    source = open_source("small", "train", data_dir=tmp_path)
    assert source.labels().tolist() == [label for _, label in examples]


def test_broken_pictures_are_refused_with_their_names(tmp_path):
    train = [*photos(30), (b"junk", 0), *photos(20, 50), (photos(1)[0][0][:300], 1)]
    with pytest.raises(DataError) as refusal:
        run(tmp_path, train, [*photos(3), (b"", 0)], max_broken=0.01)
    text = str(refusal.value)
    assert text.startswith(
        "2 pictures of 'train' can't be read, and config.input.max_broken = 0.01"
    )
    for number in (30, 51):
        assert f"example {number} of listed 'train' is not a readable image" in text
    assert_nothing_there(tmp_path)

    with pytest.raises(DataError, match="1 pictures of 'test' can't be read, and none may") as no:
        run(tmp_path, train, [*photos(3), (b"", 0)], max_broken=0.5)
    assert "example 3 of listed 'test'" in str(no.value)
    assert_nothing_there(tmp_path)


def test_few_broken_training_pictures_are_left_out_and_listed(tmp_path):
    train = [*photos(30), (b"junk", 0), *photos(19, 50)]
    totals = run(tmp_path, train, max_broken=0.02)
    assert totals["train"].written == 49
    source = open_source("small", "train", data_dir=tmp_path)
    assert source.labels().tolist() == [label for image, label in train if image != b"junk"]
    note = json.loads((tmp_path / "small/1.0.0/prepared.json").read_text())
    (sentence,) = note["left_out"]["train"]
    assert sentence.startswith("example 30 of listed 'train' is not")
    assert totals["train"].left_out == [sentence] and note["left_out"]["test"] == []


def test_label_that_is_no_class_is_refused(tmp_path):
    with pytest.raises(DataError, match="example 9 of listed 'train' has label 3, but there are 3"):
        run(tmp_path, [*photos(9), (photos(1)[0][0], 3)], max_broken=1.0)
    assert_nothing_there(tmp_path)


def test_class_names_that_tfds_would_change_are_refused(tmp_path):
    for name in ("two\nlines", " space", "", "\udcff"):
        source = Listed(photos(3))
        source.class_names = ("ant", name, "cow")
        with pytest.raises(ConfigError, match="can't be written: TFDS has names of one line"):
            run(tmp_path, source)


def test_same_again_is_already_prepared_and_another_is_refused(tmp_path):
    examples = photos(6)
    run(tmp_path, examples)
    before = contents(tmp_path)
    assert run(tmp_path, examples) is None
    for changed in (
        lambda: run(tmp_path, examples, quality=80),
        lambda: run(tmp_path, examples, short_side=31),
        lambda: run(tmp_path, Listed(examples, fingerprint="b")),
    ):
        with pytest.raises(ConfigError, match="exists and is not what this command would write"):
            changed()
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert run(tmp_path, examples, name="empty")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/file").touch()
    with pytest.raises(ConfigError, match="exists and is not"):
        run(tmp_path, examples, name="foreign")


def test_another_process_that_writes_the_same_is_noticed(tmp_path):
    with (
        writer.DatasetWriter(tmp_path / "small", {}),
        pytest.raises(ConfigError, match="another process is writing"),
    ):
        run(tmp_path, photos(3))
    assert run(tmp_path, photos(3))


def test_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="can't be written: Not a directory"):
        run(tmp_path / "file", photos(3))
    if os.geteuid():  # nothing is read-only to root
        (tmp_path / "read_only").mkdir(mode=0o500)
        with pytest.raises(ConfigError, match="can't be written: Permission denied"):
            run(tmp_path / "read_only", photos(3))


DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import tensorflow_datasets, test_prepare
import array_record.python.array_record_data_source
from flaxcls.data import tfds, writer
from flaxcls.data.commands import prepare

out, examples = Path(sys.argv[1]), test_prepare.photos(60)
prepare.SHARD_BYTES = 25_000


def attempt(folder, **changes):
    "A child that prepares the data set; its process id."
    child = os.fork()
    if not child:
        for name, count in changes.items():  # at which call of it the process is killed
            module, _, function = name.partition("__")
            module = {{"os": os, "writer": writer}}[module]
            real = getattr(module, function)

            def killed(*arguments, real=real, left=[count], **options):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            setattr(module, function, killed)
        try:
            test_prepare.run(folder, examples)
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    return child


def finished(child):
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code == 0


def check(folder):
    "Nothing is there, or all of it."
    if (folder / "small").exists():
        assert test_prepare.contents(folder / "small") == whole
    else:
        assert tfds.find_prepared("small", folder) is None


assert finished(attempt(out / "whole"))
whole = test_prepare.contents(out / "whole/small")
"""


def drive(tmp_path, script):
    """Runs a script that forks: a process of its own, without JAX and its threads."""
    head = DRIVER.format(root=str(ROOT), tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", head + script, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_to_the_same_bytes(tmp_path):
    """Killed before every single rename, synchronisation and removal."""
    output = drive(
        tmp_path,
        """
kills = 0
for call in ("os__replace", "os__rename", "os__fsync", "os__unlink", "writer___remove_staging"):
    for count in range(1, 1000):
        folder = out / f"{call}-{count}"
        if finished(attempt(folder, **{call: count})):
            break
        kills += 1
        check(folder)
        assert finished(attempt(folder))
        check(folder)
        assert [p.name for p in folder.iterdir()] == ["small"]
print(kills)
""",
    )
    assert int(output) > 25


@pytest.mark.slow
def test_killed_again_and_again_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    drive(
        tmp_path,
        """
# A kill that comes too late is none: as many folders as it takes, however fast the machine is.
kills, folders = 0, 0
while kills < 12:
    folders += 1
    folder, moments = out / str(folders), random.Random(folders)
    for attempts in range(100):
        child = attempt(folder)
        if attempts < 50:  # then it is left to finish, however slow the machine is
            time.sleep(moments.uniform(0, 0.25))
            os.kill(child, signal.SIGKILL)
        if finished(child):
            break
        kills += 1
        check(folder)
    check(folder)
    assert (folder / "small").exists() and folders < 100
""",
    )


def test_interrupted_work_is_used_only_for_the_same_data_and_options(tmp_path):
    drive(
        tmp_path,
        """
folder = out / "again"
assert not finished(attempt(folder, os__rename=1))
shards = list(folder.glob(".small.incomplete/small/1.0.0/*train*"))
assert len(shards) > 1
before = {path.name: path.stat().st_ino for path in shards}
assert finished(attempt(folder))
assert {p.name: p.stat().st_ino for p in folder.glob("small/1.0.0/*train*")} == before

folder = out / "other"
assert not finished(attempt(folder, os__rename=1))
examples = test_prepare.photos(60, 500)[::-1]
test_prepare.run(folder, test_prepare.Listed(examples, fingerprint="b"))
test_prepare.run(out / "fresh", test_prepare.Listed(examples, fingerprint="b"))
assert test_prepare.contents(folder) == test_prepare.contents(out / "fresh")
""",
    )


def test_full_disk_is_one_sentence_and_it_goes_on_when_there_is_room(tmp_path):
    """RLIMIT_FSIZE stands for a full disk: writing fails in the middle of a shard."""
    drive(
        tmp_path,
        """
import resource
from flaxcls.errors import ConfigError
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in (0, 20_000, 200_000):
    folder = out / str(limit)
    prepare.SHARD_BYTES = 100_000_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        test_prepare.run(folder, test_prepare.photos(400))
        sys.exit("nothing was noticed")
    except ConfigError as error:
        assert "small can't be written: " in str(error) and "File too large" in str(error), error
        assert len(str(error)) < 300
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert tfds.find_prepared("small", folder) is None
    assert not list(folder.glob(".small.incomplete/small/1.0.0/*"))
    test_prepare.run(folder, test_prepare.photos(400))
    assert tfds.find_prepared("small", folder)
""",
    )


@pytest.fixture
def pictures(tmp_path):
    """A folder of 12 pictures to train on and 6 to evaluate on."""
    for number, (image, label) in enumerate(photos(18)):
        folder = tmp_path / "My Pictures" / ("train" if number < 12 else "val") / "abc"[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(image)
    return tmp_path / "My Pictures"


def test_command_prints_the_flags_that_train_on_the_result(pictures, tmp_path, run_prepare):
    from flaxcls import build

    out = tmp_path / "out"
    arguments = [f"--source={pictures}", f"--out={out}", "--short_side=32"]
    arguments += ["--config.data.train_split=train[:50%]", "--config.data.eval_split=val"]
    text = run_prepare(*arguments)
    assert "train: 12 pictures" in text and "val: 6 pictures" in text
    flags = text.splitlines()[-1].split("flaxcls.main ")[1].replace("'", "").split()
    overrides, rest = cli.split_overrides(flags)
    assert rest == ["--config=FILE"]
    config = cli.load_config(None, overrides)
    assert config.data.name == "my_pictures_32"
    assert len(build.source(config, config.data.train_split)) == 6
    assert len(build.source(config, config.data.eval_split)) == 6
    assert f"{out}/my_pictures_32 is already prepared" in run_prepare(*arguments)


def test_recipe_of_a_folder_trains_on_the_prepared_data(pictures, tmp_path, run_prepare):
    from flaxcls import build

    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from flaxcls.config import default\n\n\ndef get_config():\n    config = default()\n"
        f"    config.data.name = 'folder'\n    config.data.path = {str(pictures)!r}\n"
        "    config.data.channels = 1\n    return config\n"
    )
    text = run_prepare(f"--config={recipe}", f"--out={tmp_path / 'out'}", "--name=grey")
    flags = text.splitlines()[-1].split("flaxcls.main ")[1].replace("'", "").split()
    overrides, rest = cli.split_overrides(flags)
    config = cli.load_config(rest[0].removeprefix("--config="), overrides)
    source = build.source(config, config.data.train_split)
    assert source.name == "grey" and source.image_shape == (None, None, 1) and len(source) == 12


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--source=digits"], "--out=DIR is missing"),
        (["--out=OUT"], "--source=NAME-or-PATH is missing"),
        (["--source=digits", "--out=ftpx://bucket"], "--out=ftpx://bucket has an unknown URL"),
        (["--source=digits", "--out=OUT", "--name=Big"], "--name must be letters"),
        (["--source=digits", "--out=OUT", "--name=folder"], "none of digits, fake, folder"),
        (
            ["--source=digits", "--out=OUT", "--config.data.eval_split=train[90%:]"],
            "are both of 'train'",
        ),
        (
            ["--source=digits", "--out=OUT", "--config.data.train_split=train+test"],
            "config.data.train_split must be a split or a slice of one to prepare",
        ),
        (["--source=digits", "--out=OUT", "--config.data.eval_split=val"], "'val'; there is"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence, tmp_path, run_prepare):
    arguments = [argument.replace("OUT", str(tmp_path / "out")) for argument in arguments]
    with pytest.raises(ConfigError) as error:
        run_prepare(*arguments)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_real_process_ends_with_the_exit_codes(pictures, tmp_path, run_main):
    arguments = ["prepare", f"--source={pictures}", f"--out={tmp_path / 'out'}"]
    arguments += ["--config.data.eval_split=val"]
    broken = pictures / "val/a/broken.jpg"
    broken.write_bytes(b"broken")
    result = run_main(*arguments, module="flaxcls.data")
    assert result.returncode == 45 and f"{broken} is not a readable image" in result.stderr
    assert "Traceback" not in result.stderr and not list((tmp_path / "out").glob("[!.]*"))
    broken.unlink()
    result = run_main(*arguments, module="flaxcls.data")
    assert result.returncode == 0 and "To train on it" in result.stdout
    result = run_main(*arguments, "--quality=80", module="flaxcls.data")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
