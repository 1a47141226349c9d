"""Networks: the U-Net, the text encoder and the VAE. `minidiff/text_to_image.py` makes one model of the first two."""

from minidiff.models.text import TextEncoder, TextEncoderConfig
from minidiff.models.unet import UNet, UNetConfig, parameter_count
from minidiff.models.vae import VAE, Posterior, VAEConfig

__all__ = [
    "VAE",
    "Posterior",
    "TextEncoder",
    "TextEncoderConfig",
    "UNet",
    "UNetConfig",
    "VAEConfig",
    "parameter_count",
]
