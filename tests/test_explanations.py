"""Heat maps: against their definitions, on networks whose reasons are known, and as pictures."""

import functools
import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import flaxcls
from flaxcls import models
from flaxcls.errors import ConfigError, DataError
from flaxcls.inference.predictor import Predictor
from flaxcls.insight import drawing, explanations
from flaxcls.insight.explainer import Explainer
from flaxcls.insight.explanations import METHODS
from flaxcls.models.layers import record

explain = importlib.import_module("flaxcls.explain")  # flaxcls.explain is the function
RANDOM = np.random.default_rng(0)
GRADIENTS = ("saliency", "smoothgrad", "integrated_gradients")


def digits(count):
    """Pictures, uint8 [N, 8, 8, 1]."""
    from sklearn.datasets import load_digits

    images = load_digits().images[-count:, :, :, None]
    return np.round(images * 255 / 16).astype(np.uint8)


@pytest.fixture(scope="module")
def predictor(digits_run):
    return Predictor(digits_run, batch_size=8)


@pytest.fixture(scope="module")
def asked(predictor):
    """The network of the run with its variables, eight images as it takes them, and labels."""
    restored, images = predictor.restored, digits(8)
    mean, std = restored.metadata["mean"], restored.metadata["std"]
    normalized = (images / np.float32(255) - np.float32(mean)) / np.float32(std)
    labels = predictor(images).logits.argmax(1).astype(np.int32)
    variables = jax.device_get(predictor.variables)  # from eight devices
    return restored.experiment.network, variables, jnp.asarray(normalized), labels


class Patches(nn.Module):
    """Red patches speak for class 0, blue ones for class 1, and nothing else for anything."""

    num_classes: int = 2

    @nn.compact
    def __call__(self, x, train):
        kernel = jnp.zeros((3, 3, 3, 2)).at[:, :, 0, 0].set(1 / 9).at[:, :, 2, 1].set(1 / 9)
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = record(self, "stage1", nn.relu(x - 0.8))
        return x.mean((1, 2))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "attention_rollout"])
def test_heat_is_where_the_patch_is_that_the_class_depends_on(method):
    images = RANDOM.uniform(0, 0.3, (4, 32, 32, 3)).astype(np.float32)
    places = RANDOM.integers(2, 20, (4, 2, 2))
    inside = np.zeros((4, 2, 32, 32), bool)
    for image, both, masks in zip(images, places, inside, strict=True):
        for channel, (top, left), mask in zip((0, 2), both, masks, strict=True):
            mask[top : top + 8, left : left + 8] = True
            image[mask, channel] += 1
    compute = METHODS[method](Patches())
    for label in (0, 1):
        heat = compute({}, jnp.asarray(images), jnp.full(4, label))
        heat = np.maximum(heat, 0)
        share = (heat * inside[:, label]).sum((1, 2)) / heat.sum((1, 2))
        assert heat.shape == (4, 32, 32) and heat.dtype == np.float32
        # A patch is 1/16 of the image; squares of `occlusion` reach far over its border.
        assert share.min() > (0.45 if method == "occlusion" else 0.7), share


def test_saliency_is_the_gradient_of_one_logit(asked):
    network, variables, images, labels = asked
    heat = explanations.saliency(network)(variables, images, labels)

    @jax.jit
    @jax.grad
    def gradient(image, label):
        return network.apply(variables, image[None], train=False)[0, label]

    for image, label, map_of_image in zip(images, labels, heat, strict=True):
        expected = np.abs(gradient(image, label)).max(-1)
        np.testing.assert_allclose(map_of_image, expected, rtol=1e-3, atol=1e-5)


def test_smoothgrad_without_noise_is_saliency_and_with_it_is_seeded(asked):
    network, *arguments = asked
    plain = explanations.saliency(network)(*arguments)
    still = explanations.smoothgrad(network, samples=2, noise=0.0)(*arguments)
    np.testing.assert_allclose(still, plain, rtol=1e-4, atol=1e-6)
    noisy = [explanations.smoothgrad(network, samples=4, seed=s)(*arguments) for s in (1, 1, 2)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert np.abs(noisy[0] - noisy[2]).max() > 0.01 < np.abs(noisy[0] - plain).max()


def test_integrated_gradients_add_up_to_what_the_image_changes(predictor):
    images = digits(20)  # of batches of eight
    for class_name in (None, "3"):
        found = Explainer(predictor, "integrated_gradients", class_name)(images)
        names = [each.class_name for each in found]
        labels = [predictor.class_names.index(name) for name in names]
        network, metadata = predictor.restored.experiment.network, predictor.restored.metadata
        blank = jnp.zeros((1, 8, 8, 1))
        whole = predictor(images).logits[np.arange(20), labels]
        without = np.asarray(network.apply(predictor.variables, blank, train=False))[0, labels]
        parts = np.array([each.heat.sum(dtype=np.float64) for each in found])
        gaps = np.abs(parts - (whole - without)) / np.abs(whole - without)
        assert gaps.max() <= 0.011, metadata["mean"]
        np.testing.assert_allclose([each.gap for each in found], gaps, atol=1e-3)
        assert not any(each.note() for each in found)


def test_what_casts_doubt_on_the_heat_is_told(predictor, asked):
    found = Explainer(predictor, "integrated_gradients")(digits(1))[0]
    blank = found._replace(heat=-np.abs(found.heat), method="gradcam", class_name="a\tb")
    assert blank.note() == (
        "nothing speaks for a\\tb, as far as gradcam tells; hirescam may tell more"
    )
    assert found._replace(gap=0.034).note() == (
        "the parts of the pixels add up to the difference of the logit only within 3.4% of it"
    )
    network, *arguments = asked
    coarse = explanations.integrated_gradients(network, max_steps=2)(*arguments)
    gap = explanations.make_completeness_gap(network)(*arguments, coarse)
    assert gap.max() > 0.02


def test_occlusion_is_what_hiding_each_square_changes(asked):
    network, variables, images, labels = asked
    apply = jax.jit(lambda images: network.apply(variables, images, train=False))
    rows, side = np.arange(len(labels)), 3  # 0.4 of 8 pixels
    whole = np.asarray(apply(images))[rows, labels]
    heat, covered = np.zeros((8, 8, 8)), np.zeros((8, 8))
    for top in range(8 - side + 1):
        for left in range(8 - side + 1):
            square = slice(top, top + side), slice(left, left + side)
            hidden = np.array(images)
            hidden[:, *square] = 0
            fall = whole - np.asarray(apply(hidden))[rows, labels]
            heat[:, *square] += fall[:, None, None]
            covered[square] += 1
    found = explanations.occlusion(network, patch=0.4)(variables, images, labels)
    np.testing.assert_allclose(found, heat / covered, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(8, 8), (32, 20), (224, 224), (1, 5)])
def test_squares_cover_every_pixel_and_none_outside(shape):
    covered = np.zeros(shape, int)
    for top, left, side in explanations.squares(shape, 0.15):
        assert top + side <= shape[0] and left + side <= shape[1]
        covered[top : top + side, left : left + side] += 1
    assert covered.min() >= 1


@pytest.mark.parametrize("method", ["hirescam", *GRADIENTS])
def test_heat_is_another_where_weights_are_random(asked, method):
    """Adebayo et al. 2018, arXiv:1810.03292: else it would be of the image, not of the network."""
    network, variables, images, labels = asked
    compute = METHODS[method](network)
    shuffle = lambda x: jnp.asarray(RANDOM.permuted(np.ravel(x)).reshape(x.shape))  # noqa: E731
    random = {**variables, "params": jax.tree.map(shuffle, variables["params"])}
    heats = [compute(weights, images, labels) for weights in (variables, random)]
    alike = [np.corrcoef(np.ravel(a), np.ravel(b))[0, 1] for a, b in zip(*heats, strict=True)]
    assert np.abs(np.mean(alike)) < 0.5, alike


def small_vit(**options):
    network = models.build("vit", num_classes=4, depth=3, width=16, heads=2, patch=8, **options)
    shapes = models.shapes(network, (16, 24, 3))
    draw = lambda x: jnp.asarray(RANDOM.normal(size=x.shape), jnp.float32)  # noqa: E731
    return network, jax.tree.map(draw, shapes)


@pytest.mark.parametrize(
    "options",
    [{}, {"remat": True, "registers": 2}, {"pool": "average"}],
)
def test_rollout_is_the_product_of_the_attention_of_all_blocks(options):
    network, variables = small_vit(**options)
    images = jnp.asarray(RANDOM.normal(size=(2, 16, 24, 3)), jnp.float32)
    unfused = network.clone(remat=False)  # whose layers can be seen
    only = {"capture_intermediates": lambda module, _: module.name == "qkv"}
    apply = functools.partial(unfused.apply, train=False, mutable=["intermediates"], **only)
    _, state = jax.jit(apply)(variables, images)
    tokens = 6 + options.get("registers", 0) + ("pool" not in options)
    rollout = np.eye(tokens)
    for number in (1, 2, 3):
        (qkv,) = state["intermediates"][f"block{number}"]["attn"]["qkv"]["__call__"]
        q, k, _ = np.asarray(qkv, np.float64).reshape(2, tokens, 3, 2, 8).transpose(2, 0, 3, 1, 4)
        scores = q @ k.swapaxes(2, 3) / 8**0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = (weights / weights.sum(-1, keepdims=True)).mean(1)
        rollout = (weights + np.eye(weights.shape[1])) / 2 @ rollout
    rows = rollout.mean(1) if options.get("pool") else rollout[:, 0]
    heat = explanations.attention_rollout(network)(variables, images, jnp.zeros(2, jnp.int32))
    expected = jax.image.resize(rows[:, -6:].reshape(2, 2, 3), (2, 16, 24), "bilinear")
    np.testing.assert_allclose(heat, expected, rtol=2e-4, atol=1e-6)


def test_gradcam_of_a_class_token_is_of_the_last_block_whose_patches_matter():
    network, variables = small_vit()
    images = jnp.asarray(RANDOM.normal(size=(2, 16, 24, 3)), jnp.float32)
    labels = jnp.array([1, 3])

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradients(added):
        logits, found = models.logits_and_features(network, variables, images, added)
        return logits[jnp.arange(2), labels].sum(), found

    names = ("block2", "block3")
    gradient, found = gradients({name: jnp.zeros((2, 2, 3, 16)) for name in names})
    assert not gradient["block3"].any()
    block2, gradient = found["block2"], gradient["block2"]
    cam = nn.relu((block2 * gradient.mean((1, 2), keepdims=True)).sum(-1))
    assert cam.max() > 0
    heat = explanations.gradcam(network)(variables, images, labels)
    expected = jax.image.resize(cam, heat.shape, "bilinear")
    np.testing.assert_allclose(heat, expected, rtol=1e-3, atol=1e-5)


def test_networks_that_a_method_is_not_for_are_told_in_a_sentence():
    dense = models.build("dense", num_classes=3)
    shapes = models.shapes(dense, (8, 8, 1)), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, jnp.int32)
    with pytest.raises(ConfigError, match="gradcam needs a network with maps, and dense records"):
        jax.eval_shape(explanations.gradcam(dense), *shapes)
    for name in ("dense", "digits_cnn", "swin"):
        network = models.build(name, num_classes=3)
        shapes = models.shapes(network, (32, 32, 3)), *shapes[1:]
        images = jnp.zeros((1, 32, 32, 3))
        with pytest.raises(ConfigError, match=f"as those of vit, and {name} has none"):
            compute = explanations.attention_rollout(network)
            jax.eval_shape(compute, shapes[0], images, shapes[2])


@pytest.mark.parametrize("method", ["gradcam", "smoothgrad"])
def test_heat_of_a_picture_does_not_depend_on_those_beside_it(predictor, method):
    images = digits(11)
    explainer = Explainer(predictor, method)
    together, alone = explainer(images), explainer(images[9:10])
    np.testing.assert_allclose(together[9].heat, alone[0].heat, rtol=1e-4, atol=1e-5)
    assert [each.class_name for each in together] == [
        predictor.class_names[label] for label in predictor(images).logits.argmax(1)
    ]
    np.testing.assert_array_equal(np.stack([each.image for each in together]), images)


def test_overlay_is_grey_where_there_is_no_heat_and_tells_for_from_against():
    image = RANDOM.integers(0, 256, (6, 6, 3), np.uint8)
    heat = np.zeros((6, 6), np.float32)
    grey = drawing.overlay(image, heat)
    np.testing.assert_array_equal(grey, np.round(image.mean(2, keepdims=True)).repeat(3, 2))
    heat[0], heat[1] = 2, 0.5
    hot = drawing.overlay(image, heat).astype(int)
    np.testing.assert_array_equal(hot[2:], grey[2:])
    coloured = np.ptp(hot, axis=2)
    assert coloured[0].min() > 50 and coloured[1].min() > 20  # yellow, violet
    heat[1] = -2
    red, _, blue = drawing.overlay(image, heat).astype(int).transpose(2, 0, 1)
    assert (red > blue + 100)[0].all() and (blue > red + 100)[1].all()


@pytest.fixture
def command(digits_run, tmp_path, capsys):
    """Runs the command in this process: the lines of both outputs."""

    def run(*arguments):
        for name in explain.FLAGS:
            explain.FLAGS[name].unparse()
        explain.main(["explain", f"--run={digits_run}", f"--out={tmp_path}/out", *arguments])
        said = capsys.readouterr()
        return said.out.splitlines(), said.err.splitlines()

    return run


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "a" / "x.png", tmp_path / "b" / "x.png", tmp_path / "b" / "<y>.png"]
    for path, image in zip(paths, digits(3), strict=True):
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    return paths


def test_command_writes_a_picture_for_each_and_says_its_class(command, files, tmp_path, predictor):
    lines, errors = command(f"{tmp_path}/a", f"{tmp_path}/b", "--method=saliency")
    order = [files[0], files[2], files[1]]
    expected = predictor.predict(order)
    for line, file, prediction in zip(lines, order, expected, strict=True):
        stem = f"{file.stem}-2" if file == files[1] else file.stem
        png = tmp_path / "out" / f"{stem}.saliency.png"
        assert line.split("\t") == [
            str(file),
            prediction.name,
            f"{prediction.probability:.4f}",
            str(png),
        ]
        with Image.open(png) as picture:
            assert picture.size[0] > 2 * 192 < picture.size[1] * 2
    assert not errors


def test_command_explains_the_class_that_is_asked_for(command, files, predictor):
    lines, _ = command(str(files[0]), "--class=7", "--method=occlusion")
    probability = predictor.predict(files[0]).probabilities["7"]
    assert lines[0].split("\t")[1:3] == ["7", f"{probability:.4f}"]


def test_broken_pictures_are_named_and_the_others_explained(command, files, tmp_path, capsys):
    files[1].write_bytes(b"no picture")
    with pytest.raises(DataError, match="1 of 3 files could not be read") as error:
        command(*map(str, files), "--method=saliency")
    assert error.value.exit_code == 45
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2 and str(files[1]) in said.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--class=seven",), "the run has no class 'seven'"),
        (("--method=gradcm",), "gradcam"),
        (("--method=attention_rollout",), "digits_cnn has none"),
        (("--method=attention_rollout", "--class=7"), "the same for every class"),
        (("--out=/dev/null/x",), "--out=/dev/null/x can't be made a folder"),
    ],
)
def test_wrong_arguments_are_one_sentence(command, files, arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        command(str(files[0]), *arguments)


def test_command_and_library_know_the_same_methods():
    assert tuple(METHODS) == explain.METHODS


def test_python_function_explains_paths_and_arrays(digits_run, files):
    one = flaxcls.explain(digits_run, files[0], method="saliency")
    also = flaxcls.explain(digits_run, [digits(3)[0], files[0]], method="saliency")
    np.testing.assert_allclose(one.heat, also[1].heat, rtol=1e-4, atol=1e-6)
    assert one.heat.shape == (8, 8) and one.class_name == one.prediction.name
    assert flaxcls.explain(digits_run, []) == []
    with pytest.raises(ConfigError, match="no method 'gradcm', did you mean 'gradcam'"):
        flaxcls.explain(digits_run, files[0], method="gradcm")


@pytest.mark.slow
def test_the_command_explains_in_a_process_of_its_own(digits_run, run_main, files, tmp_path):
    arguments = (f"--run={digits_run}", files[0], f"--out={tmp_path}/out", "--method=hirescam")
    result = run_main("explain", *arguments, module="flaxcls")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("/out/x.hirescam.png\n")
