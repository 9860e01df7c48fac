"""Data in a bucket are those on a disk: the same examples, fingerprints and sentences."""

import contextlib
import functools
import gzip
import itertools
import json
import pickle
import struct
import sys
import threading
import time
from pathlib import Path

import cv2
import fsspec
import numpy as np
import pytest

from flaxcls import cli, remote
from flaxcls.data import naming, open_source
from flaxcls.data.commands import prepare
from flaxcls.data.folds import read_groups
from flaxcls.data.loader import Loader, materialize
from flaxcls.data.stream import default_workers
from flaxcls.data.workers import Threads
from flaxcls.errors import ConfigError, DataError, UnreachableError
from flaxcls.training.train import train_config


def png(value: int) -> bytes:
    return cv2.imencode(".png", np.full((6, 5, 3), value, np.uint8))[1].tobytes()


@pytest.fixture
def pets(tmp_path):
    """Folders of splits, some of whose files are no examples; "val" has 3 pictures, "train" 9."""
    root, value = tmp_path / "pets", 0
    for split, counts in {"train": (5, 4), "val": (1, 2)}.items():
        for name, count in zip(("cat", "dög a#?%"), counts, strict=True):
            for number in range(count):
                path = root / split / name / f"{number % 2}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(value := value + 1))
    for name in ("train/cat/note.txt", "train/cat/.hidden.png", "train/dög a#?%/@eaDir/x.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "train/loose.png").write_bytes(png(0))
    (root / "train/cat/photo.heic").write_bytes(b"x")
    return root


@pytest.fixture
def put(bucket):
    """Copies a folder's files into the bucket, under the folder's name."""

    def copy(folder: Path) -> str:
        for path in filter(Path.is_file, folder.rglob("*")):
            remote.write(f"{bucket}/{folder.name}/{path.relative_to(folder)}", path.read_bytes())
        return f"{bucket}/{folder.name}"

    return copy


def examples(source):
    return [source[index] for index in range(len(source))]


def test_a_folder_of_pictures_is_the_same(pets, put, bucket_server):
    path = put(pets)
    for split in ("train", "val", "train[:50%]+val"):
        there = open_source("folder", split, path=path)
        here = open_source("folder", split, path=str(pets))
        assert there.fingerprint == here.fingerprint
        assert examples(there) == examples(here)
        assert (there.ignored, there.splits) == (here.ignored, here.splits)
        assert pickle.loads(pickle.dumps(there))[0] == here[0]
    assert there.where(0).startswith(f"{path}/train/")
    modified, where = there.modified
    assert abs(modified - time.time()) < 60 and where.startswith(path)


def test_a_folder_takes_few_requests_and_a_picture_one(pets, put, bucket_server):
    path = put(pets)
    bucket_server.requests()
    source = open_source("folder", "train", path=path)
    listing = len(bucket_server.requests())
    for number in range(40):
        remote.write(f"{path}/train/cat/more/{number}.png", png(number))
    bucket_server.requests()
    more = open_source("folder", "train", path=path)
    assert len(more) == len(source) + 40
    assert len(bucket_server.requests()) <= listing + 2 < 16
    examples(source)
    assert bucket_server.reads() == len(source)


def test_a_folder_without_splits_and_its_broken_pictures(tmp_path, put):
    for name in ("ant", "bee"):
        (tmp_path / "flat" / name).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "flat" / name / f"{number}.png").write_bytes(png(number))
    (tmp_path / "flat/ant/empty.png").touch()
    path = put(tmp_path / "flat")
    for split in ("train", "validation"):
        there = open_source("folder", split, path=path, max_bytes=1000)
        here = open_source("folder", split, path=str(tmp_path / "flat"), max_bytes=1000)
        assert there.fingerprint == here.fingerprint and examples(there) == examples(here)
    small = open_source("folder", "train", path=path, max_bytes=50)
    with pytest.raises(DataError, match=f"{path}/.*png has [0-9]+ bytes, more than the 50 that"):
        examples(small)
    fsspec.core.url_to_fs(path)[0].rm(path, recursive=True)
    with pytest.raises(DataError, match=f"^{path}/.*png cannot be read: No such file or directory"):
        there[0]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_list_in_a_bucket_names_pictures_anywhere(pets, put, bucket, tmp_path, form):
    path = put(pets)
    names = ["../pets/train/cat/0/0.png", f"{path}/train/cat/1/1.png"]
    names += [str(pets / "val/cat/0/0.png"), "../pets/train/loose.png"]
    rows = [(name, label) for name, label in zip(names, "abab", strict=True)]
    lines = [f"{name},{label}\n" for name, label in rows]
    if form == "jsonl":
        lines = [json.dumps({"path": name, "label": label}) + "\n" for name, label in rows]
    remote.write(f"{bucket}/lists/mine.{form}", "".join(lines).encode())
    source = open_source("list", "train+val", path=f"{bucket}/lists/mine.{form}")
    wanted = [(pets / "train/cat/0/0.png").read_bytes(), (pets / "train/cat/1/1.png").read_bytes()]
    wanted += [(pets / "val/cat/0/0.png").read_bytes(), (pets / "train/loose.png").read_bytes()]
    assert sorted(examples(source)) == sorted(zip(wanted, (0, 1, 0, 1), strict=True))
    (tmp_path / "here.csv").write_text(f"{path}/train/loose.png,a\n{path}/train/cat/0/0.png,b\n")
    there = open_source("list", "all", path=str(tmp_path / "here.csv"))
    assert sorted(image for image, _ in examples(there)) == sorted([wanted[0], wanted[3]])
    with pytest.raises(DataError, match=f"{path}/train/.*png has [0-9]+ bytes, more than the 9 "):
        open_source("list", "all", path=str(tmp_path / "here.csv"), max_bytes=9)[0]
    remote.write(f"{bucket}/lists/bad.csv", b"a.png,x\nb.png\n")
    with pytest.raises(DataError, match=f"{bucket}/lists/bad.csv, line 2: must be path,label"):
        open_source("list", "train", path=f"{bucket}/lists/bad.csv")


def test_folds_by_groups_in_a_bucket(pets, put, bucket):
    path = put(pets)
    source = open_source("folder", "train", path=path)
    names = [source.file(index) for index in range(len(source))]
    for written in (names, [name.removeprefix(f"{path}/") for name in names]):
        rows = [f'"{name}",{number % 3}' for number, name in enumerate(written)]
        remote.write(f"{path}/groups.csv", "\n".join(["file,group", *rows]).encode())
        found = read_groups(f"{path}/groups.csv", source)
        assert found.tolist() == [number % 3 for number in range(len(source))]


def test_idx_files_and_what_a_path_holds(tmp_path, pets, put, bucket):
    folder = tmp_path / "mnist"
    folder.mkdir()
    images = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    content = struct.pack(">4B3I", 0, 0, 8, 3, 3, 4, 4) + images.tobytes()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 3) + b"\0\1\2")
    path = put(folder)
    there, here = (open_source("idx", "train", path=str(p)) for p in (path, folder))
    assert there.fingerprint == here.fingerprint and len(there) == 3
    with pytest.raises(ConfigError, match=f"{path} has no t10k-images-idx3-ubyte, compressed"):
        open_source("idx", "test", path=path)
    assert naming.name_and_path(path) == {"name": "idx", "path": path}
    pets_path = put(pets)
    assert naming.name_and_path(pets_path) == {"name": "folder", "path": pets_path}
    assert naming.name_and_path(f"{bucket}/x.csv") == {"name": "list", "path": f"{bucket}/x.csv"}
    remote.write(f"{bucket}/sets/tiny/1.0.0/dataset_info.json", b"{}")
    with pytest.raises(ConfigError, match=f"{bucket}/sets is a data set of TFDS: give its name"):
        naming.name_and_path(f"{bucket}/sets")
    found = cli.all_pictures([f"{pets_path}/val", f"{pets_path}/train/loose.png"])
    local = cli.all_pictures([str(pets / "val"), str(pets / "train/loose.png")])
    assert [name.removeprefix(pets_path) for name in found] == [
        name.removeprefix(str(pets)) for name in local
    ]


def test_what_is_not_there_is_a_sentence(bucket, put, pets):
    remote.write(f"{bucket}/file.txt", b"x")
    for path, what in (
        (f"{bucket}/nothing", "does not exist"),
        (f"{bucket}/file.txt", "is a file"),
        (f"{bucket}x/data", "can't be reached: there is no such bucket"),
    ):
        message = f"^config.data.path must be a folder of pictures, but {path} {what}$"
        with pytest.raises(ConfigError, match=message):
            open_source("folder", "train", path=path)
    with pytest.raises(ConfigError, match="list.csv cannot be read: No such file or directory"):
        open_source("list", "train", path=f"{bucket}/list.csv")
    with pytest.raises(ConfigError, match=f"{bucket}x can't be reached: there is no such bucket"):
        naming.name_and_path(f"{bucket}x")


def test_what_is_not_installed_is_named(monkeypatch):
    for package, path, extra in (("gcsfs", "gs://b/x", "cloud"), ("s3fs", "s3://b/x", "s3")):
        monkeypatch.setitem(sys.modules, package, None)
        protocol = path.partition(":")[0]
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
        message = rf"^{path} cannot be reached: pip install 'flaxcls\[{extra}\]'$"
        with pytest.raises(ConfigError, match=message):
            open_source("folder", "train", path=path)
    with pytest.raises(ConfigError, match="^ftpx://b/x has an unknown URL scheme$"):
        open_source("folder", "train", path="ftpx://b/x")


@pytest.mark.parametrize("form", ["tfrecord", "array_record"])
def test_data_of_tfds_are_the_same(write_dataset, tmp_path, put, bucket, bucket_server, form):
    write_dataset(form)
    put(tmp_path / "tiny")
    here = open_source("tiny", "train[2:-1]+test", data_dir=tmp_path)
    there = open_source("tiny", "train[2:-1]+test", data_dir=bucket)
    assert (there.fingerprint, there.class_names) == (here.fingerprint, here.class_names)
    bucket_server.requests()
    assert examples(there) == examples(here)
    assert bucket_server.reads() == len(here)
    with pytest.raises(ConfigError, match=f"^other is not in {bucket}: prepare it in a local fold"):
        open_source("other", "train", data_dir=bucket)
    (shard, *_) = sorted((tmp_path / "tiny/1.0.0").glob(f"tiny-train.{form}*"))
    remote.write(f"{bucket}/tiny/1.0.0/{shard.name}", shard.read_bytes()[:-30])
    with pytest.raises(DataError, match=f"^{bucket}/tiny/1.0.0/{shard.name} is (cut|damaged)"):
        open_source("tiny", "train", data_dir=bucket)
    remote.remove(f"{bucket}/tiny/1.0.0/{shard.name}")
    message = f"^{bucket}/tiny/1.0.0/{shard.name} cannot be read: No such file or directory$"
    with pytest.raises(DataError, match=message):
        open_source("tiny", "train", data_dir=bucket)


@pytest.fixture
def prepare_pets(pets):
    """Prepares `pets` in three shards of 4 pixels; returns the exit code of the command."""

    def run(out, quality=90):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare, "SHARD_BYTES", 2000)
            return command(out, quality)

    def command(out, quality):
        flags = [f"--source={pets}", f"--out={out}", f"--quality={quality}", "--short_side=4"]
        return prepare.main(["prepare", *flags, "--config.data.eval_split=val", "--threads=2"])

    return run


class Interrupted(Exception):
    """The process is killed, as good as."""


@pytest.fixture
def interrupt():
    """Lets so many more files be written to the cloud, and then no more."""
    patch = pytest.MonkeyPatch()

    def after(count):
        patch.undo()
        left = itertools.count(count, -1)
        for name in ("write", "upload"):
            write = getattr(remote, name)

            def checked(*arguments, write=write):
                if next(left) <= 0:
                    raise Interrupted
                write(*arguments)

            patch.setattr(remote, name, checked)

    yield after
    patch.undo()


@pytest.mark.parametrize(
    "bucket", ["s3", pytest.param("gcs", marks=pytest.mark.torture)], indirect=True
)
def test_a_data_set_is_in_a_bucket_when_it_is_whole(prepare_pets, bucket, tmp_path, interrupt):
    prepare_pets(tmp_path / "here")
    here = [open_source("pets_4", split, data_dir=tmp_path / "here") for split in ("train", "val")]
    everything = 14  # begun.json twice, four shards with notes, four files of metadata
    points = (
        (*range(0, everything, 2), everything - 1)
        if bucket.startswith("gs:")
        else (5, everything - 1)
    )
    for point in points:
        out = f"{bucket}/{point}"
        interrupt(point)
        with pytest.raises(Interrupted):
            prepare_pets(out)
        with pytest.raises(ConfigError, match=f"pets_4 is not in {out}: prepare it"):
            open_source("pets_4", "train", data_dir=out)
        if point % 4 == 1:  # what is left is of other pictures: not to be used
            interrupt(point)
            with pytest.raises(Interrupted):
                prepare_pets(out, quality=50)
        interrupt(everything)
        prepare_pets(out)
    there = [open_source("pets_4", split, data_dir=out) for split in ("train", "val")]
    assert [each.fingerprint for each in there] == [each.fingerprint for each in here]
    assert list(map(examples, there)) == list(map(examples, here))
    assert not remote.entries(f"{out}/.pets_4.incomplete")
    interrupt(0)
    prepare_pets(out)  # once more does nothing
    with pytest.raises(ConfigError, match=f"^{out}/pets_4 exists and is not what this command"):
        prepare_pets(out, quality=50)
    interrupt(1)
    remote.write(f"{bucket}/other/pets_4/notes.txt", b"mine")
    with pytest.raises(ConfigError, match=f"^{bucket}/other/pets_4 exists and is not what this"):
        prepare_pets(f"{bucket}/other")


def test_two_that_prepare_something_else_don_t_mix(prepare_pets, bucket, monkeypatch):
    upload = remote.upload

    def upload_and_let_another_begin(source, path):
        upload(source, path)
        monkeypatch.setattr(remote, "upload", upload)
        prepare_pets(f"{bucket}/out", quality=50)

    monkeypatch.setattr(remote, "upload", upload_and_let_another_begin)
    with pytest.raises(ConfigError, match=f"another process is writing {bucket}/out/pets_4"):
        prepare_pets(f"{bucket}/out", quality=90)
    prepare_pets(f"{bucket}/out", quality=50)
    with pytest.raises(ConfigError, match="cannot be read: there is no such bucket|can't be writ"):
        prepare_pets(f"{bucket}x/out")


def test_who_may_not_read_is_told_what_gives_credentials(put, pets, bucket, bucket_server):
    path = put(pets)
    source = open_source("folder", "train", path=path)
    advice = "`gcloud auth application-default login`" if path[:2] == "gs" else "`aws configure`"
    bucket_server.faults(fail=10**6, status=403)
    denied = rf"access is denied \(.*\): {advice} or .* credentials$"
    where = f"^config.data.path must be a folder of pictures, but {path} can't be reached: "
    with pytest.raises(ConfigError, match=where + denied):
        open_source("folder", "train", path=path)
    with pytest.raises(DataError, match=f"^{path}/train/.*png cannot be read: {denied}"):
        source[0]
    with pytest.raises(ConfigError, match=f"^tiny in {bucket} cannot be read: {denied}"):
        open_source("tiny", "train", data_dir=bucket)
    with pytest.raises(ConfigError, match=f"^{path} can't be reached: {denied}"):
        naming.name_and_path(path)
    with pytest.raises(ConfigError, match=f"{bucket}/out/.* cannot be read: {denied}"):
        prepare.main(["prepare", "--source=digits", f"--out={bucket}/out"])
    bucket_server.faults(fail=2, status=503)
    assert source[0] == open_source("folder", "train", path=str(pets))[0]


def test_no_credentials_are_a_sentence(s3_bucket, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    message = "x can't be reached: there are no credentials: `aws configure` or AWS_ACCESS_KEY_ID"
    with pytest.raises(ConfigError, match=message):
        open_source("folder", "train", path=f"{s3_bucket}/x")


def test_a_store_that_is_down_ends_what_may_be_restarted(pets, put, bucket_server, monkeypatch):
    source = open_source("folder", "train", path=put(pets))
    loader, images = Loader(source), np.zeros((9, 6, 5, 3), np.uint8)
    fill = functools.partial(loader.fill, images, np.arange(9), np.zeros((9, 0)), substitute=True)
    bucket_server.faults(fail=10**6)
    if source.root.startswith("s3:"):  # whose client gives up after 12 seconds; the other's, 34
        monkeypatch.setattr(remote, "PATIENCE", 0)
        with pytest.raises(UnreachableError, match="png cannot be read: the store fails") as caught:
            fill()
        assert caught.value.exit_code == 1  # and no picture is replaced by another
    monkeypatch.setattr(remote, "PATIENCE", 60)
    threading.Timer(1, bucket_server.faults).start()
    assert fill()[0].tolist() == [*range(9)]


def test_latency_is_hidden_by_threads(tmp_path, put, bucket_server):
    for name in ("ant", "bee"):
        (tmp_path / "slow" / name).mkdir(parents=True)
        for number in range(30):
            (tmp_path / "slow" / name / f"{number}.png").write_bytes(png(number))
    source = open_source("folder", "all", path=put(tmp_path / "slow"))
    bucket_server.faults(seconds=0.2)
    began = time.perf_counter()
    images, labels = materialize(source)
    assert time.perf_counter() - began < 60 * 0.2 / 2
    assert sorted(images[:, 0, 0, 0].tolist()) == sorted([*range(30)] * 2) and labels.sum() == 30
    with contextlib.closing(Threads(Loader(source), default_workers(4, is_remote=True))) as pool:
        began = time.perf_counter()
        work = pool.start(np.arange(60), np.zeros((60, 0)), (6, 5, 3), False)
        assert np.array_equal(work.finish()[0], images)
        assert time.perf_counter() - began < 60 * 0.2 / 2


def test_training_is_the_same(pets, put, tiny_config, tmp_path):
    results = []
    for number, path in enumerate((str(pets), put(pets))):
        workdir = tmp_path / f"run{number}"
        config = tiny_config(
            **dict(data__name="folder", data__path=path, data__eval_split="val"),
            **dict(data__image_shape=None, data__num_classes=None, data__num_examples=None),
            **dict(batch_size=8, image_size=4, crop__name="random_resized_crop"),
            **dict(duration="3 steps", checkpoint__every="3 steps", eval__every="3 steps"),
        )
        train_config(config, workdir)
        results.append(json.loads((workdir / "summary.json").read_text())["eval"])
    assert results[0] == results[1]
