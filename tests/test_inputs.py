"""The config decides what becomes of a picture, and whether batches are resident or streamed."""

import contextlib
import pickle
import subprocess
import sys
from functools import partial

import cv2
import numpy as np
import pytest

from flaxcls import augment
from flaxcls import config as configs
from flaxcls.build import inputs
from flaxcls.config import durations, options
from flaxcls.data import pipeline
from flaxcls.data.loader import Loader
from flaxcls.data.resident import Resident
from flaxcls.data.source import Example, Source
from flaxcls.data.stream import Stream
from flaxcls.data.transform import Augmented, CenterCrop, Pad, RandomResizedCrop, Resize
from flaxcls.errors import ConfigError, DataError

COUNT = 24


class Pictures(Source):
    """Random pictures as PNG files: of one size (8 x 10), or of several where `shape` is None."""

    def __init__(self, shape=(8, 10), broken=(), channels=3):
        super().__init__(
            name="pictures",
            split="train",
            class_names=["a", "b"],
            image_shape=(*(shape or (None, None)), channels),
            fingerprint="",
        )
        random = np.random.default_rng(0)
        self.pixels, self.files = [], []
        for index in range(COUNT):
            height, width = shape or random.integers(9, 40, 2)
            pixels = random.integers(0, 256, (height, width, channels), np.uint8)
            data = cv2.imencode(".png", pixels[..., ::-1] if channels == 3 else pixels)[1].tobytes()
            self.pixels.append(pixels)
            self.files.append(data[:40] if index in broken else data)

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return Example(self.files[index], index % 2)


FIXED, VARIED = (8, 10), None  # shapes of pictures


def config_with(**changes):
    """The default config with changes by path: crop__name="pad"."""
    config = configs.default()
    config.batch_size = 6
    for path, value in changes.items():
        *sections, name = path.split("__")
        section = config
        for each in sections:
            section = section[each]
        section[name] = value
    return config


# Image sizes.

TO_STEPS = partial(durations.to_steps, batch_size=10, num_examples=100, total_steps=90)


def test_image_size_is_none_a_number_or_a_schedule():
    sizes = inputs.image_sizes(config_with(), TO_STEPS)
    assert [sizes(step) for step in (0, 10**9)] == [None, None]
    sizes = inputs.image_sizes(config_with(image_size=64), TO_STEPS)
    assert [sizes(step) for step in (0, 10**9)] == [64, 64]
    schedule = (("0 epochs", 32), ("2 epochs", 48), ("50%", 40), ("50 steps", 64))
    for given in (schedule, [list(each) for each in schedule]):  # as JSON has it
        sizes = inputs.image_sizes(config_with(image_size=given), TO_STEPS)
        assert sizes.begins == (0, 20, 45, 50)
        seen = [sizes(step) for step in (0, 19, 20, 44, 45, 49, 50, 10**9)]
        assert seen == [32, 32, 48, 48, 40, 40, 64, 64]
        assert inputs.eval_image_size(config_with(image_size=given)) == 64
        assert sizes.describe() == (
            "; images of 32 pixels per side, 48 from step 20 on, 40 from step 45 on, 64 from step "
            "50 on (the step is compiled for each)"
        )


@pytest.mark.parametrize(
    "given", [0, -3, "224", 22.5, True, (), (32, 64), (("0 epochs", 0),), (("0 epochs", "8"),)]
)
def test_image_size_that_is_none_of_these_is_refused(given):
    message = r"^config.image_size must be a number of pixels, or a schedule such as .*, got"
    with pytest.raises(ConfigError, match=message):
        inputs.image_sizes(config_with(image_size=given), TO_STEPS)


@pytest.mark.parametrize(
    "begins", [("1 epochs",), ("0 epochs", "0 steps"), ("0 epochs", "3 epochs", "29 steps")]
)
def test_schedule_of_sizes_goes_forward_from_the_start(begins):
    given = tuple((begin, 32) for begin in begins)
    with pytest.raises(ConfigError, match="must begin at '0 epochs' and go forward, got"):
        inputs.image_sizes(config_with(image_size=given), TO_STEPS)


# What becomes of a picture.


@pytest.mark.parametrize(
    "shape, changes, training, evaluation",
    [
        (FIXED, {}, None, None),
        (FIXED, {"image_size": 6}, Resize(), Resize()),
        (FIXED, {"eval__image_size": 6}, None, Resize()),
        (FIXED, {"eval__image_size": 6, "eval__crop__name": "pad"}, None, Pad()),
        (VARIED, {"image_size": 6}, RandomResizedCrop(), CenterCrop()),
        (VARIED, {"image_size": (("0 epochs", 6),)}, RandomResizedCrop(), CenterCrop()),
        (
            FIXED,
            {"image_size": 6, "crop__name": "random_resized_crop"},
            RandomResizedCrop(),
            CenterCrop(),
        ),
        (
            VARIED,
            {"image_size": 6, "crop__name": "pad", "crop__fill": 7},
            Pad(fill=7),
            Pad(fill=7),
        ),
        (
            VARIED,
            {"image_size": 6, "crop__name": "pad", "crop__fill": 7, "eval__crop__fill": 0},
            Pad(fill=7),
            Pad(fill=0),
        ),
        (
            VARIED,
            {"image_size": 6, "crop__name": "pad", "crop__fill": 7, "eval__crop__name": "resize"},
            Pad(fill=7),
            Resize(),
        ),
        (
            VARIED,
            {"image_size": 6, "crop__name": "center_crop", "crop__ratio": 0.5},
            CenterCrop(ratio=0.5),
            CenterCrop(ratio=0.5),
        ),
        (
            VARIED,
            {"image_size": 6, "crop__area": [0.35, 1], "crop__aspect": (0.5, 2.0)},
            RandomResizedCrop(area=(0.35, 1.0), aspect=(0.5, 2.0)),
            CenterCrop(),
        ),
        (
            VARIED,
            {"image_size": 6, "crop__interpolation": "bicubic", "crop__antialias": False},
            RandomResizedCrop(interpolation="bicubic", antialias=False),
            CenterCrop(interpolation="bicubic", antialias=False),
        ),
        (
            VARIED,
            {
                "image_size": 6,
                "crop__interpolation": "area",
                "crop__antialias": False,
                "eval__crop__interpolation": "bicubic",
                "eval__crop__antialias": True,
                "eval__crop__ratio": 0.95,
            },
            RandomResizedCrop(interpolation="area", antialias=False),
            CenterCrop(interpolation="bicubic", antialias=True, ratio=0.95),
        ),
    ],
)
def test_transforms_follow_from_the_config(shape, changes, training, evaluation):
    config, source = config_with(**changes), Pictures(shape)
    assert inputs.train_transform(config, source) == training
    assert inputs.eval_transform(config, source) == evaluation
    inputs.training(config, source, inputs.image_sizes(config, TO_STEPS))
    inputs.evaluation(config, source)


@pytest.mark.parametrize(
    "shape, changes, message",
    [
        (VARIED, {}, "^config.image_size is missing: the images of pictures have different sizes$"),
        (FIXED, {"crop__name": "pad"}, "^config.image_size is missing: config.crop.name needs it$"),
        (FIXED, {"crop__fill": 3}, "^config.image_size is missing: config.crop.fill needs it$"),
        (
            FIXED,
            {"eval__crop__antialias": False},
            "^config.eval.image_size is missing: config.eval.crop.antialias needs it$",
        ),
        (
            VARIED,
            {"image_size": 6, "crop__name": "centre_crop"},
            "config.crop.name is 'centre_crop', which is not known, did you mean 'center_crop'?",
        ),
        (
            VARIED,
            {"image_size": 6, "eval__crop__name": "centre"},
            "config.eval.crop.name is 'centre', which is not known",
        ),
        (
            VARIED,
            {"image_size": 6, "eval__crop__name": "random_resized_crop"},
            "config.eval.crop.name must not be random, got 'random_resized_crop'",
        ),
        (
            VARIED,
            {"image_size": 6, "crop__ratio": 0.9},
            "config.crop.ratio is not used by random_resized_crop",
        ),
        (FIXED, {"image_size": 6, "crop__fill": 3}, "config.crop.fill is not used by resize"),
        (
            VARIED,
            {"image_size": 6, "eval__crop__fill": 3},
            "config.eval.crop.fill is not used by center_crop",
        ),
        (
            VARIED,
            {"image_size": 6, "crop__interpolation": "lanczos"},
            "config.crop.interpolation must be 'bilinear' or 'bicubic' or 'area' for "
            "random_resized_crop, got 'lanczos'",
        ),
        (
            VARIED,
            {"image_size": 6, "crop__area": (0.0, 1.0)},
            "config.crop.area must be .* above 0 .*, got",
        ),
        (
            VARIED,
            {"image_size": 6, "crop__area": (0.9, 0.1)},
            r"config.crop.area must be \(low, high\), got \(0.9, 0.1\)",
        ),
        (
            VARIED,
            {"image_size": 6, "input__mode": "resident"},
            "config.input.mode = 'resident' keeps one version of every image: it can't have random",
        ),
        (
            FIXED,
            {"image_size": (("0 epochs", 6), ("2 epochs", 8)), "input__mode": "resident"},
            "config.input.mode = 'resident' keeps one version of every image",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_in_a_sentence(shape, changes, message):
    config = config_with(**changes)
    with pytest.raises(ConfigError, match=message) as caught:
        inputs.training(config, Pictures(shape), inputs.image_sizes(config, TO_STEPS))
        inputs.evaluation(config, Pictures(shape))
    assert "\n" not in str(caught.value)


def test_shape_of_the_images_is_the_size_or_the_datas_own():
    assert inputs.evaluation(config_with(), Pictures(FIXED)).image_shape() == (8, 10, 3)
    sized = inputs.evaluation(config_with(image_size=6), Pictures(VARIED, channels=1))
    assert sized.image_shape() == (6, 6, 1)
    assert inputs.eval_image_size(config_with(image_size=6)) == 6
    assert inputs.eval_image_size(config_with(image_size=6, eval__image_size=9)) == 9
    assert inputs.eval_image_size(config_with(image_size=(("0%", 6), ("50%", 8)))) == 8


# How batches are made.


@pytest.fixture
def make_input():
    """Makes the input of training (or of evaluation) and closes it at the end."""
    made = []

    def make(source, evaluation=False, report=print, **changes):
        config = config_with(**changes)
        if evaluation:
            made.append(inputs.evaluation(config, source).open())
        else:
            sizes = inputs.image_sizes(config, TO_STEPS)
            made.append(inputs.training(config, source, sizes).open(report))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize(
    "shape, changes, kind",
    [
        (FIXED, {}, Resident),
        (FIXED, {"image_size": 6}, Resident),
        (VARIED, {"image_size": 6, "crop__name": "pad"}, Resident),
        (VARIED, {"image_size": 6, "crop__name": "pad", "input__mode": "resident"}, Resident),
        (FIXED, {"input__mode": "stream"}, Stream),
        (VARIED, {"image_size": 6}, Stream),  # random crops
        (FIXED, {"image_size": (("0 epochs", 6), ("1 epochs", 8))}, Stream),
    ],
)
def test_what_is_small_and_always_the_same_is_resident(make_input, shape, changes, kind):
    assert isinstance(make_input(Pictures(shape), **changes), kind)


@pytest.mark.parametrize("changes", [{}, {"image_size": 6}])
@pytest.mark.parametrize("evaluation", [False, True])
def test_what_is_large_is_streamed(make_input, monkeypatch, changes, evaluation):
    side = 6 * 6 if changes else 8 * 10
    monkeypatch.setattr(pipeline, "RESIDENT_BYTES", COUNT * side * 3)
    assert isinstance(make_input(Pictures(), evaluation, **changes), Resident)
    monkeypatch.setattr(pipeline, "RESIDENT_BYTES", COUNT * side * 3 - 1)
    assert isinstance(make_input(Pictures(), evaluation, **changes), Stream)
    kind = make_input(Pictures(), evaluation, input__mode="resident", **changes)
    assert isinstance(kind, Resident)


@pytest.mark.parametrize(
    "shape, changes", [(FIXED, {}), (FIXED, {"image_size": 6}), (VARIED, {"image_size": 6})]
)
def test_streamed_evaluation_has_the_images_of_the_resident_one(make_input, shape, changes):
    source = Pictures(shape)
    resident = make_input(source, evaluation=True, **changes)
    stream = make_input(source, evaluation=True, input__mode="stream", **changes)
    assert isinstance(stream, Stream)
    batches = list(stream.evaluation_batches(5))
    together = {k: np.concatenate([b[k] for b in batches])[:COUNT] for k in batches[0]}
    np.testing.assert_array_equal(together["image"], resident.arrays["image"])
    np.testing.assert_array_equal(together["label"], resident.arrays["label"])
    transform = inputs.eval_transform(config_with(**changes), source)
    expected, _ = Loader(source, transform)(3, changes.get("image_size"))
    np.testing.assert_array_equal(together["image"][3], expected)


def test_evaluation_at_another_size_than_training(make_input):
    data = make_input(Pictures(VARIED), evaluation=True, image_size=6, eval__image_size=9)
    assert data.arrays["image"].shape == (COUNT, 9, 9, 3)


def test_training_follows_seed_repeats_and_size(make_input):
    changes = {"image_size": (("0 epochs", 6), ("2 steps", 8)), "seed": 3, "repeats": 2}
    data = make_input(Pictures(VARIED), **changes)
    batches = list(data.batches(0, 4))
    assert [batch["image"].shape for batch in batches] == [(6, 6, 6, 3)] * 2 + [(6, 8, 8, 3)] * 2
    for batch in batches:
        np.testing.assert_array_equal(batch["index"][::2], batch["index"][1::2])
    resident = make_input(Pictures(FIXED), seed=3, repeats=2)
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(resident.batch(step)["index"], batch["index"])


@pytest.mark.parametrize(
    "given, said",
    [
        ({"threads": 3, "processes": 0, "read_ahead": 7}, "streamed by 3 threads, at most 10 "),
        ({"threads": 1, "processes": 2}, "streamed by 2 processes of 1 threads, at most 7 "),
    ],
)
def test_workers_are_those_of_the_config(make_input, given, said):
    changes = {f"input__{field}": value for field, value in given.items()}
    assert said in make_input(Pictures(), input__mode="stream", **changes).describe()


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_broken_images_are_reported_up_to_the_allowed_share(make_input, mode):
    said, source = [], Pictures(broken=(3, 4))
    changes = {"report": said.append, "input__mode": mode}
    data = make_input(source, input__max_broken=2 / COUNT, **changes)
    for _ in data.batches(0, COUNT // 6):
        pass
    assert sorted(said) == [
        f"example {index} of pictures 'train' is not a readable image (40 bytes); "
        "another image replaces it"
        for index in (3, 4)
    ]
    with pytest.raises(DataError, match="2 of 24 training images can't be read"):
        for _ in make_input(source, input__max_broken=1 / COUNT, **changes).batches(0, 4):
            pass


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_broken_image_in_evaluation_is_an_error(make_input, mode):
    changes = {"input__mode": mode, "input__max_broken": 1.0}
    with pytest.raises(DataError, match="^example 3 of pictures 'train' is not a readable image"):
        data = make_input(Pictures(broken=(3,)), evaluation=True, **changes)
        list(data.evaluation_batches(5))


@pytest.mark.parametrize("mode", ["resident", "stream"])
@pytest.mark.parametrize("evaluation", [False, True])
def test_limit_of_pixels_is_that_of_the_config(make_input, mode, evaluation):
    changes = {"input__mode": mode, "input__max_pixels": 79}
    with pytest.raises(DataError, match="10 x 8 pixels, more than the 79 that"):
        data = make_input(Pictures(), evaluation, **changes)
        next(data.evaluation_batches(5) if evaluation else data.batches(0, 1))


# What is known of the images before training.


def test_statistics_are_those_of_the_images(make_input):
    source = Pictures()
    scaled = np.stack(source.pixels) / 255
    for mode in ("resident", "stream"):  # 24 images are fewer than SAMPLE
        data = make_input(source, input__mode=mode)
        mean, std = pipeline.statistics(data, inputs.evaluation(config_with(), source))
        np.testing.assert_allclose(mean, scaled.mean((0, 1, 2)), rtol=1e-12)
        np.testing.assert_allclose(std, scaled.std((0, 1, 2)), rtol=1e-12)


def test_streamed_statistics_are_those_of_some_images_as_evaluation_sees_them(
    make_input, monkeypatch
):
    monkeypatch.setattr(pipeline, "SAMPLE", 5)
    config, source = config_with(image_size=6), Pictures(VARIED, broken=(6,))
    indices = [0, 5, 11, 17, 23]
    seen = [Loader(source, CenterCrop())(index, 6)[0] for index in indices]
    evaluated = inputs.evaluation(config, source)
    mean, std = pipeline.statistics(make_input(source, image_size=6), evaluated)
    np.testing.assert_allclose(mean, np.mean(np.stack(seen) / 255, axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, np.std(np.stack(seen) / 255, axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_array_equal(evaluated.sample(5), np.stack(seen))


def test_a_broken_image_does_not_spoil_the_sample():
    images = inputs.evaluation(config_with(image_size=6), Pictures(VARIED, broken=(0, 23))).sample(
        3
    )
    assert images.shape == (3, 6, 6, 3) and images.any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_first_images_are_some_of_those_that_evaluation_would_see(make_input, mode):
    source, evaluated = Pictures(FIXED), inputs.evaluation(config_with(), Pictures(FIXED))
    data = make_input(source, input__mode=mode)
    for count in (1, 7, 1000):
        images = pipeline.first_images(data, evaluated, count)
        assert images.shape == (min(count, COUNT), 8, 10, 3) and images.dtype == np.uint8


def test_survey_tells_number_classes_and_middle_size():
    source = Pictures(VARIED, broken=(1,))
    sides = [min(p.shape[:2]) for index, p in enumerate(source.pixels) if index != 1]
    assert pipeline.summarize(source) == (COUNT, 2, int(np.median(sides)), False)
    with pytest.raises(DataError, match="none of the images of pictures that were tried can be"):
        pipeline.summarize(Pictures(VARIED, broken=range(COUNT)))


def test_default_fits_every_option_of_the_input():
    """What `build.check` compares with; None is for what follows from the machine."""
    given = configs.default().input
    assert given.mode == "auto" and given.read_ahead >= 1 and 0 <= given.max_broken <= 1
    assert options.fits(given.max_pixels, options.Count)


# Where the policies are computed.

FLIP, RAND, MIX = {"name": "flip"}, {"name": "rand_augment"}, {"name": "mix"}


@pytest.mark.parametrize(
    "specs, on_host",
    [
        ((), 0),
        ((FLIP,), 0),  # costs a device nothing
        ((FLIP, RAND, MIX), 2),
        ((RAND, FLIP, {"name": "auto_augment"}, FLIP), 3),
        (({"name": "trivial_augment"}, {"name": "normalize"}, {"name": "cutout"}), 1),
        (({"name": "flip", "mode": "alternating"}, RAND), 0),  # needs to know the epoch
        (({"name": "color_jitter", "hue": 0.1}, RAND), 0),
    ],
)
def test_a_host_does_policies_and_what_is_before_them(specs, on_host):
    changes, others = augment.split(specs)
    assert [change.name for change in changes] == [spec["name"] for spec in specs[:on_host]]
    assert others == specs[on_host:]


@pytest.mark.parametrize(
    "changes, platform, on_host",
    [
        ({}, "cpu", True),
        ({}, "tpu", True),
        ({}, "gpu", False),
        ({"input__policies": "host"}, "gpu", True),
        ({"input__policies": "device"}, "tpu", False),
        ({"crop__name": "pad"}, "tpu", False),  # resident
    ],
)
def test_policies_of_streamed_pictures_are_computed_on_the_host(changes, platform, on_host):
    config = config_with(image_size=6, **changes)
    sizes = inputs.image_sizes(config, TO_STEPS)
    training = inputs.training(config, Pictures(VARIED), sizes)
    specs = (FLIP, RAND, MIX)
    result, others = inputs.policies_on_host(training, specs, platform)
    assert others == ((MIX,) if on_host else specs)
    assert isinstance(result.transform, Augmented) == on_host
    if not on_host:
        assert result == training


def test_policies_of_a_resident_split_can_not_be_computed_on_the_host():
    config = config_with(input__policies="host")
    training = inputs.training(config, Pictures(FIXED), inputs.image_sizes(config, TO_STEPS))
    with pytest.raises(ConfigError, match="config.input.policies = 'host' needs streamed pictures"):
        inputs.policies_on_host(training, (RAND,), "cpu")


@pytest.mark.parametrize("shape, size", [(VARIED, 12), (FIXED, None)])
def test_the_host_changes_what_it_has_cropped_by_draws_of_their_own(shape, size):
    config = config_with(image_size=size, input__mode="stream")
    source = Pictures(shape)
    training = inputs.training(config, source, inputs.image_sizes(config, TO_STEPS))
    result, _ = inputs.policies_on_host(training, (FLIP, RAND), "cpu")
    transform, (flip, policy) = training.transform, result.transform.changes
    assert pickle.loads(pickle.dumps(result.transform)) == result.transform  # for other processes
    crops = transform.draws if transform else 0
    assert result.transform.draws == crops + 16  # 1 and 14, and one to spare
    with contextlib.closing(result.open()) as data:
        batch, later = data.batches(0, 2)
    draws = training.order.draws(0, result.transform.draws)
    load = Loader(source, transform)
    for row, index in enumerate(batch["index"].tolist()):
        image, _ = load(index, size, draws[row, :crops])
        image = flip.on_host(image, draws[row, crops:])
        image = policy.on_host(image, draws[row, crops + 1 : crops + 15])
        np.testing.assert_array_equal(batch["image"][row], image)
    with contextlib.closing(result.open()) as data:  # resumed
        (again,) = data.batches(1, 2)
    np.testing.assert_array_equal(again["image"], later["image"])


def test_a_policy_on_the_host_needs_no_device():
    """The processes that decode must not take a GPU's memory."""
    code = """
import numpy as np
from jax._src import xla_bridge
from flaxcls.augment.policy import AutoAugment, RandAugment, TrivialAugment
for policy in (RandAugment(num_ops=40, cutout=True), TrivialAugment(), AutoAugment()):
    for seed in range(40):
        draws = np.random.default_rng(seed).random(policy.draws).tolist()
        policy.on_host(np.full((9, 8, 3), 40, np.uint8), draws)
assert not xla_bridge._backends, xla_bridge._backends
"""
    subprocess.run([sys.executable, "-c", code], check=True)
