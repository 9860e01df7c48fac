import json
import os

import pytest

from flaxcls.errors import CheckpointError
from flaxcls.runs import manifest
from flaxcls.runs.manifest import Damaged


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "7"
    (folder / "state/d").mkdir(parents=True)
    (folder / "state/d/array").write_bytes(os.urandom(3_000_000))
    (folder / "state/empty").write_bytes(b"")
    (folder / "facts").write_text("{}")
    manifest.write(folder)
    return folder


def change(folder, changed):
    path = folder / manifest.NAME
    content = json.loads(path.read_text())
    changed(content["files"])
    path.write_text(json.dumps(content))


def test_a_folder_is_as_it_was_written(folder):
    assert manifest.verify(folder)
    listed = json.loads((folder / manifest.NAME).read_text())["files"]
    assert sorted(listed) == ["facts", "state/d/array", "state/empty"]
    assert listed["state/d/array"]["size"] == 3_000_000
    assert not list(folder.glob("*.tmp"))


def test_the_bytes_of_the_listed_files_are_reported(folder):
    assert manifest.write(folder) == 3_000_002
    assert manifest.write(folder, ["facts"]) == 3_000_000


def test_what_still_changes_is_left_out(folder):
    manifest.write(folder, ["facts"])
    (folder / "facts").write_text("something else")
    (folder / "later").write_text("")
    assert manifest.verify(folder, ["facts", "later"])
    with pytest.raises(Damaged, match="facts is not in manifest.json"):
        manifest.verify(folder, ["later"])


def test_a_folder_without_manifest_is_unchecked(folder):
    (folder / manifest.NAME).unlink()
    assert manifest.verify(folder) is False


@pytest.mark.parametrize("place", [0, 1_500_000, 2_999_999])
def test_a_flipped_bit_is_found(folder, place):
    path = folder / "state/d/array"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(Damaged, match="state/d/array is not what was written: its digest differs"):
        manifest.verify(folder)


def test_sizes_and_presence_are_checked(folder):
    with (folder / "state/d/array").open("rb+") as file:
        file.truncate(1000)
    with pytest.raises(Damaged, match="state/d/array has 1000 bytes instead of 3000000"):
        manifest.verify(folder)
    (folder / "state/d/array").unlink()
    with pytest.raises(Damaged, match="state/d/array is missing"):
        manifest.verify(folder)


def test_a_foreign_file_is_found(folder):
    (folder / "state/other").write_text("x")
    with pytest.raises(Damaged, match="state/other is not in manifest.json"):
        manifest.verify(folder)


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("what", ["file", "subfolder", "folder", "dangling"])
def test_symbolic_links_are_refused(folder, what, with_manifest):
    if not with_manifest:
        (folder / manifest.NAME).unlink()
    path, target = folder / "state/d/array", folder.parent / "elsewhere"
    if what == "dangling":
        path = folder / "state/other"
    else:
        path = {"file": path, "subfolder": folder / "state", "folder": folder}[what]
        path.rename(target)
    path.symlink_to(target)
    with pytest.raises(Damaged, match=f"{path.name} is a symbolic link"):
        manifest.verify(folder)
    with pytest.raises(Damaged, match=f"{path.name} is a symbolic link"):
        manifest.write(folder)


def test_what_is_no_file_is_refused_and_not_waited_for(folder):
    os.mkfifo(folder / "state/pipe")
    with pytest.raises(Damaged, match="state/pipe is no regular file"):
        manifest.verify(folder)


def test_paths_that_leave_the_folder_are_refused(folder):
    for path in (folder.parent / "secret", "../secret", "state/../../secret"):
        (folder.parent / "secret").write_text("x")
        manifest.write(folder)
        change(folder, lambda files: files.update({str(path): files["facts"]}))  # noqa: B023
        with pytest.raises(Damaged, match="secret, which is outside of the folder"):
            manifest.verify(folder)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "{}", '{"files": 1}', '{"files": {"facts": {"size": 2}}}', "\xff", "[[]]"],
)
def test_a_manifest_that_is_none_is_damage(folder, content):
    (folder / manifest.NAME).write_text(content, encoding="latin1")
    with pytest.raises(Damaged, match="manifest.json is not a readable manifest"):
        manifest.verify(folder)


def test_an_entry_of_another_kind_is_damage(folder):
    change(folder, lambda files: files["facts"].update(size="2"))
    with pytest.raises(Damaged, match="facts has 2 bytes"):
        manifest.verify(folder)
    change(folder, lambda files: files["facts"].update(size=2, sha256=None))
    with pytest.raises(Damaged, match="facts is not what was written"):
        manifest.verify(folder)


def test_no_folder_and_an_empty_one_are_damage(tmp_path):
    (tmp_path / "file").write_text("")
    for name, problem in (("7", "No such file"), ("file", "Not a directory"), ("", "is empty")):
        path = tmp_path / name if name else tmp_path / "empty"
        if not name:
            (path / "below").mkdir(parents=True)
        with pytest.raises(Damaged, match=problem):
            manifest.verify(path)


def test_damage_is_an_error_of_checkpoints():
    assert issubclass(Damaged, CheckpointError) and CheckpointError.exit_code == 1


def test_a_manifest_is_written_whole_or_not_at_all(folder, monkeypatch):
    before = (folder / manifest.NAME).read_text()
    (folder / "facts").write_text("[]")

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            manifest.write(folder)
    assert (folder / manifest.NAME).read_text() == before
    manifest.write(folder)  # what the failure left does not matter
    assert manifest.verify(folder)
