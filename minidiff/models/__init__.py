"""Networks: the U-Net and the text encoder. `minidiff/text_to_image.py` makes one model of them."""

from minidiff.models.text import TextEncoder, TextEncoderConfig
from minidiff.models.unet import UNet, UNetConfig, parameter_count

__all__ = [
    "TextEncoder",
    "TextEncoderConfig",
    "UNet",
    "UNetConfig",
    "parameter_count",
]
