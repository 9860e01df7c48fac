"""ResNet-50 v1.5 on ImageNet, 90 epochs.

    python -m flaxcls.main --config=configs/imagenet_resnet50.py

Published: 76.1 to 76.5 % (torchvision, timm, the flax example). Not trained here; on 480 real
ImageNet images it trains, is killed and resumes bitwise, on a CPU. BatchNorm's statistics are those
of 32 images, as torchvision's on each of 8 GPUs.

Where decoding is the bottleneck, `python -m flaxcls.data prepare --source=imagenet2012 --out=DIR`
once makes it twice as fast: then `--config.data.dir=DIR`.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 256
    config.duration = "90 epochs"
    config.log_every = "100 steps"
    config.data.name = "imagenet2012"
    config.data.eval_split = "validation"
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.image_size = 224
    config.crop.name = "random_resized_crop"
    config.crop.antialias = False  # as in the flax example; antialiasing costs a third of the speed
    config.augment = ({"name": "flip"},)
    config.model.name = "resnet50"
    config.model.batch_norm_group = 32
    config.model.zero_init_residual = True
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.learning_rate_batch = 256  # larger batches: larger rate, in proportion
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "cosine"
    config.schedule.warmup = "5 epochs"
    config.eval.crop.antialias = True  # as torchvision's figure
    return config
