"""ResNet-50-D on ImageNet at length, after timm's resnet50d.ra4_e3600_r224_in1k.

    python -m flaxcls.main --config=configs/imagenet_resnet50d_ra4.py

Published: 80.96 %, and 81.84 % at 288 pixels (`--config.eval.image_size=288
--config.eval.crop.ratio=1.0`). Not trained here; on 480 real ImageNet images it takes its steps, on
a CPU.

The epochs, image size, normalisation and the crops of the evaluation are those of timm's weights.
Their file of hyperparameters (gist f6705cb65c03daeebca8aa129b1b94ad) could not be compared. What
else is set here is in the manner of timm's recipes for MobileNetV4 (AdamW with a small b1, a
clipped gradient, no mixing of images), by which the weights' card says it was inspired, and will
differ in places.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 4096
    config.duration = "3600 epochs"
    config.log_every = "50 steps"
    config.data.name = "imagenet2012"
    config.data.eval_split = "validation"
    config.data.mean = (0.5, 0.5, 0.5)
    config.data.std = (0.5, 0.5, 0.5)
    config.image_size = 224
    config.ema_decay = 0.9999
    config.crop.name = "random_resized_crop"
    config.crop.interpolation = "bicubic"
    config.augment = (
        {"name": "flip"},
        {"name": "rand_augment", "magnitude": 8, "magnitude_std": 1.0},
        {"name": "normalize"},
        {"name": "random_erasing", "probability": 0.25, "fill": "noise"},
    )
    config.model.name = "resnet50d"
    config.model.zero_init_residual = True
    config.loss.label_smoothing = 0.1
    config.optimizer.name = "adamw"
    config.optimizer.b1 = 0.6
    config.optimizer.b2 = 0.995
    config.optimizer.eps = 1e-6
    config.optimizer.learning_rate = 2e-3
    config.optimizer.learning_rate_batch = 4096
    config.optimizer.weight_decay = 0.01
    config.optimizer.gradient_clip_norm = 5.0
    config.schedule.name = "cosine"
    config.schedule.warmup = "5 epochs"
    config.eval.crop.ratio = 0.95
    return config
