"""The default config, each field with its unit.

A recipe (`configs/NAME.py`) is `get_config()`: a few assignments over `default()`.

A section of OPEN names a thing (a network, a loss, a data set) and takes that thing's options as
well, as its signature has them: `config.model.widths = (64, 128)`. They are not listed here;
`python -m flaxcls.main --list=models` lists them. An option that is absent or None is as the thing
has it by default, and one that the named thing does not take is an error, so nothing is ignored.

A name with a colon, "module:Name", is that of your own in a file beside the recipe or an installed
package, and its options are those in its signature: see docs/extending.md.

Durations are text with a unit: "90 epochs", "5000 steps", "1.28e6 examples", "5%" of the run; where
time makes sense also "10 minutes".
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

OPEN = ("data", "crop", "model", "loss", "optimizer", "schedule", "adversarial", "eval.crop")


def _any() -> Any:
    """A field that is None until it is set, and may be of several types."""
    return placeholder(object)


def _open() -> ConfigDict:
    """A section that takes any field: what it names says which."""
    return ConfigDict(type_safe=False)


def default() -> ConfigDict:
    """The whole tree with its defaults, locked but for the sections of OPEN."""
    config = ConfigDict()
    config.seed = 0  # of everything random: initialisation, order, augmentation, dropout
    config.batch_size = 128  # examples an update, over all devices and hosts
    config.gradient_accumulation = 1  # parts a batch is computed in, one after the other
    # Steps compiled as one, of images that are on the devices; None: 16 if they are light, never on
    # CPUs.
    config.steps_per_dispatch = placeholder(int)
    config.duration = "10 epochs"
    config.ema_decay = placeholder(float)  # 0 to 1; None: no average of the parameters is kept
    config.log_every = "50 steps"
    config.log_to = _any()  # besides TensorBoard: "wandb", "mlflow" or a tuple of both
    config.hang_after = "10 minutes"  # without a step; then the run ends itself; 0 minutes: never

    config.data = _open()
    config.data.name = "digits"  # digits, fake, folder, list, idx, or any TFDS name
    config.data.path = placeholder(str)  # of folder, list and idx
    # Of TFDS data; None: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    config.data.dir = placeholder(str)
    # TFDS slicing, "train[:90%]", "train+test", ...; or folds: "train, all but fold 3 of 5".
    config.data.train_split = "train"
    config.data.eval_split = "test"
    config.data.fold_seed = placeholder(int)  # of how examples are divided into folds; None: 0
    config.data.fold_groups = placeholder(str)  # CSV: the examples' groups, which no fold divides
    # Leaves ever fewer examples to train on of each class, of the last so many times fewer than of
    # the first; None: all.
    config.data.long_tail = placeholder(float)
    config.data.mean = None  # to normalise with, one per channel, in units of [0, 1];
    config.data.std = None  # None: those of the training split

    # Pixels per side; None: the data's own. A schedule: (("0 epochs", 128), ("6 epochs", 160)).
    config.image_size = _any()
    config.repeats = 1  # times an example comes in a batch (repeated augmentation)
    # Of the training examples: shuffle, each once an epoch; or balanced, all classes alike;
    # square_root, classes by the square roots of their sizes.
    config.sampling = "shuffle"

    config.crop = _open()  # what becomes of a picture of any size, in training
    config.crop.name = placeholder(
        str
    )  # random_resized_crop, center_crop, resize, pad; None: by the data

    config.input = ConfigDict()
    config.input.mode = "auto"  # resident (decoded once, kept on the devices), stream
    config.input.threads = placeholder(int)  # that decode; None: one a core, 8 in the cloud
    config.input.processes = placeholder(int)  # each with so many threads; None: from 16 cores on
    config.input.read_ahead = 4  # batches decoded before they are needed
    config.input.max_broken = 0.001  # share of the training images that may be unreadable
    config.input.max_pixels = 100_000_000  # of a picture; larger ones are refused undecoded
    config.input.max_bytes = 2**28  # of a picture's file; larger ones are refused unread
    config.input.policies = "auto"  # where RandAugment and the like are computed: host, device

    # In this order: ({"name": "pad_crop", "padding": 4}, {"name": "flip"}); see flaxcls/augment.
    config.augment = _any()

    config.model = _open()
    config.model.name = "digits_cnn"
    config.model.dtype = "auto"  # of the computation: float32, bfloat16; auto: by the device
    # Neighbours in the batch that BatchNorm takes its statistics of; None or "global": all of it.
    config.model.batch_norm_group = None

    config.loss = _open()
    config.loss.name = "softmax_cross_entropy"
    config.loss.label_smoothing = 0.0  # share of a target spread evenly over the classes
    config.loss.class_weights = None  # "balanced", "effective_number", or one per class
    config.loss.effective_number_beta = placeholder(float)  # 0 to 1; None: 0.9999

    config.optimizer = _open()  # besides the rule's own options, those of flaxcls/core/optim.py
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1  # peak
    config.optimizer.learning_rate_batch = None  # examples the rate is meant for; scales it
    config.optimizer.weight_decay = 0.0

    # Adversarial training: pgd_at, trades; None: none. Their eps and step_size are in units of
    # [0, 1] before the normalisation: "8/255". See docs/knowing.md.
    config.adversarial = _open()
    config.adversarial.name = placeholder(str)

    config.finetune = ConfigDict()  # of weights that are there already: see docs/finetuning.md
    # Regular expression for the paths of parameters that are not trained: "^(?!head/)".
    config.finetune.freeze = placeholder(str)
    # The learning rate of each layer as a multiple of that of the layer above; None: all the same.
    config.finetune.layer_decay = placeholder(float)
    config.finetune.freeze_batch_stats = False  # BatchNorm keeps its running statistics, uses them

    config.schedule = _open()
    config.schedule.name = "cosine"
    config.schedule.warmup = None  # duration of the linear start
    config.schedule.cooldown = None  # duration of the linear end

    # Weights to begin with: a run's folder, a file (.safetensors, .pth) or a name, such as
    # "efficientnet_lite0"; None: those of the network's initialisation. See docs/weights.md.
    config.init_from = placeholder(str)

    config.eval = ConfigDict()
    config.eval.every = "1 epochs"
    config.eval.batch_size = placeholder(int)  # examples; None: as in training
    config.eval.image_size = placeholder(int)  # pixels per side; None: the last of training
    # Views of each image that its logits are the mean over: flip, flip_shift, five_crop, ten_crop.
    config.eval.tta = placeholder(str)
    config.eval.crop = _open()  # as config.crop; what is None or absent is as in training
    config.eval.crop.name = None  # center_crop, resize, pad

    config.checkpoint = ConfigDict()
    config.checkpoint.every = "1 epochs"  # or a time, checked at log steps: "10 minutes"
    config.checkpoint.keep = 2  # newest ones; the best one is kept besides
    config.checkpoint.best_metric = "accuracy"  # balanced_accuracy, accuracy_top5, loss
    config.checkpoint.on_error = "continue"  # until the next one is due; or stop

    config.divergence = ConfigDict()  # an update that is not finite or too large is skipped
    config.divergence.max_grad_norm = 1e4  # before clipping; usual ones, as logged, are below 100
    config.divergence.max_skipped = 10  # in a row; then the run goes back to its last checkpoint
    config.divergence.max_rollbacks = 3  # within so many updates; then the run ends
    config.divergence.within = "10%"  # those skipped don't count

    # A trace of the steps between, in WORKDIR/profile, and a table of the operators that took most.
    config.profile = ConfigDict()
    config.profile.start = placeholder(str)  # durations since the run's beginning, such as
    config.profile.stop = placeholder(str)  # "100 steps" and "105 steps"; None: no trace

    config.mesh = ConfigDict()
    config.mesh.fsdp = 1  # devices that parameters are split over
    config.mesh.model = 1  # devices that layers are split over, where the network has rules
    config.mesh.cpu_devices = placeholder(int)  # host devices on a CPU; None: what is fastest

    config.lock()
    for path in OPEN:
        get(config, path).unlock()
    return config


def get(config: ConfigDict, path: str) -> Any:
    """The value at a path such as "checkpoint.keep"; None for an option that is absent."""
    *sections, name = path.split(".")
    for section in sections:
        config = config[section]
    return config.get(name)
