"""ConvNeXt-T on ImageNet by its paper (arXiv:2201.03545), 300 epochs.

    python -m flaxcls.main --config=configs/imagenet_convnext_tiny.py

Published: 82.1 %, of the averaged parameters. Not trained here; on 480 real ImageNet images it
takes its steps, on a CPU.

The fields are those of the training command in its TRAINING.md and of the defaults in its main.py
and datasets.py. Unlike there, RandAugment interpolates bilinearly, the average of the parameters
warms up, and a batch's partners for mixing are its neighbours.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 4096
    config.duration = "300 epochs"
    config.log_every = "50 steps"
    config.data.name = "imagenet2012"
    config.data.eval_split = "validation"
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.image_size = 224
    config.ema_decay = 0.9999
    config.crop.name = "random_resized_crop"
    config.crop.interpolation = "bicubic"
    config.augment = (
        {"name": "flip"},
        {"name": "rand_augment", "magnitude": 9},
        {"name": "normalize"},
        {"name": "random_erasing", "probability": 0.25, "fill": "noise"},
        {"name": "mix", "mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    )
    config.model.name = "convnext_tiny"
    config.model.drop_path = 0.1
    config.loss.label_smoothing = 0.1
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.learning_rate_batch = 4096
    config.optimizer.weight_decay = 0.05
    config.optimizer.no_weight_decay = r"(^|/)(bias|scale|layer_scale)$"
    config.schedule.name = "cosine"
    config.schedule.warmup = "20 epochs"
    config.schedule.final = 1e-6 / 4e-3
    config.eval.crop.ratio = 0.875
    return config
