"""ResNet-50 on ImageNet by the recipe A1 of "ResNet strikes back" (arXiv:2110.00476), 600 epochs.

    python -m flaxcls.main --config=configs/imagenet_resnet50_a1.py

Published: 80.4 % (the paper, timm), at 288 pixels 81.2 % (timm). Not trained here; on 480 real
ImageNet images it takes its steps, on a CPU.

The fields are those of the paper's table 2. An epoch is as many images as ImageNet has, each of a
third of them three times, as in timm. Unlike there, RandAugment interpolates bilinearly, labels are
smoothed without a threshold (timm's drops what smoothing adds), and a batch's partners for mixing
are its neighbours.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 2048
    config.duration = "600 epochs"
    config.log_every = "50 steps"
    config.data.name = "imagenet2012"
    config.data.eval_split = "validation"
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.image_size = 224
    config.repeats = 3
    config.crop.name = "random_resized_crop"
    config.crop.interpolation = "bicubic"
    config.augment = (
        {"name": "flip"},
        {"name": "rand_augment", "magnitude": 7},
        {"name": "mix", "mixup_alpha": 0.2, "cutmix_alpha": 1.0},
    )
    config.model.name = "resnet50"
    config.model.zero_init_residual = True
    config.model.drop_path = 0.05
    config.loss.name = "sigmoid_cross_entropy"
    config.loss.label_smoothing = 0.1
    config.optimizer.name = "lamb"
    config.optimizer.learning_rate = 5e-3
    config.optimizer.learning_rate_batch = 2048
    config.optimizer.weight_decay = 0.01
    config.optimizer.gradient_clip_norm = 1.0  # before anything else, as timm's LAMB does unasked
    config.schedule.name = "cosine"
    config.schedule.warmup = "5 epochs"
    config.schedule.final = 1e-6 / 5e-3
    config.eval.crop.ratio = 0.95
    return config
