"""The default config, each field with its unit.

A recipe (`configs/NAME.py`) is `get_config()`: a few assignments over `default()`. In a section
with a `name` (model, loss, optimizer, schedule), a field that is None means "as the named thing
has it by default"; one that is set but not taken by the named thing is an error, so nothing is
ignored.

Durations are text with a unit: "90 epochs", "5000 steps", "1.28e6 examples", "5%" of the run; where
time makes sense also "10 minutes".
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def _option() -> Any:
    """A field that is None until it is set; whether its value fits, the named thing says."""
    return placeholder(object)


def default() -> ConfigDict:
    """The whole tree with its defaults, locked: unknown fields can't be added."""
    config = ConfigDict()
    config.seed = 0  # of everything random: initialisation, order, augmentation, dropout
    config.batch_size = 128  # examples an update, over all devices and hosts
    config.gradient_accumulation = 1  # parts a batch is computed in, one after the other
    config.duration = "10 epochs"
    config.ema_decay = placeholder(float)  # 0 to 1; None: no average of the parameters is kept
    config.log_every = "50 steps"
    config.log_to = _option()  # besides TensorBoard: "wandb", "mlflow" or a tuple of both
    config.hang_after = "10 minutes"  # without a step; then the run ends itself; 0 minutes: never

    config.data = ConfigDict()
    config.data.name = "digits"  # digits, fake, folder, list, idx, or any TFDS name
    config.data.path = placeholder(str)  # of folder, list and idx
    config.data.dir = placeholder(
        str
    )  # of TFDS data; None: $TFDS_DATA_DIR, else ~/tensorflow_datasets
    config.data.train_split = "train"  # TFDS slicing: "train[:90%]", "train+test", ...
    config.data.eval_split = "test"
    config.data.mean = _option()  # to normalise with, a number a channel, in units of [0, 1];
    config.data.std = _option()  # None: those of the training split
    config.data.held_out = _option()  # folder, list: share for evaluation where none is set apart
    config.data.split_seed = _option()  # folder, list: of that choice
    config.data.channels = _option()  # folder, list: 3 or 1 (grey)
    config.data.image_shape = _option()  # (height, width, channels), for fake only
    config.data.num_classes = placeholder(int)  # for fake only
    config.data.num_examples = placeholder(int)  # for fake only

    # Pixels a side; None: as the data have it. A schedule: (("0 epochs", 128), ("6 epochs", 160)).
    config.image_size = _option()
    config.repeats = 1  # times an example comes in a batch (repeated augmentation)

    config.crop = ConfigDict()  # what becomes of a picture of any size, in training
    config.crop.name = placeholder(str)  # random_resized_crop, center_crop, resize, pad
    config.crop.area = _option()  # random_resized_crop: (least, most) share of the picture
    config.crop.aspect = _option()  # random_resized_crop: (least, most) width over height
    config.crop.ratio = _option()  # center_crop: image size over the shorter side
    config.crop.fill = _option()  # pad: 0 to 255
    config.crop.interpolation = _option()  # bilinear, bicubic, area
    config.crop.antialias = _option()  # whether shrinking averages; slower

    config.input = ConfigDict()
    config.input.mode = "auto"  # resident (decoded once, kept on the devices), stream
    config.input.threads = placeholder(int)  # that decode; None: one a core
    config.input.processes = placeholder(int)  # each with so many threads; None: from 16 cores on
    config.input.read_ahead = 4  # batches decoded before they are needed
    config.input.max_broken = 0.001  # share of the training images that may be unreadable
    config.input.max_pixels = 100_000_000  # of a picture; larger ones are refused undecoded
    config.input.max_bytes = 2**28  # of a picture's file; larger ones are refused unread

    # In this order: ({"name": "pad_crop", "padding": 4}, {"name": "flip"}); see flaxcls/augment.
    config.augment = _option()

    config.model = ConfigDict()
    config.model.name = "digits_cnn"
    config.model.dtype = "auto"  # of the computation: float32, bfloat16; auto: by the device
    config.model.widths = _option()  # units or channels a layer or stage
    config.model.activation = _option()  # relu, sigmoid, tanh, gelu
    config.model.dropout = _option()  # share of units dropped, 0 to 1
    config.model.pool = _option()  # max, average
    config.model.stem = _option()  # imagenet, cifar
    config.model.depth = _option()  # layers
    config.model.width = _option()  # wrn: multiple of 16 channels; resnet: channels at first
    config.model.batch_norm_momentum = _option()  # of the running statistics, 0 to 1
    config.model.zero_init_residual = _option()  # start residual branches at zero

    config.loss = ConfigDict()
    config.loss.name = "softmax_cross_entropy"
    config.loss.label_smoothing = 0.0  # share of a target given to all classes alike
    config.loss.class_weights = _option()  # "balanced", or a number a class
    config.loss.gamma = _option()  # focal: how strongly easy examples fade
    config.loss.target_threshold = _option()  # sigmoid: soft targets above it count as 1

    config.optimizer = ConfigDict()
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1  # peak
    config.optimizer.learning_rate_batch = placeholder(
        int
    )  # examples the rate is meant for; scales it
    config.optimizer.weight_decay = 0.0
    config.optimizer.weight_decay_mode = _option()  # l2, decoupled
    config.optimizer.weight_decay_factors = _option()  # (regex, factor) pairs
    config.optimizer.learning_rate_factors = _option()  # (regex, factor) pairs
    config.optimizer.no_weight_decay = _option()  # regex over parameter paths
    config.optimizer.gradient_clip_norm = _option()  # global norm
    config.optimizer.gradient_clip_value = _option()  # each element
    config.optimizer.momentum = _option()
    config.optimizer.nesterov = _option()
    config.optimizer.b1 = _option()
    config.optimizer.b2 = _option()
    config.optimizer.eps = _option()
    config.optimizer.decay = _option()  # rmsprop: of the mean square
    config.optimizer.trust_coefficient = _option()  # lars
    config.optimizer.newton_schulz_steps = _option()  # muon
    config.optimizer.exclude = _option()  # muon: regex of kernels left to the rest's rule
    config.optimizer.renormalize = _option()  # muon: keep the norm of kernels
    config.optimizer.rest = _option()  # muon: adam or sgd for all but the kernels
    config.optimizer.rest_learning_rate = _option()  # multiple of the kernels'
    config.optimizer.rest_momentum = _option()

    config.schedule = ConfigDict()
    config.schedule.name = "cosine"
    config.schedule.warmup = _option()  # duration of the linear start
    config.schedule.warmup_start = _option()  # share of the peak that it starts from
    config.schedule.cooldown = _option()  # duration of the linear end
    config.schedule.final = _option()  # share of the peak at the end
    config.schedule.boundaries = _option()  # step: durations after which the rate drops
    config.schedule.factor = _option()  # step: what it is multiplied by
    config.schedule.peak = _option()  # one_cycle: duration until the peak
    config.schedule.start = _option()  # one_cycle: share of the peak at the start
    config.schedule.power = _option()  # polynomial
    config.schedule.decay = _option()  # exponential: factor
    config.schedule.every = _option()  # exponential: duration for a factor

    config.eval = ConfigDict()
    config.eval.every = "1 epochs"
    config.eval.batch_size = placeholder(int)  # examples; None: as in training
    config.eval.image_size = placeholder(int)  # pixels a side; None: the last one of training
    config.eval.crop = ConfigDict()  # as config.crop; what is None is as in training
    config.eval.crop.name = placeholder(str)  # center_crop, resize, pad
    config.eval.crop.ratio = _option()
    config.eval.crop.fill = _option()
    config.eval.crop.interpolation = _option()
    config.eval.crop.antialias = _option()

    config.checkpoint = ConfigDict()
    config.checkpoint.every = "1 epochs"  # or a time, looked at at log steps: "10 minutes"
    config.checkpoint.keep = 2  # newest ones; the best one is kept besides
    config.checkpoint.best_metric = "accuracy"  # accuracy, accuracy_top5, loss
    config.checkpoint.on_error = "continue"  # until the next one is due; or stop

    config.divergence = ConfigDict()  # an update that is not finite or too large is left out
    config.divergence.max_grad_norm = 1e4  # before clipping; usual ones, as logged, are below 100
    config.divergence.max_skipped = 10  # in a row; then the run goes back to its last checkpoint
    config.divergence.max_rollbacks = 3  # then it ends

    config.mesh = ConfigDict()
    config.mesh.fsdp = 1  # devices that parameters are split over
    config.mesh.cpu_devices = placeholder(int)  # host devices on a CPU; None: one a core, up to 8
    return config.lock()
