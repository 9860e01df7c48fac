"""The networks: `build` makes one by its name in MODELS."""

import functools
import inspect
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flaxcls.config.options import accepted, check, look_up
from flaxcls.config.user_code import file_of, in_user_code
from flaxcls.errors import ConfigError
from flaxcls.models.convnet import DigitsCNN, KerasCNN, KerasSmall, TorchConvNet
from flaxcls.models.convnext import ConvNeXt
from flaxcls.models.dense import DenseNetwork
from flaxcls.models.densenet import DenseNet, DenseNetBC
from flaxcls.models.efficientnet import EfficientNet, EfficientNetLite
from flaxcls.models.layers import title
from flaxcls.models.mixer import Mixer
from flaxcls.models.mobilenet import MobileNetV3, MobileNetV4
from flaxcls.models.quick import Quick
from flaxcls.models.recorded import attention_weights as attention_weights
from flaxcls.models.recorded import features as features
from flaxcls.models.recorded import logits_and_features as logits_and_features
from flaxcls.models.recorded import maps as maps
from flaxcls.models.resnet import (
    BasicBlock,
    BottleneckBlock,
    CifarResNet,
    ResNet,
    ResNeXtBlock,
    WideBottleneckBlock,
    WideResNet,
)
from flaxcls.models.swin import Swin
from flaxcls.models.vgg import VGG, AlexNet, CifarAlexNet
from flaxcls.models.vit import VisionTransformer

_partial = functools.partial
_resnet_d = _partial(ResNet, stem="deep", pooled_shortcut=True)
_cifar_vgg = _partial(VGG, norm=True, pool_size=1, hidden=512)
MODELS: dict[str, Callable[..., nn.Module]] = {
    "dense": DenseNetwork,
    "keras_cnn": KerasCNN,
    "keras_small": KerasSmall,
    "torch_convnet": TorchConvNet,
    "digits_cnn": DigitsCNN,
    "quick": Quick,
    "cifar_resnet20": _partial(CifarResNet, depth=20),
    "cifar_resnet32": _partial(CifarResNet, depth=32),
    "cifar_resnet44": _partial(CifarResNet, depth=44),
    "cifar_resnet56": _partial(CifarResNet, depth=56),
    "cifar_resnet110": _partial(CifarResNet, depth=110),
    "wrn": WideResNet,
    "wrn16_8": _partial(WideResNet, depth=16, width=8),
    "wrn28_10": _partial(WideResNet, depth=28, width=10),
    "wrn40_4": _partial(WideResNet, depth=40, width=4),
    "resnet18": _partial(ResNet, stage_sizes=(2, 2, 2, 2), block=BasicBlock),
    "resnet34": _partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BasicBlock),
    "resnet50": _partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BottleneckBlock),
    "resnet101": _partial(ResNet, stage_sizes=(3, 4, 23, 3), block=BottleneckBlock),
    "resnet152": _partial(ResNet, stage_sizes=(3, 8, 36, 3), block=BottleneckBlock),
    "wide_resnet50_2": _partial(ResNet, stage_sizes=(3, 4, 6, 3), block=WideBottleneckBlock),
    "resnext50_32x4d": _partial(ResNet, stage_sizes=(3, 4, 6, 3), block=ResNeXtBlock),
    "resnet50d": _partial(_resnet_d, stage_sizes=(3, 4, 6, 3), block=BottleneckBlock),
    "alexnet": AlexNet,
    "cifar_alexnet": CifarAlexNet,
    "vgg11": _partial(VGG, stage_sizes=(1, 1, 2, 2, 2)),
    "vgg13": _partial(VGG, stage_sizes=(2, 2, 2, 2, 2)),
    "vgg16": _partial(VGG, stage_sizes=(2, 2, 3, 3, 3)),
    "vgg19": _partial(VGG, stage_sizes=(2, 2, 4, 4, 4)),
    "vgg11_bn": _partial(VGG, stage_sizes=(1, 1, 2, 2, 2), norm=True),
    "vgg13_bn": _partial(VGG, stage_sizes=(2, 2, 2, 2, 2), norm=True),
    "vgg16_bn": _partial(VGG, stage_sizes=(2, 2, 3, 3, 3), norm=True),
    "vgg19_bn": _partial(VGG, stage_sizes=(2, 2, 4, 4, 4), norm=True),
    "cifar_vgg11_bn": _partial(_cifar_vgg, stage_sizes=(1, 1, 2, 2, 2)),
    "cifar_vgg13_bn": _partial(_cifar_vgg, stage_sizes=(2, 2, 2, 2, 2)),
    "cifar_vgg16_bn": _partial(_cifar_vgg, stage_sizes=(2, 2, 3, 3, 3)),
    "cifar_vgg19_bn": _partial(_cifar_vgg, stage_sizes=(2, 2, 4, 4, 4)),
    "densenet121": _partial(DenseNet, block_sizes=(6, 12, 24, 16)),
    "densenet161": _partial(DenseNet, block_sizes=(6, 12, 36, 24), growth=48, stem_width=96),
    "densenet169": _partial(DenseNet, block_sizes=(6, 12, 32, 32)),
    "densenet201": _partial(DenseNet, block_sizes=(6, 12, 48, 32)),
    "densenet_bc": DenseNetBC,
    "efficientnet_b0": _partial(EfficientNet, member="b0"),
    "efficientnet_b1": _partial(EfficientNet, member="b1"),
    "efficientnet_b2": _partial(EfficientNet, member="b2"),
    "efficientnet_b3": _partial(EfficientNet, member="b3"),
    "efficientnet_b4": _partial(EfficientNet, member="b4"),
    "efficientnet_lite0": _partial(EfficientNetLite, member="lite0"),
    "efficientnet_lite1": _partial(EfficientNetLite, member="lite1"),
    "efficientnet_lite2": _partial(EfficientNetLite, member="lite2"),
    "efficientnet_lite3": _partial(EfficientNetLite, member="lite3"),
    "efficientnet_lite4": _partial(EfficientNetLite, member="lite4"),
    "mobilenet_v3_small": _partial(MobileNetV3, member="small"),
    "mobilenet_v3_large": _partial(MobileNetV3, member="large"),
    "mobilenetv4_conv_medium": MobileNetV4,
    "vit": VisionTransformer,
    "vit_ti16": _partial(VisionTransformer, patch=16, width=192, depth=12, heads=3),
    "vit_s16": _partial(VisionTransformer, patch=16, width=384, depth=12, heads=6),
    "vit_s32": _partial(VisionTransformer, patch=32, width=384, depth=12, heads=6),
    "vit_b16": _partial(VisionTransformer, patch=16, width=768, depth=12, heads=12),
    "vit_b32": _partial(VisionTransformer, patch=32, width=768, depth=12, heads=12),
    "vit_l16": _partial(VisionTransformer, patch=16, width=1024, depth=24, heads=16),
    "vit_l32": _partial(VisionTransformer, patch=32, width=1024, depth=24, heads=16),
    "deit3_s16": _partial(
        VisionTransformer,
        patch=16,
        width=384,
        depth=12,
        heads=6,
        no_embed_class=True,
        layer_scale=1e-6,
    ),
    "mixer": Mixer,
    "mixer_b16": _partial(Mixer, patch=16, width=768, depth=12),
    "swin": Swin,
    "swin_t": _partial(Swin, depths=(2, 2, 6, 2), width=96, head_width=32, window=7),
    "convnext": ConvNeXt,
    "convnext_tiny": _partial(ConvNeXt, depths=(3, 3, 9, 3), width=96),
    "convnext_small": _partial(ConvNeXt, depths=(3, 3, 27, 3), width=96),
    "convnext_base": _partial(ConvNeXt, depths=(3, 3, 27, 3), width=128),
}


def is_of_tokens(name: str) -> bool:
    """Whether the network of that name mixes tokens, rather than convolving maps; a user's doesn't.

    Nothing is imported, and a name that is not known is refused elsewhere.
    """
    make = MODELS.get(name)
    while isinstance(make, functools.partial):
        make = make.func
    return make in (VisionTransformer, Mixer, Swin)


def build(name: str, *, num_classes: int, dtype: jnp.dtype = jnp.float32, **given) -> nn.Module:
    """The network of that name: `module.apply(variables, image, train=...)` gives the logits.

    Images are normalised float32 [B,H,W,C], logits float32 [B,K]. `dtype` is what is computed in;
    parameters and BatchNorm statistics are float32. Dropout needs `rngs={"dropout": key}`.
    Raises ConfigError for an unknown name or option, or an option out of range.
    """
    given = check("config.model", name, given, options(name))
    if num_classes < 1:
        raise ConfigError(f"`num_classes` of {name} must be at least 1, got {num_classes}")
    make = look_up("config.model.name", name, MODELS)
    common = {"num_classes": num_classes, "dtype": dtype, "name": name.rpartition(":")[2]}
    taken = accepted(make)  # a user's own may have no dtype, and a function no name
    module = make(**{key: value for key, value in common.items() if key in taken}, **given)
    if not isinstance(module, nn.Module) or getattr(module, "num_classes", None) != num_classes:
        raise ConfigError(
            f"the network {name} must be a flax.linen Module with the field `num_classes`, "
            f"got {module!r:.80}"
        )
    if "train" not in accepted(module.__call__):
        raise ConfigError(
            f"the network {name} must be called as module(images, train=...), but its __call__ "
            "has no argument `train`"
        )
    return module


def options(name: str) -> dict[str, inspect.Parameter]:
    """What a user may choose for that network, by keyword: annotation and default of each."""
    entry = look_up("config.model.name", name, MODELS)
    fixed = ("num_classes", "dtype", "parent", "name", *getattr(entry, "keywords", {}))
    return accepted(entry, fixed)


def check_image_shape(module: nn.Module, shape: tuple[int, int, int]) -> None:
    """Raises ConfigError, in one sentence, when the network can't take images of (H, W, C).

    Networks say what they need in `minimum_image_size` and `image_size_multiple`, if anything.
    """
    height, width, _ = shape
    minimum = getattr(module, "minimum_image_size", 1)
    multiple = getattr(module, "image_size_multiple", 1)
    if min(height, width) < minimum:
        needs = f"images of at least {minimum}x{minimum} pixels"
    elif height % multiple or width % multiple:
        needs = f"images whose height and width are multiples of {multiple} pixels"
    else:
        return
    raise ConfigError(f"{title(module)} needs {needs}, got {height}x{width}")


def check_own(module: nn.Module, shape: tuple[int, int, int]) -> None:
    """Raises ConfigError unless a network for images of (H, W, C) does what the trainer expects.

    Traces it as in training and as in evaluation; errors in it are told by file and line. For the
    networks that are a user's own: those of MODELS have been tested.
    """
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    for train in (False, True):
        run = functools.partial(module.init_with_output, rngs, train=train)
        with in_user_code(file_of(type(module))):
            logits, variables = jax.eval_shape(run, images)
        expected = (2, module.num_classes)
        if getattr(logits, "shape", None) != expected or logits.dtype.kind not in "fV":
            raise ConfigError(
                f"the network {title(module)} must give float logits of shape {expected} for "
                f"images of shape {images.shape}, got {logits}"
            )
        if other := variables.keys() - {"params", "batch_stats"}:
            raise ConfigError(
                f"the network {title(module)} has variables in {', '.join(sorted(other))}, but "
                "only those in params and batch_stats are kept from step to step"
            )


def shapes(module: nn.Module, image_shape: tuple[int, int, int]) -> dict:
    """The shapes of the variables for images of (H, W, C); costs no memory and little time."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), image)


def needs_images(module: nn.Module) -> bool:
    """Whether `initialize_from_data` does anything for the network."""
    return hasattr(module, "initialize_from_data")


def initialize_from_data(module: nn.Module, variables: dict, images: jax.Array) -> dict:
    """The variables, with what the network derives from training images before the first step.

    `images` are float32 [N,H,W,C], normalised as for training. Most networks derive nothing.
    """
    method = getattr(module, "initialize_from_data", None)
    return method(variables, images) if method else variables


def partition_rules(module: nn.Module) -> Sequence[tuple[str, PartitionSpec]]:
    """How the network's parameters are split over the mesh's axis `model`: its `partition_rules`.

    Pairs of a regular expression, searched for in a path such as "block1/mlp/fc1/kernel", and the
    PartitionSpec of the arrays that have it. Most networks have none.
    """
    return getattr(module, "partition_rules", ())


def check_partition(module: nn.Module, count: int) -> None:
    """Raises ConfigError unless the network can be split over `count` devices, config.mesh.model.

    Networks say what `count` must divide in `partition_units`, such as ("heads", 6).
    """
    if count > 1 and not partition_rules(module):
        raise ConfigError(
            f"config.mesh.model must be 1 for {title(module)}, which offers no rules to split its "
            f"layers, got {count}"
        )
    kind, units = getattr(module, "partition_units", ("", count))
    if units % count:
        raise ConfigError(
            f"config.mesh.model must divide the {units} {kind} of {title(module)}, got {count}"
        )


def frozen(module: nn.Module) -> str | None:
    """A regular expression for the paths ("layer/kernel") of parameters that are not trained."""
    return getattr(module, "frozen", None)


def parameter_count(params) -> int:
    """The number of numbers in a tree of parameters (arrays or their shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
