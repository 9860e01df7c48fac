"""The audit finds the labels that were made wrong, and what it writes can be trained on."""

import csv
import re

import cv2
import numpy as np
import pytest

import flaxcls
from flaxcls import config as configs
from flaxcls.audit import main
from flaxcls.data import open_source
from flaxcls.errors import ConfigError, DataError
from flaxcls.insight.audit import audit, write_picture
from flaxcls.insight.label_audit import (
    confident_joint,
    confused_classes,
    difference_hash,
    find_label_issues,
    near_duplicates,
    outlierness,
)
from flaxcls.studies.crossval import cross_validate


def made_up(count, classes, signal, share, seed=0):
    """True labels, labels of which a share is wrong, and probabilities of a network in between."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes, count)
    wrong = rng.random(count) < share
    labels = np.where(wrong, (true + rng.integers(1, classes, count)) % classes, true)
    logits = rng.normal(size=(count, classes))
    logits[np.arange(count), true] += signal
    probabilities = np.exp(1.5 * logits)
    probabilities /= probabilities.sum(1, keepdims=True)
    return labels != true, labels, probabilities.astype(np.float32)


CASES = [(400, 4, 3.0, 0.08), (300, 3, 1.0, 0.1), (800, 12, 2.5, 0.05)]


@pytest.mark.parametrize("case", CASES)
def test_joint_is_that_of_the_paper(case):
    _, labels, probabilities = made_up(*case)
    classes = probabilities.shape[1]
    thresholds = [probabilities[labels == j, j].mean() for j in range(classes)]
    counted = np.zeros((classes, classes))
    for label, row in zip(labels, probabilities, strict=True):
        likely = [j for j in range(classes) if row[j] >= thresholds[j]]
        if likely:
            counted[label, max(likely, key=lambda j: row[j])] += 1
    expected = counted / counted.sum(1, keepdims=True) * np.bincount(labels)[:, None]
    joint = confident_joint(labels, probabilities)
    assert np.abs(joint - expected).max() < 1
    np.testing.assert_array_equal(joint.sum(1), np.bincount(labels))
    pairs = confused_classes(labels, probabilities)
    off_diagonal = joint - np.diag(np.diag(joint))
    assert sum(pair.count for pair in pairs) == off_diagonal.sum()
    assert pairs[0].count == off_diagonal.max() == joint[pairs[0].label, pairs[0].true]


def test_wrong_labels_are_found():
    wrong, labels, probabilities = made_up(4000, 5, 5.0, 0.05)
    issues = find_label_issues(labels, probabilities)
    found = np.zeros(len(labels), bool)
    found[issues.indices] = True
    assert (found & wrong).sum() / wrong.sum() > 0.95
    assert (found & wrong).sum() / found.sum() > 0.9
    assert (np.diff(issues.confidence) >= 0).all()
    np.testing.assert_array_equal(issues.suggested, probabilities[issues.indices].argmax(1))


def test_right_labels_are_left_and_a_class_may_be_absent():
    _, labels, probabilities = made_up(500, 4, 9.0, 0.0)
    assert len(find_label_issues(labels, probabilities).indices) == 0
    kept = labels != 2
    joint = confident_joint(labels[kept], probabilities[kept])
    assert joint[2].sum() == joint[:, 2].sum() == 0
    assert len(find_label_issues(labels[kept], probabilities[kept]).indices) == 0


@pytest.mark.parametrize("case", CASES)
def test_cleanlab_finds_the_same(case):
    filters = pytest.importorskip("cleanlab.filter", reason="cleanlab is not installed")
    _, labels, probabilities = made_up(*case)
    theirs = filters.find_label_issues(
        labels, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1
    )
    ours = find_label_issues(labels, probabilities).indices
    assert len({*ours} & {*theirs}) >= 0.97 * len({*ours} | {*theirs})


def test_outliers_are_far_from_the_nearest_of_their_class():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(40, 6)), np.arange(40) % 3
    labels[0] = 3  # alone
    scores = outlierness(features, labels, neighbors=4)
    for i in range(1, 40):
        others = [j for j in range(40) if j != i and labels[j] == labels[i]]
        norms = np.linalg.norm(features[others], axis=1) * np.linalg.norm(features[i])
        distances = np.sort(1 - features[others] @ features[i] / norms)
        assert scores[i] == pytest.approx(distances[:4].mean(), abs=1e-5)
    assert scores[0] == 0


def test_near_duplicates_are_alike_by_features_and_by_hash():
    rng = np.random.default_rng(0)
    features, small = rng.normal(size=(700, 16)), rng.random((700, 8, 9))
    known, known_small = rng.normal(size=(50, 16)), rng.random((50, 8, 9))
    planted = {3: 40, 600: 7}
    for one, other in planted.items():
        features[one] = 3 * known[other] + 0.01 * rng.normal(size=16)
        small[one] = 0.5 * known_small[other] + 0.2
    features[10] = known[11]  # another picture, of which the network thinks the same
    small[20] = known_small[21]  # as bright, and the network tells them apart
    found = near_duplicates(
        (features, difference_hash(small)), (known, difference_hash(known_small))
    )
    assert {pair.one: pair.other for pair in found} == planted
    assert all(pair.distance == 0 and pair.similarity > 0.99 for pair in found)


CLASSES = ("<b>cat & co", "dog")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A cross-validation of 16 pictures, of which one is a test picture and one has a wrong label.

    Returns its folder and that of the pictures.
    """
    folder = tmp_path_factory.mktemp("audit")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 3)):
        for name in CLASSES:
            (folder / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                picture = rng.integers(0, 255, (8, 8, 3), np.uint8)
                cv2.imwrite(str(folder / "data" / split / name / f"{i}.png"), picture)
    twin = folder / "data" / "train" / "dog" / "5.png"
    (folder / "data" / "test" / "dog" / "1.png").write_bytes(twin.read_bytes())
    config = configs.default()
    config.data.name, config.data.path = "folder", str(folder / "data")
    config.image_size, config.crop.name = 8, "resize"
    config.batch_size, config.duration = 8, "2 steps"
    config.model.name, config.model.widths = "dense", (8,)
    cross_validate(config, folder / "study", 2)
    arrays = dict(np.load(folder / "study" / "predictions.npz"))
    source = open_source("folder", "train", path=config.data.path)
    probabilities = np.where(np.eye(2)[arrays["labels"]] > 0, 0.9, 0.1)
    wrong = [source.file(i) for i in range(16)].index(str(twin))
    probabilities[wrong] = 1 - probabilities[wrong]
    arrays["probabilities"] = probabilities.astype(np.float32)
    np.savez(folder / "study" / "predictions.npz", **arrays)
    return folder / "study", folder / "data"


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_audit_writes_what_it_finds_and_a_list_that_trains(study, tmp_path):
    folder, data = study
    found = flaxcls.audit(str(folder), str(tmp_path / "out"))
    out = tmp_path / "out"
    assert (found["examples"], found["label_issues"], found["duplicates"]) == (16, 1, 1)
    twin = str(data / "train" / "dog" / "5.png")
    (issue,) = rows(out / "labels.csv")
    assert (issue["file"], issue["label"], issue["suggested"]) == (twin, "dog", CLASSES[0])
    (pair,) = rows(out / "duplicates.csv")
    assert pair["file"] == twin and pair["duplicate_file"] == str(data / "test" / "dog" / "1.png")
    assert (pair["cosine"], pair["bits"]) == ("1.0000", "0")
    assert len(rows(out / "outliers.csv")) == 16 and len(rows(out / "confused.csv")) == 1
    before = open_source("folder", "train", path=str(data))
    after = open_source("list", "train", path=str(out / "corrected.csv"))
    labels = {before.file(i): before.labels()[i] for i in range(16)}
    changed = [f for i in range(16) if labels[f := after.file(i)] != after.labels()[i]]
    assert changed == [twin] and after.class_names == before.class_names
    assert len(open_source("list", "test", path=str(out / "corrected.csv"))) == 6


def test_page_is_one_file_whose_text_is_escaped(study, tmp_path, capsys):
    main(["audit", f"--run={study[0]}", f"--out={tmp_path}/out"])
    assert "16 examples: 1 labels are probably wrong" in capsys.readouterr().out
    page = (tmp_path / "out" / "index.html").read_text()
    assert "dog → &lt;b&gt;cat &amp; co<" in page and "<b>" not in page
    assert page.count("data:image/png;base64,") == 1 + 2 + 16
    assert not re.search(r"<script|<link|https?:|url\(", page)


def test_data_that_have_changed_and_folders_of_something_else_are_refused(study, tmp_path):
    with pytest.raises(ConfigError, match="is no finished cross-validation"):
        audit(tmp_path)
    for name in ("crossval.json", "fold_0"):
        (tmp_path / name).symlink_to(study[0] / name)
    arrays = dict(np.load(study[0] / "predictions.npz"))
    np.savez(tmp_path / "predictions.npz", **{**arrays, "labels": 1 - arrays["labels"]})
    with pytest.raises(DataError, match="the data are not those that"):
        audit(tmp_path)


def test_examples_that_are_no_files_are_written_without_loss(tmp_path):
    source = open_source("fake", "train", image_shape=(8, 8, 3), num_examples=4)
    path = write_picture(tmp_path, source, "train", 2)
    image = cv2.cvtColor(cv2.imread(str(tmp_path / path)), cv2.COLOR_BGR2RGB)
    np.testing.assert_array_equal(image, source[2].image)
