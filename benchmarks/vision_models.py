"""Image classifiers of torchvision and timm at tiny widths, one of each family, for the benchmark of families."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_FEW = {"layers": (1, 1, 1, 1), "channels": (8, 12, 16, 20), "stem_width": 8}
TIMM: dict[str, dict[str, Any]] = {
    "resnet18": _FEW,
    "resnet26d": _FEW,
    "seresnet50": _FEW,
    "vit_tiny_patch16_224": {"img_size": 32, "embed_dim": 12, "depth": 2, "num_heads": 3},
    "deit_tiny_patch16_224": {"img_size": 32, "embed_dim": 12, "depth": 2, "num_heads": 3},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32, "embed_dim": 12, "depths": (2, 1), "num_heads": (3, 3), "window_size": 4,
    },
    "convnext_atto": {"dims": (8, 12, 16, 20), "depths": (1, 1, 1, 1)},
    "convnextv2_atto": {"dims": (8, 12, 16, 20), "depths": (1, 1, 1, 1)},
    "efficientnet_lite0": {},
    "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small": {},
    "regnetx_002": {},
    "densenet121": {"growth_rate": 4, "block_config": (2, 2)},
    "mixer_s32_224": {"img_size": 64},
    "poolformer_s12": {},
    "cait_xxs24_224": {"img_size": 32, "embed_dim": 12, "depth": 2, "num_heads": 3},
    "levit_128s": {},
    "pvt_v2_b0": {"embed_dims": (8, 12, 16, 20), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)},
    "ghostnet_100": {},
    "xcit_nano_12_p16_224": {"img_size": 32, "embed_dim": 12, "depth": 2, "num_heads": 3},
}  # fmt: skip


def _torchvision() -> dict[str, Callable[[], nn.Module]]:
    models: Any = importlib.import_module("torchvision.models")
    blocks: Any = importlib.import_module("torchvision.models.efficientnet")
    mobile: Any = importlib.import_module("torchvision.models.mobilenetv3")
    cnn: Any = importlib.import_module("torchvision.models.convnext")
    swin: Any = importlib.import_module("torchvision.models.swin_transformer")
    residual: Any = importlib.import_module("torchvision.models.resnet")
    regnet: Any = importlib.import_module("torchvision.models.regnet")
    tiny_swin = {"patch_size": [4, 4], "embed_dim": 12, "depths": [2, 1], "num_heads": [3, 3], "window_size": [4, 4]}
    small = {"width_per_group": 4, "norm_layer": nn.BatchNorm2d, "num_classes": 10}
    stages = {"depths": [1, 1], "widths": [8, 16], "group_widths": [4, 8], "bottleneck_multipliers": [1.0, 1.0]}
    mbconv = [blocks.MBConvConfig(1, 3, 1, 32, 8, 1, 0.25, 1.0), blocks.MBConvConfig(2, 3, 2, 8, 16, 2, 0.5, 1.0)]
    fused = [blocks.FusedMBConvConfig(1, 3, 1, 8, 8, 1), *mbconv[1:]]
    return {
        "alexnet": partial(models.alexnet, num_classes=10),
        "convnext": partial(
            models.ConvNeXt, [cnn.CNBlockConfig(8, 12, 1), cnn.CNBlockConfig(12, None, 1)], num_classes=10
        ),
        "densenet": partial(models.DenseNet, 4, (2, 2), 8, num_classes=10),
        "efficientnet": partial(models.EfficientNet, mbconv, 0.2, num_classes=10),
        "efficientnet_v2": partial(models.EfficientNet, fused, 0.2, num_classes=10, last_channel=24),
        "googlenet": partial(models.googlenet, aux_logits=False, init_weights=False, num_classes=10),
        "inception": partial(models.inception_v3, aux_logits=False, init_weights=False, num_classes=10),
        "maxvit": partial(
            models.MaxVit, (64, 64), 8, 4, [8, 12], [1, 1], 4, 0.0, num_classes=10
        ),
        "mnasnet": partial(models.MNASNet, 0.1, num_classes=10),
        "mobilenet_v2": partial(models.MobileNetV2, num_classes=10, width_mult=0.1),
        "mobilenet_v3": partial(
            models.MobileNetV3, mobile._mobilenet_v3_conf("mobilenet_v3_small", width_mult=0.25)[0], 16, num_classes=10
        ),
        "regnet_x": partial(
            models.RegNet, regnet.BlockParams(**stages, strides=[2, 2], se_ratio=None), num_classes=10, stem_width=8
        ),
        "regnet_y": partial(
            models.RegNet, regnet.BlockParams(**stages, strides=[2, 2], se_ratio=0.25), num_classes=10, stem_width=8
        ),
        "resnet": partial(models.ResNet, residual.BasicBlock, [1, 1, 1, 1], num_classes=10),
        "resnet_bottleneck": partial(models.ResNet, residual.Bottleneck, [1, 1, 1, 1], **small),
        "resnext": partial(models.ResNet, residual.Bottleneck, [1, 1, 1, 1], groups=4, **small),
        "shufflenet": partial(models.ShuffleNetV2, [2, 2, 2], [8, 8, 16, 24, 32], num_classes=10),
        "squeezenet": partial(models.squeezenet1_1, num_classes=10),
        "swin": partial(swin.SwinTransformer, **tiny_swin, num_classes=10),
        "swin_v2": partial(
            swin.SwinTransformer, **tiny_swin, num_classes=10, block=swin.SwinTransformerBlockV2,
            downsample_layer=swin.PatchMergingV2,
        ),
        "vgg": partial(models.vgg11, num_classes=10),
        "vit": partial(models.VisionTransformer, 32, 8, 2, 3, 12, 9, num_classes=10),
    }  # fmt: skip


def vision_families(library: str) -> tuple[str, ...]:
    """Names of what ``vision_model`` makes."""
    return tuple(_torchvision()) if library == "torchvision" else tuple(TIMM)


def vision_model(library: str, name: str) -> tuple[nn.Module, Tensor]:
    """A classifier of ten classes with random weights, and two images."""
    if library == "torchvision":
        module = _torchvision()[name]()
        size = {"inception": 75, "alexnet": 64, "googlenet": 64, "maxvit": 64, "squeezenet": 64}.get(name, 32)
    else:
        options = TIMM[name]
        module = importlib.import_module("timm").create_model(name, num_classes=10, **options)
        size = 224 if name == "levit_128s" else int(options.get("img_size", 64))
    return module, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))
