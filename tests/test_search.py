"""Search by picture: neighbours against NumPy, and an index that is kept and kept up to date."""

import importlib
import os
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import flaxcls
from flaxcls.errors import ConfigError, DataError
from flaxcls.inference.predictor import Predictor
from flaxcls.insight.search import index_pictures

command_module = importlib.import_module("flaxcls.search")  # flaxcls.search is the function


@pytest.fixture(scope="module")
def run(digits_run, tmp_path_factory):
    """A copy of the run: the index is kept in it."""
    return shutil.copytree(digits_run, tmp_path_factory.mktemp("copy") / "run")


@pytest.fixture(scope="module")
def predictor(run):
    return Predictor(run, batch_size=16)


@pytest.fixture
def folder(tmp_path):
    """30 digits, in folders."""
    for number, image in enumerate(load_digits().images[:30]):
        path = tmp_path / "digits" / str(number % 3) / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)).save(path)
    return tmp_path / "digits"


@pytest.fixture
def index(predictor, run, folder, monkeypatch, capsys):
    """Makes the index: it, the files that were read for that, what was wrong, what was said."""
    read = Predictor.read
    seen, wrong = [], []

    def noted(self, path):
        seen.append(os.path.basename(path))
        return read(self, path)

    monkeypatch.setattr(Predictor, "read", noted)

    def make(predictor=predictor):
        seen.clear(), wrong.clear()
        files = sorted(map(str, folder.rglob("*.*")))
        made = index_pictures(predictor, run, str(folder), files, wrong.append)
        return made, sorted(seen), list(map(str, wrong)), capsys.readouterr().err

    return make


def kept(run):
    """The newest file of an index."""
    return max((run / "search").glob("digits-*.npz"), key=lambda path: path.stat().st_mtime_ns)


def test_neighbors_are_the_nearest_by_cosine(predictor, folder, index):
    made, read, _, _ = index()
    files = sorted(map(str, folder.rglob("*.png")))
    assert made.files == files and len(read) == 30
    features = np.concatenate([p.features for _, p in predictor.files(files, print)])
    features = features.astype(np.float64)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -2)  # a picture is not its own neighbour
    found = made.nearest(features.astype(np.float32), 5, files)
    for row, neighbors in zip(similarity, found, strict=True):
        best = np.argsort(-row)[:5]
        np.testing.assert_allclose([n.similarity for n in neighbors], row[best], atol=1e-5)
        assert {n.file for n in neighbors} == {files[i] for i in best}
    everything = made.nearest(features[:1], 100, [None])[0]
    assert everything[0].file == files[0] and len(everything) == 30


def test_of_a_kept_index_only_what_is_new_or_has_changed_is_read(run, folder, index):
    first, _, _, said = index()
    assert "has 30 pictures, 30 of them new" in said
    again, read, _, said = index()
    assert (again.files, read) == (first.files, []) and "30 pictures, 0 of them new" in said
    np.testing.assert_array_equal(again.features, first.features)

    (folder / "0" / "00.png").unlink()
    shutil.copy(folder / "1" / "01.png", folder / "new.png")
    shutil.copy(folder / "1" / "04.png", folder / "1" / "07.png")
    os.utime(folder / "1" / "07.png", ns=(1, 1))
    changed, read, _, said = index()
    assert read == ["07.png", "new.png"] and "30 pictures, 2 of them new" in said
    rows = dict(zip(changed.files, changed.features, strict=True))
    assert rows.keys() == {*map(str, folder.rglob("*.png"))}
    for one, other in (("new.png", "1/01.png"), ("1/07.png", "1/04.png"), ("2/02.png", "2/02.png")):
        before = first.features[first.files.index(str(folder / other))]
        np.testing.assert_allclose(rows[str(folder / one)], before, atol=1e-6)
    assert index()[1] == []

    shutil.rmtree(folder / "0")  # pictures that have gone leave it, also where none is new
    assert len(index()[0].files) == 21
    with np.load(kept(run)) as file:
        assert not [name for name in file["files"].tolist() if name.startswith("0")]


def test_index_of_other_weights_is_made_anew(predictor, run, index):
    index()
    other = Predictor(run, batch_size=16)
    other.variables = jax.tree.map(lambda x: x * 1.01, other.variables)
    _, read, _, said = index(other)
    assert len(read) == 30 and "the index was of other weights: it is made anew for step" in said
    other.step += 5
    _, read, _, said = index(other)
    assert len(read) == 30
    assert f"of step {predictor.step}, parameters: it is made anew for step {other.step}, " in said
    with np.load(kept(run)) as file:
        assert file["origin"].tolist()[:3] == ["run", str(other.step), "eval"]
    assert index(other)[1] == []


def test_damaged_index_is_made_anew_and_one_that_cannot_be_written_is_told(run, index):
    index()
    kept(run).write_bytes(kept(run).read_bytes()[:300])
    _, read, _, said = index()
    assert len(read) == 30 and "can't be read: the index is made anew" in said
    shutil.rmtree(run / "search")
    (run / "search").write_text("in the way")
    made, read, _, said = index()
    (run / "search").unlink()
    assert len(made.files) == len(read) == 30 and "note: the index can't be kept as " in said


def test_broken_picture_is_told_each_time_and_not_indexed(folder, index):
    (folder / "1" / "04.png").write_bytes(b"no picture")
    for new in (30, 1):
        made, read, wrong, _ = index()
        assert len(read) == new and len(made.files) == 29
        assert len(wrong) == 1 and str(folder / "1" / "04.png") in wrong[0]


@pytest.fixture
def command(run, folder, capsys):
    def search(*arguments):
        for name in command_module.FLAGS:
            command_module.FLAGS[name].unparse()
        flags = (f"--run={run}", f"--index={folder}", "--neighbors=3")
        command_module.main(["search", *flags, *map(str, arguments)])
        return capsys.readouterr().out.splitlines()

    return search


def test_command_prints_a_table_and_draws_a_grid(command, predictor, folder, tmp_path):
    asked = [folder / "0" / "00.png", folder / "1" / "01.png"]
    lines = [line.split("\t") for line in command(*asked, f"--out={tmp_path}/grid.png")]
    assert [line[:2] for line in lines] == [[str(a), str(r)] for a in asked for r in (1, 2, 3)]
    assert all(line[3] != line[0] for line in lines)
    similarities = [float(line[2]) for line in lines]
    assert similarities[:3] == sorted(similarities[:3], reverse=True) and similarities[0] > 0.5
    with Image.open(tmp_path / "grid.png") as picture:
        tile, height = 224 + 8, 224 + 2 * 18 + 8
        assert picture.size == (4 * tile + 8, 2 * height + 8)
        drawn = np.asarray(picture)[8 : 8 + 224 : 28, 8 + tile : 8 + tile + 224 : 28, 0]
    np.testing.assert_array_equal(drawn, predictor.read(lines[0][3])[..., 0])


def test_command_names_broken_pictures_and_answers_for_the_others(
    command, folder, tmp_path, capsys
):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="1 files could not be read") as error:
        command(tmp_path / "broken.png", folder / "0" / "00.png")
    said = capsys.readouterr()
    assert error.value.exit_code == 45
    assert len(said.out.splitlines()) == 3 and "broken.png" in said.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--index=nowhere", "x.png"], "--index=nowhere is not a folder"),
        ([], "no pictures are given"),
        (["nowhere.png"], "there is no file nowhere.png"),
        (["{folder}", "--out=grid.jpg"], "--out=grid.jpg must end in .png"),
        (["{folder}", "--index={empty}"], "there are no pictures in --index="),
    ],
)
def test_wrong_arguments_are_one_sentence(command, folder, tmp_path, arguments, sentence):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=sentence):
        command(*(text.format(folder=folder, empty=tmp_path / "empty") for text in arguments))


def test_python_function_takes_paths_and_arrays_and_draws_them(run, folder, tmp_path):
    path = folder / "0" / "03.png"
    pixels = np.asarray(Image.open(path))
    by_path = flaxcls.search(run, folder, path, neighbors=2)
    grid = tmp_path / "grid.png"
    itself, *others = flaxcls.search(run, folder, [pixels, path], neighbors=3, out=grid)[0]
    assert itself.file == str(path) and itself.similarity == pytest.approx(1, abs=1e-5)
    assert [n.file for n in others] == [n.file for n in by_path] and len(by_path) == 2
    with Image.open(grid) as drawn:
        assert drawn.size == (4 * (224 + 8) + 8, 2 * (224 + 2 * 18 + 8) + 8)
    with pytest.raises(ConfigError, match="--out=grid.jpg must end in .png"):
        flaxcls.search("nowhere", folder, path, out="grid.jpg")


@pytest.mark.slow
def test_the_command_searches_in_a_process_of_its_own(run, folder, run_main):
    arguments = (f"--run={run}", f"--index={folder}", folder / "0")
    result = run_main("search", *arguments, module="flaxcls")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 8 * 10
