"""config/: presets hold METHOD's values, overrides are checked, and a mistake is one line that names the setting."""
import dataclasses

import pytest

from config.config import PRESETS, Config
from config.load import get, help_text, load_config, settings
from utils.runtime.errors import UserError


def load(*arguments: str) -> Config:
    return load_config("", arguments)


def test_every_preset_is_valid():
    for name in PRESETS:
        assert load("--preset", name).preset == name
    for name in PRESETS["paper_casia"]:
        assert name in dict(settings(Config))


def test_paper_presets_hold_the_papers_values():
    for preset in ("paper_ffhq", "paper_casia"):
        config = load(f"--preset={preset}")
        assert (config.contexts.number, config.negatives.pool, config.sampling.identities) == (15000, 10050, 10050)
        assert (config.sampling.images_per_identity, config.sampling.seed, config.sampling.batch_size) == (50, 42, 50)
        assert (config.sampling.solver, config.sampling.steps, config.sampling.as_published) == ("ddpm", 1000, True)
        assert (config.guidance.w, config.guidance.schedule) == (0.5, "constant")
        assert (config.align.template, config.align.minimum_face) == ("arcface_shifted", 60)
        assert (config.align.keep_identities, config.align.keep_images) == (10000, 50)
        assert (config.scores.identities, config.scores.images_per_identity) == (1000, 20)
        fr = config.fr
        assert (fr.backbone, fr.head, fr.scale, fr.margin, fr.dropout) == ("iresnet50", "cosface", 64, 0.35, 0.4)
        assert (fr.learning_rate, fr.momentum, fr.weight_decay, fr.gradient_clip) == (0.1, 0.9, 5e-4, 5)
        assert (fr.batch_size, fr.epochs, fr.patience, fr.early_stop) == (128, 200, 4, 6)
        assert (fr.milestones, fr.augmentation, fr.dynunc_window) == ((22, 30, 35), "randaugment", 10)


def test_overrides_win_over_the_preset():
    config = load("--preset", "paper_casia", "sampling.solver=ddim", "sampling.steps=200", "guidance.w=1",
                  "model.ema=false", "guidance.interval=200,800", "fr.keep_fractions=0.5")
    assert (config.sampling.solver, config.sampling.steps, config.guidance.w) == ("ddim", 200, 1.0)
    assert config.model.ema is False
    assert (config.guidance.interval, config.fr.keep_fractions) == ((200, 800), (0.5,))


@pytest.mark.parametrize("arguments, words", [
    (["guidance.ww=1"], ["guidance.ww", "guidance.w?"]),
    (["milestones=1"], ["milestones", "fr.milestones"]),
    (["guidance.w=much"], ["guidance.w", "much", "a number"]),
    (["sampling.steps=2.5"], ["sampling.steps", "2.5", "whole number"]),
    (["guidance.w=nan"], ["guidance.w", "finite"]),
    (["guidance.w=-1"], ["guidance.w", "-1", "0.0"]),
    (["sampling.solver=dpm"], ["sampling.solver", "dpm", "ddpm"]),
    (["model.ema=perhaps"], ["model.ema", "perhaps", "true or false"]),
    (["--preset", "paper_cassia"], ["paper_cassia", "paper_casia"]),
    (["steps"], ["steps", "group.name=value"]),
    (["sampling.identities=101"], ["sampling.identities", "101", "100"]),
    (["negatives.pool=101"], ["negatives.pool", "101", "100"]),
    (["contexts.source=published"], ["contexts.file"]),
    (["contexts.source=extracted"], ["contexts.faces"]),
    (["negatives.strategy=custom"], ["negatives.custom_file"]),
    (["guidance.interval=800,200"], ["guidance.interval", "200,800"]),
    (["sampling.solver=dpm++", "sampling.as_published=true"], ["sampling.as_published", "dpm++"]),
    (["--preset", "paper_casia", "sampling.steps=50"], ["sampling.steps", "50", "1000"]),
    (["autoencoder.channels=32,64"], ["autoencoder.channels", "32,64", "3 numbers"]),
    (["autoencoder.channels=32,48,64"], ["autoencoder.channels", "32,48,64", "multiple of 32"]),
    (["diffusion.context_channels=100"], ["diffusion.context_channels", "100", "multiple of 32"]),
    (["diffusion.attention=true"], ["diffusion.attention", "true", "diffusion.channel_multipliers=1,3"]),
    (["training.image_size=50"], ["training.image_size", "50", "set 48"]),
])
def test_a_mistake_is_one_line(arguments, words):
    with pytest.raises(UserError) as caught:
        load(*arguments)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_wrong_type_in_an_edited_preset_is_refused(monkeypatch):
    monkeypatch.setitem(PRESETS, "mine", {"guidance.w": "0.5"})
    with pytest.raises(UserError, match="guidance.w: '0.5' is not a number"):
        load("--preset", "mine")


def test_the_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().guidance.w = 1.0


def test_help_lists_every_setting_with_its_default():
    text = help_text("Stage 3.")
    for name, field in settings(Config):
        assert f"  {name}\n      {field.metadata['help']}\n" in text
    assert "one of constant, linear, reverse, interval" in text and "paper: 0.5; AdaptDiff: 1.0" in text
    assert get(load(), "fr.scale") == 64.0
