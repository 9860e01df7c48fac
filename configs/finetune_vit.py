"""ViT-S/16, fine-tuned from timm's weights of ImageNet-21k and ImageNet.

    python -c "import timm, torch; torch.save(timm.create_model('vit_small_patch16_224',
        pretrained=True).state_dict(), 'vit_small_patch16_224.pth')"
    python -m flaxcls.main --config=configs/finetune_vit.py --config.data.name=folder \
        --config.data.path=DIR

The first command makes the file that `init_from` below expects; others, or a run of flaxcls, by
--config.init_from=PATH. Each block is trained 0.75 times as fast as the one above it (Clark et al.
2020, arXiv:2003.10555; Bao et al. 2021, arXiv:2106.08254). --config.image_size=384 resamples the
position embeddings. The values are usual ones, not a paper's. Not run here with these weights.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.init_from = "vit_small_patch16_224.pth"
    config.batch_size = 64
    config.duration = "20 epochs"
    config.data.name = "cifar10"
    config.data.mean = (0.5, 0.5, 0.5)  # as the weights need it
    config.data.std = (0.5, 0.5, 0.5)
    config.image_size = 224
    config.crop.name = "random_resized_crop"
    config.crop.area = (0.25, 1.0)
    config.crop.interpolation = "bicubic"
    config.augment = ({"name": "flip"},)
    config.model.name = "vit_s16"
    config.model.drop_path = 0.1
    config.finetune.layer_decay = 0.75
    config.loss.label_smoothing = 0.1
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.learning_rate_batch = 512
    config.optimizer.gradient_clip_norm = 1.0
    config.optimizer.weight_decay = 0.05
    config.schedule.name = "cosine"
    config.schedule.warmup = "5%"
    config.eval.crop.ratio = 0.9
    return config
