"""What notebook 13 loads where no folder is given: Stable Diffusion's parts, tiny, with random weights; and its sizes."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from minidiff.models import VAE, TextEncoder, UNet, parameter_count
from minidiff.nn import Module
from minidiff.pretrained.configs import text_config, unet_config, vae_config
from minidiff.pretrained.weights import their_layout
from minidiff.text.bpe import END, START, byte_symbols, fold, merge_pairs, word_pattern

CORPUS = """A photo of a cat on a red sofa. A photograph of two cats, a painting of a dog in
the snow, an oil painting of the sea at night. Photos and paintings of small houses, tall
houses and of the mountains behind them. The cat's house. A photograph of an old town by
the river, a drawing of a mountain, of horses and of a bridge over the water. The sea behind
the town."""
MERGES = 100

Sizes = dict[str, dict[str, Any]]
VERSION_1: Sizes = {
    "text_encoder": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
    },
    "unet": {
        "sample_size": 64, "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768,
        "attention_head_dim": 8, "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
}  # fmt: skip
"""What matters of the config.json files of Stable Diffusion 1.5; 2.1 differs as below."""
VERSION_2: Sizes = {
    "text_encoder": {
        **VERSION_1["text_encoder"], "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
        "num_attention_heads": 16, "hidden_act": "gelu",
    },
    "unet": {
        **VERSION_1["unet"], "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "vae": VERSION_1["vae"],
}  # fmt: skip
TINY: Sizes = {
    "text_encoder": {
        **VERSION_1["text_encoder"], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 24,
    },
    "unet": {
        **VERSION_1["unet"], "sample_size": 8, "block_out_channels": [16, 32, 32, 32], "cross_attention_dim": 32,
        "attention_head_dim": 2, "norm_num_groups": 8, "layers_per_block": 1,
    },
    "vae": {
        **VERSION_1["vae"], "block_out_channels": [8, 16, 16, 16], "layers_per_block": 1, "norm_num_groups": 8,
    },
}  # fmt: skip
SCHEDULER = {
    "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
    "prediction_type": "epsilon",
}  # fmt: skip
FILES = {
    "model_index.json": "which parts there are",
    "unet/config.json": "`UNetConfig`",
    "unet/diffusion_pytorch_model.safetensors": "the weights of `UNet`",
    "text_encoder/config.json": "`TextEncoderConfig`",
    "text_encoder/model.safetensors": "the weights of `TextEncoder`",
    "tokenizer/vocab.json": "`CLIPTokenizer.ids`: pieces of words and their numbers",
    "tokenizer/merges.txt": "`CLIPTokenizer.ranks`: which pieces to join, and in what order",
    "vae/config.json": "`VAEConfig`",
    "vae/diffusion_pytorch_model.safetensors": "the weights of `VAE`",
    "scheduler/scheduler_config.json": "`Sampling`: the schedule, what is predicted, the sampler",
}


def networks(sizes: Sizes) -> dict[str, Module]:
    """The parts by the name of their folder, without weights in memory."""
    return {
        "text_encoder": TextEncoder(text_config(sizes["text_encoder"]), seed=None),
        "unet": UNet(unet_config(sizes["unet"]), seed=None),
        "vae": VAE(vae_config(sizes["vae"]), seed=None),
    }


def millions(sizes: Sizes) -> list[float]:
    """Parameters of the parts, in millions."""
    return [parameter_count(part) / 1e6 for part in networks(sizes).values()]


def learned_merges(corpus: str, number: int) -> list[tuple[str, str]]:
    """Byte-pair encoding: the most frequent pair of neighbours is joined, again and again."""
    words = []
    for word in word_pattern().findall(fold(corpus)):
        *symbols, last = (byte_symbols()[byte] for byte in word.encode())
        words.append([*symbols, last + "</w>"])
    merges: list[tuple[str, str]] = []
    while len(merges) < number:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        merges.append(max(sorted(pairs), key=pairs.__getitem__))
        words = [merge_pairs(word, {merges[-1]: 0}) for word in words]
    return merges


def tiny_folder() -> Path:
    """Stable Diffusion's folder in small, every weight random; gone when Python ends."""
    folder = Path(tempfile.mkdtemp(prefix="minidiff-notebook-13-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    merges, letters = learned_merges(CORPUS, MERGES), sorted(byte_symbols())
    tokens = [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges), START, END]
    sizes = {**TINY, "text_encoder": {**TINY["text_encoder"], "vocab_size": len(tokens)}}
    for seed, (name, part) in enumerate(networks(sizes).items()):
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        _write(folder / name / "config.json", json.dumps(sizes[name]))
        save_file(_random_weights(part, seed), folder / name / f"{stem}.safetensors")
    _write(
        folder / "tokenizer" / "vocab.json", json.dumps({t: i for i, t in enumerate(tokens)})
    )
    _write(folder / "tokenizer" / "merges.txt", "\n".join(map(" ".join, merges)) + "\n")
    _write(folder / "scheduler" / "scheduler_config.json", json.dumps(SCHEDULER))
    parts = {
        name: ["", ""] for name in ("unet", "text_encoder", "tokenizer", "vae", "scheduler")
    }
    named = {name: ["some library", "some class"] for name in parts}
    _write(
        folder / "model_index.json",
        json.dumps({"_class_name": "StableDiffusionPipeline", **named}),
    )
    return folder


def _random_weights(part: Module, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = {}
    for name, p in part.named_parameters():
        *inputs, _ = p.wanted_shape
        scale = 0.7 / np.sqrt(np.prod(inputs)) if inputs else 0.1
        values = (p.init == "ones") + rng.normal(0, scale, p.wanted_shape)
        weights[name] = their_layout(name, values.astype(np.float32))
    return weights


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def contents(folder: Path) -> list[list[str]]:
    """Rows for a table: the files that are read, their size, and what becomes of each."""
    rows = []
    for name, becomes in FILES.items():
        path = folder / name
        size = (
            f"{path.stat().st_size / 1e3:,.1f} kB"
            if path.exists()
            else "(in shards, or half precision)"
        )
        rows.append([f"`{name}`", size, becomes])
    return rows
