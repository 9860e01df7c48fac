"""ViT-S/16 on ImageNet in 90 epochs, by big_vision (arXiv:2205.01580).

    python -m flaxcls.main --config=configs/imagenet_vit_s16.py

Published: 76.5 %, in 6 to 7 hours on a TPU v3-8. Not trained here; on 480 real ImageNet images it
takes its steps, on a CPU.

The fields are those of big_vision's vit_s16_i1k.py. There weight decay is 1e-4 of the parameter at
the peak rate; here it is multiplied by the rate, 1e-3. Unlike there, Adam's first moment is
float32, weights start as timm's (the head does not start at zero), the crop's aspect is log-uniform
and a mixup's partners are neighbours in the batch.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 1024
    config.duration = "90 epochs"
    config.log_every = "50 steps"
    config.data.name = "imagenet2012"
    config.data.train_split = "train[:99%]"  # the rest was for choosing hyperparameters
    config.data.eval_split = "validation"
    config.data.mean = (0.5, 0.5, 0.5)
    config.data.std = (0.5, 0.5, 0.5)
    config.image_size = 224
    config.crop.name = "random_resized_crop"
    config.crop.area = (0.05, 1.0)
    config.crop.antialias = False
    config.augment = (
        {"name": "flip"},
        {
            "name": "rand_augment",
            "num_ops": 2,
            "magnitude": 10,
            "magnitude_std": 0.0,
            "probability": 1.0,
            "increasing": False,
            "cutout": True,
            "interpolation": "nearest",
        },
        {"name": "mixup", "alpha": 0.2},
    )
    config.model.name = "vit_s16"
    config.model.pool = "average"
    config.model.posemb = "sincos2d"
    config.model.pre_logits = True
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.1  # of kernels alone
    config.optimizer.gradient_clip_norm = 1.0
    config.schedule.name = "cosine"
    config.schedule.warmup = "10000 steps"
    config.eval.crop.interpolation = "area"
    return config
