"""Networks: the U-Net, the text encoder, and the two together."""

from minidiff.models.text import TextEncoder, TextEncoderConfig
from minidiff.models.text_to_image import DiffusionConfig, TextToImage
from minidiff.models.unet import UNet, UNetConfig, parameter_count

__all__ = [
    "DiffusionConfig",
    "TextEncoder",
    "TextEncoderConfig",
    "TextToImage",
    "UNet",
    "UNetConfig",
    "parameter_count",
]
