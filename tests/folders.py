"""Tiny pretrained models in diffusers' layout, every number random; what the tests of loading and drawing share."""

import json

import numpy as np
from safetensors.numpy import save_file
from test_bpe import learned, vocabulary, write_folder

from minidiff.models import VAE, TextEncoder, UNet
from minidiff.pretrained.configs import text_config, unet_config, vae_config
from minidiff.pretrained.weights import their_layout

UNET = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0", "sample_size": 8, "in_channels": 4,
    "out_channels": 4, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "cross_attention_dim": 16, "attention_head_dim": 2,
}  # fmt: skip
TEXT = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": len(vocabulary(learned())),
    "max_position_embeddings": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "hidden_act": "quick_gelu", "bos_token_id": 712, "eos_token_id": 713,
}  # fmt: skip
VAE_ = {
    "_class_name": "AutoencoderKL", "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "scaling_factor": 0.18215,
}  # fmt: skip
SCHEDULER = {
    "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False,
    "timestep_spacing": "leading", "prediction_type": "epsilon", "trained_betas": None,
}  # fmt: skip
INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0", "requires_safety_checker": False,
    "feature_extractor": [None, None], "safety_checker": [None, None], "image_encoder": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip
PIXELS = {
    "_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": [8, 16],
    "layers_per_block": 1, "norm_num_groups": 4, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "attention_head_dim": None, "flip_sin_to_cos": False,
    "freq_shift": 1, "downsample_padding": 0,
}  # fmt: skip
PIXEL_INDEX = {
    "_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]
}  # fmt: skip
PIXEL_SCHEDULER = {
    "_class_name": "DDPMScheduler", "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "clip_sample": True, "num_train_timesteps": 1000, "variance_type": "fixed_large",
}  # fmt: skip


def randomise(module, seed=0):
    """Every parameter random: what begins at 0 or 1 would hide its place."""
    rng = np.random.default_rng(seed)
    for p in module.parameters():
        *inputs, _ = p.wanted_shape
        scale = 0.7 / np.sqrt(np.prod(inputs)) if inputs else 0.2
        p.data = ((p.init == "ones") + rng.normal(0, scale, p.wanted_shape)).astype(np.float32)
    return module


def clip_key(name):
    """Our path of a text encoder's parameter by transformers' older keys."""
    kind = "encoder" if name.startswith("layers") else "embeddings"
    return f"text_model.{name}" if name.startswith("final") else f"text_model.{kind}.{name}"


def tensors(module, key=str, dtype=np.float32):
    return {key(name): their_layout(name, a).astype(dtype) for name, a in module.state().items()}


def write_part(folder, config, weights, stem="diffusion_pytorch_model"):
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    save_file(weights, folder / f"{stem}.safetensors", {"format": "pt"})


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def edit_json(path, **changes):
    """Change keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    write_json(path, {key: value for key, value in content.items() if value is not None})


def stable_diffusion(folder, dtype=np.float32):
    """A folder as Stable Diffusion's, whose pictures are 16 x 16."""
    unet, text, vae = (UNet(unet_config(UNET)), TextEncoder(text_config(TEXT)), VAE(vae_config(VAE_)))
    write_part(folder / "unet", UNET, tensors(randomise(unet, 1), dtype=dtype))
    write_part(folder / "text_encoder", TEXT, tensors(randomise(text, 2), clip_key, dtype), "model")
    write_part(folder / "vae", VAE_, tensors(randomise(vae, 3), dtype=dtype))
    write_folder(folder / "tokenizer", learned())
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", INDEX)
    return folder


def pixel_model(folder):
    """A folder as google/ddpm-cifar10-32's: all files side by side."""
    write_part(folder, PIXELS, tensors(randomise(UNet(unet_config(PIXELS)), 1)))
    write_json(folder / "scheduler_config.json", PIXEL_SCHEDULER)
    write_json(folder / "model_index.json", PIXEL_INDEX)
    return folder
