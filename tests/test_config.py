import dataclasses

import pytest

from minidiff.config import DECIDED, SECTIONS, Config, config_from_dict, config_to_toml, load_config, presets
from minidiff.errors import UserError


def test_the_preset_survives_a_round_trip(tmp_path):
    assert "shapes" in presets()
    config = load_config("shapes")
    path = tmp_path / "again.toml"
    path.write_text(config_to_toml(config))
    assert load_config(str(path)) == config


def test_defaults_need_no_preset():
    assert config_from_dict({}, "nothing") == Config()


def test_every_setting_has_help_and_takes_a_string(tmp_path):
    path = tmp_path / "empty.toml"
    path.write_text("")
    for section, kind in SECTIONS.items():
        for f in dataclasses.fields(kind):
            assert f.metadata["help"], (section, f.name)
            if f.name in DECIDED.get(section, ()):
                with pytest.raises(UserError, match=f"{section}.{f.name} follows from the data"):
                    load_config(str(path), {f"{section}.{f.name}": "7"})
                continue
            value = f.default
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            config = load_config(str(path), {f"{section}.{f.name}": text})
            assert getattr(getattr(config, section), f.name) == value


@pytest.mark.parametrize(
    "preset, overrides, words",
    [
        ("shape", {}, ["unknown preset", "'shape'", "did you mean 'shapes'"]),
        ("shapes", {"train.stpes": "3"}, ["no setting train.stpes", "did you mean 'steps'"]),
        ("shapes", {"trian.steps": "3"}, ["no section 'trian'", "did you mean 'train'"]),
        ("shapes", {"train.steps": "many"}, ["train.steps wants a whole number", "'many'"]),
        ("shapes", {"train.lr": "fast"}, ["train.lr wants a number"]),
        ("shapes", {"train.checkpointing": "maybe"}, ["train.checkpointing wants true or false"]),
        ("shapes", {"train.steps": "0"}, ["train.steps must be at least 1"]),
        ("shapes", {"train.lr": "nan"}, ["train.lr wants a finite number"]),
        ("shapes", {"diffusion.prediction": "noise"}, ["diffusion.prediction", "eps, v, x0"]),
        ("shapes", {"diffusion.schedule": "cosin"}, ["diffusion.schedule", "cosine"]),
        ("shapes", {"sample.sampler": "eulr"}, ["sample.sampler", "ddim"]),
        ("shapes", {"unet.channels": "32,x"}, ["unet.channels wants a whole number", "'x'"]),
        ("shapes", {"unet.channels": "32,64,64"}, ["unet.attention has 2 entries for 3 levels"]),
        ("shapes", {"unet.channels": "30,64"}, ["30 does not divide"]),
        ("shapes", {"data.name": "cifar11"}, ["data.name", "shapes"]),
        ("shapes", {"text.width": "30"}, ["text.width"]),
        ("shapes", {"text.width": "0"}, ["text.width"]),
        ("shapes", {"text.context": "1"}, ["text.context must be at least 2"]),
        ("shapes", {"train.minutes": "inf"}, ["train.minutes wants a finite number"]),
        ("shapes", {"train.weight_decay": "nan"}, ["train.weight_decay wants a finite number"]),
        ("shapes", {"train.beta2": "1"}, ["train.beta2", "less than 1"]),
        ("shapes", {"train.seed": str(2**64)}, ["train.seed"]),
        ("shapes", {"train.steps": "5", "train.minutes": "1"}, ["train.steps or train.minutes"]),
        ("shapes", {"sample.guidance": "nan"}, ["sample.guidance wants a finite number"]),
        ("shapes", {"sample.sampler": "ddpm", "sample.eta": "0.5"}, ["sample.eta is ddim's"]),
        ("shapes", {"sample.sigma": "large"}, ["sample.sigma is ddpm's"]),
        ("shapes", {"diffusion.T": "10"}, ["sample.steps", "1..10"]),
        ("shapes", {"diffusion.patch": "8", "unet.channels": "8,8,8,8"}, ["unet.attention"]),
        ("shapes", {"diffusion.patch": "32"}, ["data.size: 32 pixels do not divide by 64"]),
    ],
)
def test_a_bad_setting_is_one_clear_sentence(preset, overrides, words):
    with pytest.raises(UserError) as e:
        load_config(preset, overrides)
    assert "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value)


def test_steps_take_the_place_of_the_presets_minutes():
    assert load_config("shapes").train.minutes > 0
    given = load_config("shapes", {"train.steps": "7"}).train
    assert (given.steps, given.minutes) == (7, 0)


def test_a_broken_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[train\nsteps = 3")
    with pytest.raises(UserError, match=r"mine\.toml is not valid TOML"):
        load_config(str(path))
    path.write_bytes(b"[train]\n# \xff")
    with pytest.raises(UserError, match=r"mine\.toml is not UTF-8 text"):
        load_config(str(path))
    path.write_text("train = 3")
    with pytest.raises(UserError, match="train must be a table"):
        load_config(str(path))
