"""Every network of MODELS: size, options, dtypes, image sizes and errors."""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls import models
from flaxcls.errors import ConfigError
from flaxcls.models.resnet import BottleneckBlock, ResNet


def shapes(module, image_shape):
    """The shapes of (logits, variables) for one image, without computing anything."""
    image = jnp.zeros((1, *image_shape))
    return jax.eval_shape(
        lambda key: module.init_with_output(key, image, train=False), jax.random.key(0)
    )


# Published: torchvision's documentation, He et al. 2015 table 6 (0.27M .. 1.7M), Zagoruyko &
# Komodakis 2016 table 5 (36.5M, 8.9M, 11.0M), Huang et al. 2016 table 2 (0.8M), timm's resnet50d,
# chenyaofo's VGG-16 (15.25M), the summaries printed by the tutorials.
@pytest.mark.parametrize(
    ("name", "image_shape", "num_classes", "options", "count"),
    [
        ("dense", (28, 28, 1), 10, {}, 535_818),
        ("keras_cnn", (32, 32, 3), 10, {}, 122_570),
        ("keras_small", (32, 32, 3), 10, {}, 42_442),
        ("torch_convnet", (32, 32, 3), 10, {}, 2_122_186),
        ("cifar_resnet20", (32, 32, 3), 10, {}, 269_722),
        ("cifar_resnet32", (32, 32, 3), 10, {}, 464_154),
        ("cifar_resnet44", (32, 32, 3), 10, {}, 658_586),
        ("cifar_resnet56", (32, 32, 3), 10, {}, 853_018),
        ("cifar_resnet110", (32, 32, 3), 10, {}, 1_727_962),
        ("wrn", (32, 32, 3), 10, {}, 36_479_194),
        ("wrn28_10", (32, 32, 3), 10, {}, 36_479_194),
        ("wrn40_4", (32, 32, 3), 10, {}, 8_949_210),
        ("wrn16_8", (32, 32, 3), 10, {}, 10_961_370),
        ("resnet18", (32, 32, 3), 10, {"stem": "cifar"}, 11_173_962),
        ("resnet18", (224, 224, 3), 1000, {}, 11_689_512),
        ("resnet34", (224, 224, 3), 1000, {}, 21_797_672),
        ("resnet50", (224, 224, 3), 1000, {}, 25_557_032),
        ("resnet101", (224, 224, 3), 1000, {}, 44_549_160),
        ("resnet152", (224, 224, 3), 1000, {}, 60_192_808),
        ("resnet50d", (224, 224, 3), 1000, {}, 25_576_264),
        ("resnext50_32x4d", (224, 224, 3), 1000, {}, 25_028_904),
        ("wide_resnet50_2", (224, 224, 3), 1000, {}, 68_883_240),
        ("alexnet", (224, 224, 3), 1000, {}, 61_100_840),
        ("cifar_alexnet", (32, 32, 3), 10, {}, 2_472_266),
        ("vgg11", (224, 224, 3), 1000, {}, 132_863_336),
        ("vgg11_bn", (224, 224, 3), 1000, {}, 132_868_840),
        ("vgg13", (224, 224, 3), 1000, {}, 133_047_848),
        ("vgg13_bn", (224, 224, 3), 1000, {}, 133_053_736),
        ("vgg16", (224, 224, 3), 1000, {}, 138_357_544),
        ("vgg16_bn", (224, 224, 3), 1000, {}, 138_365_992),
        ("vgg19", (224, 224, 3), 1000, {}, 143_667_240),
        ("vgg19_bn", (224, 224, 3), 1000, {}, 143_678_248),
        ("cifar_vgg16_bn", (32, 32, 3), 10, {}, 15_253_578),
        ("densenet121", (224, 224, 3), 1000, {}, 7_978_856),
        ("densenet161", (224, 224, 3), 1000, {}, 28_681_000),
        ("densenet169", (224, 224, 3), 1000, {}, 14_149_480),
        ("densenet201", (224, 224, 3), 1000, {}, 20_013_928),
        ("densenet_bc", (32, 32, 3), 10, {"depth": 40}, 176_122),
        ("densenet_bc", (32, 32, 3), 10, {}, 769_162),
        ("efficientnet_b0", (224, 224, 3), 1000, {}, 5_288_548),
        ("efficientnet_b1", (240, 240, 3), 1000, {}, 7_794_184),
        ("efficientnet_b3", (300, 300, 3), 1000, {}, 12_233_232),
        ("efficientnet_b4", (380, 380, 3), 1000, {}, 19_341_616),
        ("efficientnet_lite0", (224, 224, 3), 1000, {}, 4_652_008),
        ("mobilenet_v3_small", (224, 224, 3), 1000, {}, 2_542_856),
        ("mobilenet_v3_large", (224, 224, 3), 1000, {}, 5_483_032),
        ("mobilenetv4_conv_medium", (256, 256, 3), 1000, {}, 9_715_512),
        ("vit_ti16", (224, 224, 3), 1000, {}, 5_717_416),
        ("vit_s16", (224, 224, 3), 1000, {}, 22_050_664),
        ("vit_b16", (224, 224, 3), 1000, {}, 86_567_656),
        ("vit_b32", (224, 224, 3), 1000, {}, 88_224_232),
        ("vit_l16", (224, 224, 3), 1000, {}, 304_326_632),
        ("vit_l32", (224, 224, 3), 1000, {}, 306_535_400),
        ("deit3_s16", (224, 224, 3), 1000, {}, 22_059_496),
        ("mixer_b16", (224, 224, 3), 1000, {}, 59_880_472),
        ("swin_t", (224, 224, 3), 1000, {}, 28_288_354),
        ("convnext_tiny", (224, 224, 3), 1000, {}, 28_589_128),
        ("convnext_small", (224, 224, 3), 1000, {}, 50_223_688),
        ("convnext_base", (224, 224, 3), 1000, {}, 88_591_464),
    ],
)
def test_parameter_count_is_the_published_one(name, image_shape, num_classes, options, count):
    module = models.build(name, num_classes=num_classes, **options)
    logits, variables = shapes(module, image_shape)
    assert models.parameter_count(variables["params"]) == count
    assert logits.shape == (1, num_classes)


LARGE = ("cifar_", "wrn", "wide_", "resnet", "vgg", "densenet")
SMALL = {"cifar_resnet20", "wrn16_8", "resnet18", "resnet50", "resnet50d"}
SMALL |= {"cifar_alexnet", "cifar_vgg11_bn", "vgg11", "densenet_bc"}
SMALL |= {name for name in models.MODELS if not name.startswith(LARGE)}


def size_for(module, least):
    """The least size of images that a network takes, from `least` pixels on."""
    least = max(least, getattr(module, "minimum_image_size", 1))
    multiple = getattr(module, "image_size_multiple", 1)
    return -(-least // multiple) * multiple


# A member or two of every family: the others differ in numbers alone.
SMALL = {"dense", "keras_cnn", "keras_small", "torch_convnet", "digits_cnn", "quick"}
SMALL |= {"cifar_resnet20", "wrn16_8", "resnet18", "resnet50", "resnext50_32x4d", "resnet50d"}
SMALL |= {"alexnet", "cifar_alexnet", "vgg11", "cifar_vgg11_bn", "densenet121", "densenet_bc"}
SMALL |= {"efficientnet_b0", "efficientnet_lite0", "mobilenet_v3_small", "mobilenetv4_conv_medium"}
SMALL |= {"vit", "deit3_s16", "mixer", "convnext", "swin"}
WITHOUT_CONVOLUTION = {"dense", "vit", "deit3_s16", "mixer"}


@pytest.mark.parametrize("name", sorted(SMALL))
def test_logits_parameters_and_statistics_are_float32_when_computing_in_bfloat16(name):
    module = models.build(name, num_classes=7, dtype=jnp.bfloat16)
    size = size_for(module, 32)
    logits, variables = shapes(module, (size, size, 3))
    assert (logits.shape, logits.dtype) == ((1, 7), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", sorted(SMALL - WITHOUT_CONVOLUTION))
def test_dtype_is_what_the_convolutions_compute_in(name):
    module = models.build(name, num_classes=7, dtype=jnp.bfloat16)
    size = size_for(module, 32)
    image = jnp.zeros((1, size, size, 3))
    _, variables = shapes(module, (size, size, 3))
    text = str(jax.make_jaxpr(lambda v: module.apply(v, image, train=False))(variables))
    convolutions = [line for line in text.splitlines() if "= conv_general_dilated" in line]
    assert convolutions
    assert all(":bf16[" in line for line in convolutions)


def fits(module, size):
    """Whether nothing is empty for an image of that size, also between the layers.

    Not for networks that roll or pad by nothing, which JAX does by slices of nothing.
    """
    image = jnp.zeros((1, size, size, 3))
    run = functools.partial(module.init_with_output, x=image, train=False)
    try:
        program = jax.make_jaxpr(run)(jax.random.key(0))
    except (ValueError, TypeError, ZeroDivisionError):
        return False
    return not re.search(r"f32\[(\d+,)*0[,\]]", str(program))


@pytest.mark.parametrize(
    ("name", "options", "minimum"),
    [
        ("dense", {}, 1),
        ("keras_cnn", {}, 18),
        ("keras_small", {}, 10),
        ("torch_convnet", {}, 4),
        ("digits_cnn", {}, 2),
        ("quick", {}, 9),
        ("quick", {"widths": (8, 8)}, 5),
        ("cifar_resnet20", {}, 1),
        ("wrn16_8", {}, 1),
        ("resnet18", {}, 1),
        ("convnext", {}, 32),
        ("convnext", {"depths": (1, 1)}, 8),
        ("resnet18", {"stem": "cifar"}, 1),
        ("alexnet", {}, 63),
        ("cifar_alexnet", {}, 29),
        ("vgg11", {}, 32),
        ("densenet121", {}, 29),
        ("densenet_bc", {"depth": 10}, 4),
    ],
)
def test_the_minimum_image_size_is_the_least_that_leaves_no_layer_empty(name, options, minimum):
    module = models.build(name, num_classes=3, **options)
    assert fits(module, minimum)
    models.check_image_shape(module, (minimum, minimum, 3))
    if minimum > 1:
        assert not fits(module, minimum - 1)
        with pytest.raises(ConfigError, match=f"{name} needs images of at least"):
            models.check_image_shape(module, (minimum, minimum - 1, 3))


@pytest.mark.parametrize("name", sorted(SMALL))
def test_number_of_images_may_be_open(name):
    module = models.build(name, num_classes=3)
    size = size_for(module, 18)
    variables = models.shapes(module, (size, size, 3))
    shape = jax.export.symbolic_shape(f"b, {size}, {size}, 3")
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    logits = jax.eval_shape(functools.partial(module.apply, train=False), variables, images)
    assert (str(logits.shape[0]), *logits.shape[1:]) == ("b", 3)


def test_check_image_shape_is_one_sentence():
    module = models.build("keras_cnn", num_classes=10)
    with pytest.raises(ConfigError) as error:
        models.check_image_shape(module, (8, 8, 1))
    assert str(error.value) == "keras_cnn needs images of at least 18x18 pixels, got 8x8"


def test_check_image_shape_knows_multiples():
    class Patches:
        name = "patches"
        image_size_multiple = 16

    models.check_image_shape(Patches(), (32, 48, 3))
    with pytest.raises(ConfigError, match="multiples of 16 pixels, got 32x40"):
        models.check_image_shape(Patches(), (32, 40, 3))


@pytest.mark.parametrize("name", models.MODELS)
def test_every_option_has_an_annotation_and_a_default_that_builds(name):
    options = models.options(name)
    for parameter in options.values():
        assert parameter.annotation is not parameter.empty
        assert parameter.default is not parameter.empty
    models.build(name, num_classes=2, **{key: p.default for key, p in options.items()})


def test_options_leave_out_what_a_name_fixes():
    assert set(models.options("wrn")) == {"depth", "width", "dropout", "remat"}
    assert set(models.options("wrn28_10")) == {"dropout", "remat"}
    resnet = {"stem", "width", "zero_init_residual", "pooled_shortcut", "remat", "drop_path"}
    assert set(models.options("resnet50")) == resnet
    assert set(models.options("resnet50d")) == resnet - {"stem", "pooled_shortcut"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "resnet51",
            {},
            "config.model.name is 'resnet51', which is not known, did you mean 'resnet",
        ),
        ("resnet50", {"stm": "cifar"}, "model.stm is not used by resnet50, did you mean 'stem'"),
        ("wrn28_10", {"depth": 40}, "config.model.depth is not used by wrn28_10"),
        (
            "cifar_resnet20",
            {"width": 2},
            "width is not used by cifar_resnet20; it takes no options",
        ),
        (
            "resnet50",
            {"stem": "imagnet"},
            "stem must be 'imagenet' or 'deep' or 'cifar' for resnet50, got 'imagnet'",
        ),
        ("resnet50", {"width": 0}, "config.model.width must be int at least 1 for resnet50, got 0"),
        ("vit", {"heads": 5}, "`width` of vit must be a multiple of its 5 `heads`, got 384"),
        ("swin", {"width": 48}, "`width` of swin must be a multiple of its `head_width`, 32, got"),
        ("wrn", {"depth": 27}, "`depth` of wrn must be 4 plus a multiple of 6, got 27"),
        ("densenet_bc", {"depth": 41}, "`depth` of densenet_bc must be 4 plus a multiple of 6"),
        ("resnext50_32x4d", {"width": 8}, "`width` of resnext50_32x4d must be a multiple of 16"),
        ("wrn", {"depth": 4}, "`depth` of wrn must be 4 plus a multiple of 6, got 4"),
        ("wrn", {"dropout": 1.0}, "dropout must be float at least 0 and below 1 for wrn, got 1.0"),
        (
            "dense",
            {"widths": (8, 0)},
            "widths must be tuple[int, ...], each at least 1 for dense, got (8, 0)",
        ),
        (
            "dense",
            {"widths": 8},
            "widths must be tuple[int, ...], each at least 1 for dense, got 8",
        ),
        ("dense", {"dropout": "0.5"}, "below 1 for dense, got '0.5'"),
        ("dense", {"activation": "swish"}, "'tanh' or 'gelu' for dense, got 'swish'"),
        (
            "keras_cnn",
            {"pool": "mean"},
            "pool must be 'max' or 'average' for keras_cnn, got 'mean'",
        ),
        ("keras_small", {"dropout": -0.1}, "at least 0 and below 1 for keras_small, got -0.1"),
        (
            "quick",
            {"widths": ()},
            "widths must be tuple[int, ...], each at least 1 for quick, got ()",
        ),
        (
            "quick",
            {"batch_norm_momentum": 1.0},
            "batch_norm_momentum must be float at least 0 and below 1 for quick",
        ),
    ],
)
def test_a_bad_option_is_one_sentence(name, options, message):
    with pytest.raises(ConfigError) as error:
        models.build(name, num_classes=10, **options)
    assert message in str(error.value)


def test_num_classes_must_be_positive():
    with pytest.raises(ConfigError, match="`num_classes` of dense must be at least 1, got 0"):
        models.build("dense", num_classes=0)


def test_a_list_option_makes_a_hashable_module():
    module = models.build("dense", num_classes=2, widths=[4, 3])
    assert hash(module) == hash(models.build("dense", num_classes=2, widths=(4, 3)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dense", {"widths": (8,)}),
        ("keras_small", {}),
        ("digits_cnn", {}),
        ("wrn", {"depth": 10, "width": 1}),
        ("alexnet", {"hidden": 8}),
        pytest.param("cifar_vgg11_bn", {}, marks=pytest.mark.torture),  # slow to compile
        ("densenet_bc", {"depth": 10, "growth": 4}),
        ("vit", {"depth": 1, "width": 8, "heads": 2, "patch": 5}),
        ("mixer", {"depth": 1, "width": 8, "patch": 5}),
    ],
)
def test_dropout_acts_in_training_only(name, options):
    module = models.build(name, num_classes=3, dropout=0.5, **options)
    size = size_for(module, 10)
    image = jax.random.normal(jax.random.key(0), (2, size, size, 1))
    variables = jax.jit(lambda key: module.init(key, image, train=False))(jax.random.key(1))
    noise = functools.partial(jax.random.normal, jax.random.key(2))
    variables = jax.tree.map(lambda x: x + 0.1 * noise(x.shape), variables)  # no head is zero

    @functools.partial(jax.jit, static_argnums=0)
    def logits(train, seed):
        rngs = {"dropout": jax.random.key(seed)}
        output, _ = module.apply(variables, image, train=train, mutable=["batch_stats"], rngs=rngs)
        return output

    assert jnp.array_equal(logits(False, 0), logits(False, 1))
    assert not jnp.array_equal(logits(True, 0), logits(True, 1))


@pytest.mark.parametrize("zero", [False, True])
def test_zero_init_residual_starts_every_block_as_its_shortcut(zero):
    module = ResNet(
        num_classes=3,
        stage_sizes=(2,),
        block=BottleneckBlock,
        width=4,
        stem="cifar",
        zero_init_residual=zero,
    )
    image = jnp.zeros((1, 4, 4, 3))
    variables = jax.jit(lambda key: module.init(key, image, train=False))(jax.random.key(0))
    for block in ("stage1_block1", "stage1_block2"):
        params = variables["params"][block]
        assert bool((params["norm3"]["scale"] == 0).all()) is zero
        assert bool((params["norm2"]["scale"] == 1).all())


def test_only_quick_freezes_and_learns_from_data():
    module = models.build("digits_cnn", num_classes=3)
    assert models.frozen(module) is None
    variables = {"params": {}}
    assert models.initialize_from_data(module, variables, jnp.zeros((1, 8, 8, 1))) is variables
    assert models.frozen(models.build("quick", num_classes=3)) == r"^whiten/kernel$"


@pytest.mark.parametrize("depth", [18, 50])
def test_drop_path_of_resnets_leaves_out_the_branches_of_late_blocks(depth):
    options = {"stem": "cifar", "width": 4}
    network = models.build(f"resnet{depth}", num_classes=3, drop_path=0.9, **options)
    plain = models.build(f"resnet{depth}", num_classes=3, **options)
    image = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    variables = jax.jit(functools.partial(network.init, train=False))(jax.random.key(1), image)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(network, train):
        def is_block(module, method):
            return module.name and "_block" in module.name and method == "__call__"

        rngs = {"dropout": jax.random.key(2)}
        mutable = ["intermediates", "batch_stats"]
        logits, state = network.apply(
            variables,
            image,
            train=train,
            rngs=rngs,
            mutable=mutable,
            capture_intermediates=is_block,
        )
        return logits, state["intermediates"]

    logits, blocks = run(network, True)
    expected, expected_blocks = run(plain, True)
    first, second = "stage1_block1", "stage1_block2"
    np.testing.assert_array_equal(blocks[first]["__call__"], expected_blocks[first]["__call__"])
    assert abs(blocks[second]["__call__"][0] - expected_blocks[second]["__call__"][0]).max() > 1e-3
    np.testing.assert_array_equal(run(network, False)[0], run(plain, False)[0])
