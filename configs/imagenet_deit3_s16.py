"""ViT-S/16 on ImageNet by DeiT III ("Revenge of the ViT", arXiv:2204.07118), 800 epochs.

    python -m flaxcls.main --config=configs/imagenet_deit3_s16.py

Published: 81.4 %. Not trained here; on 480 real ImageNet images it takes its steps, on a CPU.

The fields are those of the training command in its README, of its augment.py and models_v2.py: 256
images on each of 8 GPUs, apex' LAMB, which clips the gradient's norm to 1, every mixed class as a
whole in the loss, images three times in an epoch that has a third of them. Unlike there, the class
token starts near zero, colour is jittered in a fixed order, the rate warms up at each step and not
once an epoch, and a batch's partners for mixing are its neighbours.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 2048
    config.duration = "800 epochs"
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
        {"name": "three_augment"},
        {"name": "color_jitter", "brightness": 0.3, "contrast": 0.3, "saturation": 0.3},
        {"name": "mix", "mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    )
    config.model.name = "vit_s16"
    config.model.no_embed_class = True
    config.model.layer_scale = 1e-4
    config.model.drop_path = 0.05
    config.model.drop_path_uniform = True
    config.loss.name = "sigmoid_cross_entropy"
    config.loss.target_threshold = 0.0
    config.optimizer.name = "lamb"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.05
    config.optimizer.no_weight_decay = r"(^|/)(bias|scale|gamma|pos_embed|cls_token)$"
    config.optimizer.gradient_clip_norm = 1.0
    config.schedule.name = "cosine"
    config.schedule.warmup = "5 epochs"
    config.schedule.final = 1e-5 / 4e-3
    config.eval.crop.ratio = 1.0
    return config
