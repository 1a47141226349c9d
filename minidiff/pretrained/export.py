"""Our own models in the layout of diffusers and transformers, so that those load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from minidiff import __version__
from minidiff.config import SampleConfig
from minidiff.errors import UserError
from minidiff.files import whole_folder
from minidiff.nn import Module
from minidiff.pretrained.configs import diffusers_unet_config, transformers_text_config
from minidiff.pretrained.pipeline import OURS
from minidiff.pretrained.weights import their_layout
from minidiff.pretrained.words import tokenizer_files
from minidiff.text.words import END, PAD, START
from minidiff.text_to_image import TextToImage


def export_folder(model: TextToImage, out: Path, settings: SampleConfig | None = None) -> None:
    """Write unet/, text_encoder/, tokenizer/ and scheduler/ with float32 weights; `load_pipeline` reads them too.

    settings: how to draw; steps, guidance and clip are kept, and the sampler is DDIM. A folder that exists is not
    touched; none is left behind where this fails. Raises UserError where diffusers has no such network.
    """
    if out.exists():
        raise UserError(f"{out} exists; remove it or choose another folder")
    settings = settings or SampleConfig()
    h, w, _ = model.latent_shape
    ids = model.tokenizer.ids
    unet = diffusers_unet_config(model.unet.config, (h, w))
    text = transformers_text_config(model.text_encoder.config, ids[START], ids[END], ids[PAD])
    index = {
        "_class_name": OURS,
        "_minidiff_version": __version__,
        "patch": model.diffusion.patch,
        "sample": {"steps": settings.steps, "guidance": settings.guidance},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    with whole_folder(out) as folder:
        _write_json(folder / "model_index.json", index)
        _write_json(folder / "scheduler" / "scheduler_config.json", _scheduler(model, settings.clip))
        _write_json(folder / "unet" / "config.json", unet)
        _write_weights(folder / "unet" / "diffusion_pytorch_model.safetensors", model.unet, str)
        _write_json(folder / "text_encoder" / "config.json", text)
        _write_weights(folder / "text_encoder" / "model.safetensors", model.text_encoder, _clip_key)
        for name, content in tokenizer_files(model.tokenizer, model.text_encoder.config.context).items():
            _write_json(folder / "tokenizer" / name, content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(path: Path, module: Module, key: Any) -> None:
    save_file({key(name): their_layout(name, a) for name, a in module.state().items()}, path, {"format": "pt"})


def _clip_key(name: str) -> str:
    """Our path of a text encoder's parameter -> transformers' key."""
    if name.startswith("layers."):
        name = f"encoder.{name}"
    elif not name.startswith("final_layer_norm"):
        name = f"embeddings.{name}"
    return f"text_model.{name}"


def _scheduler(model: TextToImage, clip: bool) -> dict[str, Any]:
    beta = model.schedule.beta
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": model.schedule.T,
        "beta_schedule": {"cosine": "squaredcos_cap_v2"}.get(model.diffusion.schedule, model.diffusion.schedule),
        "beta_start": float(beta[1]),
        "beta_end": float(beta[-1]),
        "prediction_type": {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[model.diffusion.prediction],
        "clip_sample": clip,
        "clip_sample_range": 1.0,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "trailing",
    }
