"""The grid shows the very images that training gets."""

import jax
import numpy as np
import pytest

from flaxcls import augment, build
from flaxcls.core.step import augmentation_key, make_init, make_train_step, seed_key
from flaxcls.data.commands import preview
from flaxcls.data.resident import gather
from flaxcls.errors import ConfigError
from flaxcls.runtime import sharding


@pytest.fixture(autouse=True)
def forget_flags():
    yield
    for name in preview.FLAGS:
        preview.FLAGS[name].unparse()


def test_augmentation_is_keyed_as_in_a_training_step(tiny_config):
    experiment = build.make_experiment(tiny_config(seed=7), sharding.make_mesh())
    keys = []

    def note(key, batch):
        keys.append(jax.random.key_data(key))
        return {**batch, "image": augment.normalize(batch["image"], (0.5,), (0.2,))}

    train_step = make_train_step(
        experiment.network,
        build.loss(tiny_config(), 5).with_weights(None),
        experiment.optimizer,
        note,
        num_classes=5,
        ema_decay=None,
        gradient_accumulation=1,
        max_grad_norm=1e4,
        platform="cpu",
    )
    init = make_init(experiment.network, experiment.optimizer, num_classes=5, ema=False)
    batch = {"image": np.zeros((4, 8, 8, 1), np.uint8), "label": np.arange(4)}
    state = jax.jit(init)(jax.random.key_data(jax.random.key(7)), batch["image"] / 255)
    step = jax.jit(lambda state: (train_step(state, batch), keys.pop()))
    for number in (0, 1):
        state, key = step(state)
        expected = jax.random.split(jax.random.fold_in(seed_key(7), number))[0]
        np.testing.assert_array_equal(key, jax.random.key_data(expected))


@pytest.mark.parametrize("mode", ["resident", "stream"])
@pytest.mark.parametrize("step", [0, 9])  # the second one in another epoch
def test_rows_are_the_images_of_the_batch(tiny_config, mode, step):
    config = tiny_config(input__mode=mode, augment=({"name": "flip", "mode": "alternating"},))
    evaluation, training, augmented = preview.preview(config, step=step, count=5)

    experiment = build.make_experiment(config, sharding.make_mesh())
    pipeline = experiment.train.open()
    batch = gather(pipeline.arrays, pipeline.batch(step))
    pipeline.close()
    images = np.asarray(batch["image"])[:5]
    np.testing.assert_array_equal(evaluation.images, images)  # of one size: nothing is cropped
    np.testing.assert_array_equal(training.images, images)
    mirrored = (augmented.images == images[:, :, ::-1]).all(axis=(1, 2, 3))
    same = (augmented.images == images).all(axis=(1, 2, 3))
    assert (mirrored ^ same).all() and mirrored.any() and same.any()
    names = [experiment.train.source.class_names[label] for label in np.asarray(batch["label"])[:5]]
    assert [words for (words,) in evaluation.captions] == [(name, 1.0) for name in names]
    assert augmented.captions == evaluation.captions


def test_parts_of_an_accumulated_batch_are_augmented_as_in_training(tiny_config):
    spec = ({"name": "mixup", "alpha": 1.0},)
    config = tiny_config(gradient_accumulation=2, augment=spec, data__mean=(0.5,), data__std=(0.2,))
    *_, shown = preview.preview(config, step=3, count=16)

    experiment = build.make_experiment(config, sharding.make_mesh())
    pipeline = experiment.train.open()
    batch = gather(pipeline.arrays, pipeline.batch(3))
    key = jax.random.split(jax.random.fold_in(seed_key(0), 3))[0]
    mix = augment.build(spec, mean=(0.5,), std=(0.2,))
    for part in (0, 1):
        images = {name: x[part::2] for name, x in batch.items()}
        images["label"] = jax.nn.one_hot(images["label"], 5)
        mixed = mix(augmentation_key(key, part, 2), images)["image"]
        pixels = np.round((np.asarray(mixed) * 0.2 + 0.5) * 255)
        np.testing.assert_allclose(shown.images[part::2], pixels, atol=1)


def test_crops_of_training_differ_from_those_of_evaluation(tiny_config):
    config = tiny_config(
        data__image_shape=(20, 30, 3),
        image_size=16,
        crop__name="random_resized_crop",
        model__name="resnet18",
        model__widths=None,
        model__stem="cifar",
    )
    config.eval.image_size = 12
    evaluation, training, augmented = preview.preview(config, step=0, count=3)
    assert evaluation.images.shape == (3, 12, 12, 3)
    assert training.images.shape == (3, 16, 16, 3)
    np.testing.assert_array_equal(augmented.images, training.images)  # nothing is augmented


def test_mixed_labels_are_reported_with_their_shares(tiny_config):
    config = tiny_config(augment=({"name": "mixup", "alpha": 1.0},))
    _, training, augmented = preview.preview(config, step=0, count=16)
    partners = training.images[np.arange(16) ^ 4].astype(float)
    share = max(share for words in augmented.captions for _, share in words[:1] if len(words) > 1)
    blends = [
        np.abs(weight * training.images + (1 - weight) * partners - augmented.images).max()
        for weight in (share, 1 - share)
    ]
    assert min(blends) < 1.1  # rounded
    for words in augmented.captions:
        assert len(words) in (1, 2) and sum(share for _, share in words) == pytest.approx(1)
    assert any(len(words) == 2 for words in augmented.captions)


def test_only_the_two_largest_shares_are_reported():
    labels = np.array([[0.1, 0.6, 0.3], [0, 1, 0], [0.5, 0.001, 0.499]])
    assert preview._largest(labels, ("a", "b", "c")) == [
        [("b", 0.6), ("c", 0.3)],
        [("b", 1.0)],
        [("a", 0.5), ("c", 0.499)],
    ]


def test_captions_are_shortened_to_the_width_with_their_shares():
    from PIL import ImageFont

    font = ImageFont.load_default(14)
    words = [("a long name of a class", 0.7), ("cat", 0.3)]
    assert preview._caption(words, font, 1000) == "a long name of a class 0.70 / cat 0.30"
    short = preview._caption(words, font, 160)
    assert font.getlength(short) <= 160
    assert short.startswith("a long") and short.endswith(".. 0.70 / cat 0.30")
    assert preview._caption([("cat", 1.0)], font, 160) == "cat"


def test_small_images_are_drawn_with_square_pixels():
    image = np.array([[[10], [250]], [[200], [0]]], np.uint8)
    row = preview.Row("title", image[None], [[("name", 1.0)]])
    picture = np.asarray(preview.draw([row]))
    side = preview._TILE // 2
    tile = picture[preview._MARGIN :, preview._TITLE :][: 2 * side, : 2 * side]
    expected = np.kron(image[..., 0], np.ones((side, side), np.uint8))
    np.testing.assert_array_equal(tile, np.stack([expected] * 3, axis=-1))


def test_file_is_written_for_any_count(recipe, tmp_path, run_main, capsys):
    from PIL import Image

    for count in (1, 10, 99):
        out = tmp_path / f"{count}.png"
        preview.main(
            ["preview", f"--config={recipe}", f"--out={out}", f"--count={count}", "--step=2"]
        )
        shown = min(count, 16)
        assert f"{shown} of the 16 examples of batch 2" in capsys.readouterr().out
        with Image.open(out) as picture:
            assert picture.height > -(-shown // 8) * 3 * 192
            assert picture.width > min(shown, 8) * 192
    result = run_main("preview", "--help", module="flaxcls.data")
    assert result.returncode == 0 and "--out=grid.png" in result.stdout and result.seconds < 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=a.png"], "--config=FILE is missing"),
        (["--config={recipe}"], "--out=FILE is missing"),
        (["--config={recipe}", "--out=a.txt"], "must end in .png, .jpg or .webp"),
        (["--config={recipe}", "--out=/nowhere/a.png"], "in a folder that does not exist"),
        (["--config={recipe}", "--out=a.png", "--config.seeed=1"], "did you mean 'seed'"),
    ],
)
def test_wrong_usage_is_reported_in_one_sentence(recipe, arguments, message):
    with pytest.raises(ConfigError, match=message):
        preview.main(["preview", *(text.format(recipe=recipe) for text in arguments)])
