"""Networks: the U-Net, the text encoder and the VAE. `minidiff/text_to_image.py` makes one model of the first two."""

from minidiff.models.text import TextEncoder, TextEncoderConfig
from minidiff.models.unet import UNet, UNetConfig, parameter_count
from minidiff.models.vae import VAE, Posterior, VAEConfig

CLIPTextModel = TextEncoder  # the name of the same network in transformers

__all__ = [
    "VAE",
    "CLIPTextModel",
    "Posterior",
    "TextEncoder",
    "TextEncoderConfig",
    "UNet",
    "UNetConfig",
    "VAEConfig",
    "parameter_count",
]
