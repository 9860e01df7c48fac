"""ResNet-50 on ImageNet in 16 epochs with growing images, after ffcv's recipe.

    python -m flaxcls.main --config=configs/imagenet_resnet50_fast.py

160 pixels a side for the first three quarters, 192 for the rest (two compilations), evaluated at
256. Published for ffcv: 73.8 %, in 15 minutes on 8 A100; that has blur-pooling in the network and
averages over an image and its mirror image when it is evaluated, which is not done here. Not
trained here. BatchNorm's statistics are those of 512 images, as there on each device.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 1024
    config.duration = "16 epochs"
    config.log_every = "50 steps"
    config.data.name = "imagenet2012"
    config.data.eval_split = "validation"
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.image_size = (("0 epochs", 160), ("12 epochs", 192))
    config.crop.name = "random_resized_crop"
    config.crop.interpolation = "area"
    config.crop.antialias = False
    config.augment = ({"name": "flip"},)
    config.model.name = "resnet50"
    config.model.batch_norm_group = 512
    config.loss.label_smoothing = 0.1
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 1.7
    config.optimizer.learning_rate_batch = 4096  # ffcv's: 512 on each of 8 devices
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "one_cycle"
    config.schedule.peak = "2 epochs"
    config.schedule.start = 1e-4
    config.eval.image_size = 256
    config.eval.crop.antialias = True
    return config
