"""config/: presets hold the papers' values, overrides are checked, and a mistake is one line that names the setting."""
import dataclasses
import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

import train_fr
from config.config import PRESETS, Config, paper_values
from config.gone import GONE
from config.load import from_record, help_text, load_config, resolve, settings
from models.backbones import BACKBONES
from models.margin_heads import HEADS
from models.sizes import SIZES
from utils.diffusion.guidance import RULES, SCHEDULES, W_PER_IMAGE
from utils.diffusion.solvers import SOLVERS
from utils.diffusion.spacings import SPACINGS
from utils.identities.negatives import STRATEGIES
from utils.recognition import dynunc
from utils.runtime.errors import UserError
from utils.training.extras import EXTRAS

ROOT = Path(__file__).parents[2]
KNOWN = dict(settings(Config))
REGISTRIES = {"negatives.strategy": STRATEGIES, "guidance.rule": RULES, "guidance.schedule": SCHEDULES, "variety.w": W_PER_IMAGE,
              "sampling.solver": SOLVERS, "sampling.spacing": SPACINGS, "fr.backbone": BACKBONES, "fr.head": HEADS,
              "training.size": SIZES, "extras.use": EXTRAS}
CHOICES = REGISTRIES | {"sampling.spacing": ("default", *SPACINGS)}
ENTRIES = [(setting, entry) for setting, registry in CHOICES.items() for entry in registry]


def load(*arguments: str, choices=CHOICES) -> Config:
    return load_config("", choices=choices, arguments=arguments)


def get(config: Config, name: str) -> Any:
    return attrgetter(name)(config)


def refusal(*arguments: str, **options) -> str:
    """What is said of arguments that are refused: one line."""
    with pytest.raises(UserError) as caught:
        load(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- presets and the papers' values ----------------------------------------------------------------------------------

@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid(preset):
    config = load("--preset", preset)
    assert config.preset == preset
    for name, value in PRESETS[preset].items():
        assert name in KNOWN and get(config, name) == value


@pytest.mark.parametrize("preset", ["paper_ffhq", "paper_casia"])
def test_paper_presets_hold_the_papers_values(preset):
    config = load(f"--preset={preset}")
    assert (config.contexts.source, config.contexts.dimension, config.negatives.strategy) == ("uniform", 512, "far")
    assert (config.contexts.number, config.negatives.pool, config.sampling.identities) == (15000, 10050, 10050)
    assert (config.sampling.images_per_identity, config.sampling.seed, config.sampling.batch_size) == (50, 42, 50)
    assert (config.sampling.solver, config.sampling.steps, config.sampling.as_published) == ("ddpm", 1000, True)
    assert config.sampling.precision == "fp32"
    assert (config.guidance.w, config.guidance.schedule, config.guidance.rule) == (0.5, "constant", "negative")
    assert (config.align.template, config.align.minimum_face) == ("arcface_shifted", 60)
    assert (config.align.keep_identities, config.align.keep_images) == (10000, 50)
    assert (config.scores.identities, config.scores.images_per_identity) == (1000, 20)
    fr = config.fr
    assert (fr.backbone, fr.head, fr.scale, fr.margin) == ("iresnet50", "cosface", 64, 0.35)
    assert (fr.learning_rate, fr.batch_size, fr.epochs, fr.augmentation) == (0.1, 128, 200, "randaugment")
    # the learning rate falls on plateaus; its variant with milestones is named beside them
    assert fr.milestones == () and "22,30,35" in KNOWN["fr.milestones"].metadata["help"]
    training = config.training
    assert (training.size, training.crop, training.length) == ("published", "whole", "150000steps")
    assert (config.diffusion.batch_size, config.diffusion.learning_rate) == (512, 1e-4)
    assert (config.extras.use, config.extras.identity) == ((), 0.0)
    assert dataclasses.asdict(config.variety) == {"cone": 1.0, "cone_noise": "isotropic", "cone_bound": "fixed",
                                                  "w": "constant", "annealing": 0.0}
    assert (config.contexts.highest_cosine, config.align.band) == (1.0, ())


def test_what_is_no_setting_has_the_papers_value_too():
    assert (train_fr.DROPOUT, train_fr.MOMENTUM, train_fr.WEIGHT_DECAY, train_fr.GRADIENT_CLIP) == (0.4, 0.9, 5e-4, 5)
    assert (train_fr.PATIENCE, train_fr.EARLY_STOP, dynunc.WINDOW) == (4, 6, 10)


def test_the_two_generators_presets_differ_in_the_generator_alone():
    casia, ffhq = (load(f"--preset=paper_{name}") for name in ("casia", "ffhq"))
    assert {name for name in KNOWN if get(casia, name) != get(ffhq, name)} == {"model.diffusion", "training.faces"}
    assert (casia.model.diffusion, ffhq.model.diffusion) == ("data/published/idiff-face-casia",
                                                             "data/published/idiff-face-ffhq")


@pytest.mark.parametrize("generator", ["casia", "ffhq"])
def test_adaptdiff_presets_are_the_papers_with_a_growing_w(generator):
    paper, adaptdiff = load(f"--preset=paper_{generator}"), load(f"--preset=adaptdiff_{generator}")
    differ = {name: get(adaptdiff, name) for name in KNOWN if get(adaptdiff, name) != get(paper, name)}
    assert differ == {"guidance.w": 1.0, "guidance.schedule": "linear", "sampling.images_per_identity": 60}


def test_every_papers_value_has_the_type_of_its_default():
    values = paper_values()
    assert len(values) > 30
    for name, value in values.items():
        default = KNOWN[name].default
        assert type(value) is type(default), name
        if isinstance(value, tuple):
            assert {type(item) for item in value} <= {type(item) for item in default}, name


def test_the_paper_presets_are_made_of_the_values_beside_the_settings():
    assert PRESETS["paper_casia"] == paper_values()
    for name in KNOWN:
        assert get(load("--preset=paper_casia"), name) == paper_values().get(name, KNOWN[name].default)


def test_there_are_few_settings():
    assert 60 < len(KNOWN) <= 95


# ---- overrides -------------------------------------------------------------------------------------------------------

def test_overrides_win_over_the_preset():
    config = load("--preset", "paper_casia", "sampling.solver=ddim", "sampling.steps=200", "guidance.w=1",
                  "sampling.as_published=false", "guidance.interval=200,800", "fr.milestones=(22, 30,35)", "extras.use=v,noise")
    assert (config.sampling.solver, config.sampling.steps, config.guidance.w) == ("ddim", 200, 1.0)
    assert config.sampling.as_published is False
    assert (config.guidance.interval, config.fr.milestones) == ((200, 800), (22, 30, 35))
    assert config.extras.use == ("v", "noise")


@pytest.mark.parametrize("arguments, words", [
    (["guidance.ww=1"], ["guidance.ww: is an unknown setting", "guidance.w?"]),
    (["milestones=1"], ["milestones: is an unknown setting", "fr.milestones"]),
    (["guidance.w=much"], ["guidance.w", "much", "a number"]),
    (["sampling.steps=2.5"], ["sampling.steps", "2.5", "whole number"]),
    (["guidance.w=nan"], ["guidance.w", "finite"]),
    (["guidance.w=-1"], ["guidance.w", "-1", "0.0"]),
    (["align.minimum_face=128"], ["align.minimum_face: 128 is too large", "127"]),
    (["sampling.solver=dpm"], ["sampling.solver", "dpm", "ddpm"]),
    (["contexts.source=gauss"], ["contexts.source: 'gauss'", "did you mean gaussian?"]),
    (["sampling.as_published=perhaps"], ["sampling.as_published", "perhaps", "true or false"]),
    (["guidance.interval=a,b"], ["guidance.interval", "a,b", "list of int"]),
    (["--preset", "paper_cassia"], ["paper_cassia", "paper_casia"]),
    (["--preset"], ["--preset", "is not understood"]),
    (["steps"], ["steps", "group.name=value"]),
    (["sampling.identities=101"], ["sampling.identities", "101", "100"]),
    (["negatives.pool=101"], ["negatives.pool", "101", "100"]),
    (["contexts.source=published"], ["contexts.file"]),
    (["contexts.source=extracted"], ["contexts.faces"]),
    (["negatives.strategy=custom"], ["negatives.custom_file"]),
    (["guidance.interval=800,200"], ["guidance.interval", "(800, 200)", "200,800"]),
    (["guidance.interval=800"], ["guidance.interval", "(800,)", "200,800"]),
    (["align.band=0.3"], ["align.band", "(0.3,)", "0.3,0.8"]),
    (["align.band=0.8,0.3"], ["align.band", "(0.8, 0.3)"]),
    (["align.band=0.3,1.5"], ["align.band", "1.5 is too large"]),
    (["variety.cone=1.1"], ["variety.cone", "1.1 is too large"]),
    (["fr.milestones=0"], ["fr.milestones", "0 is too small", "1"]),
])
def test_a_mistake_is_one_line(arguments, words):
    with_custom = CHOICES | {"negatives.strategy": (*STRATEGIES, "custom")}
    message = refusal(*arguments, choices=with_custom)
    for word in words:
        assert word in message


@pytest.mark.parametrize("name, value, message", [
    ("guidance.w", "0.5", "guidance.w: '0.5' is not a number; the default is 0.5"),
    ("fr.milestones", 5, "fr.milestones: 5 is not a list of int separated by commas; the default is none"),
    ("sampling.seed", True, "sampling.seed: True is not a whole number; the default is 42"),
    ("guidance.ww", 1.0, "guidance.ww: is an unknown setting; did you mean guidance.w?"),
    ("fr.dropout", 0.4, f"fr.dropout: {GONE['fr.dropout']}"),
])
def test_a_mistake_in_an_edited_preset_is_refused(monkeypatch, name, value, message):
    monkeypatch.setitem(PRESETS, "mine", {name: value})
    assert refusal("--preset", "mine") == message


def test_the_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().guidance.w = 1.0


# ---- settings of earlier versions ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", GONE)
def test_a_setting_of_an_earlier_version_is_answered(name):
    assert name not in KNOWN
    assert refusal(f"{name}=1") == f"{name}: {GONE[name]}"


@pytest.mark.parametrize("answer", sorted(set(GONE.values())))
def test_the_answers_name_what_there_is(answer):
    settings_named = re.findall(r"\b(?:contexts|verify|fr|training|extras)\.\w+", answer)
    files_named = re.findall(r"[\w/]+\.py", answer)
    assert settings_named or files_named or answer.startswith("is gone: ")
    assert set(settings_named) <= set(KNOWN)
    assert all((ROOT / file).is_file() for file in files_named)
    for registry, file in re.findall(r"([A-Z]+) in ([\w/]+\.py)", answer):
        assert re.search(rf"^{registry}\b.*=", (ROOT / file).read_text(), re.MULTILINE)


@pytest.mark.parametrize("name, constant", [
    ("fr.dropout", "DROPOUT"), ("fr.momentum", "MOMENTUM"), ("fr.weight_decay", "WEIGHT_DECAY"), ("fr.early_stop", "EARLY_STOP"),
    ("fr.gradient_clip", "GRADIENT_CLIP"), ("fr.patience", "PATIENCE"), ("fr.dynunc_window", "WINDOW"),
    ("fr.keep_fractions", "KEEP_FRACTIONS"), ("align.batch_size", "BATCH"), ("scores.batch_size", "BATCH"),
    ("verify.batch_size", "BATCH"), ("scores.bootstrap", "REPLICATES"), ("training.margin", "MARGIN"),
    ("diffusion.validations", "VALIDATIONS"), ("autoencoder.perceptual", "PERCEPTUAL"), ("autoencoder.identity", "IDENTITY"),
    ("autoencoder.batch_size", "BATCH_SIZE"), ("autoencoder.learning_rate", "LEARNING_RATE")])
def test_a_setting_that_became_a_constant_is_one_in_a_named_file(name, constant):
    sources = [(ROOT / file).read_text() for file in re.findall(r"[\w/]+\.py", GONE[name])]
    assert any(re.search(rf"^([A-Z_]+, )*{constant}\b[^(\n]* = ", source, re.MULTILINE) for source in sources)


# ---- registries ------------------------------------------------------------------------------------------------------

def test_registries_are_plain_dicts():
    assert {type(registry) for registry in REGISTRIES.values()} == {dict}
    assert (len(RULES), len(SCHEDULES), len(SOLVERS), len(STRATEGIES)) == (4, 4, 9, 7)


@pytest.mark.parametrize("setting, entry", ENTRIES)
def test_every_entry_of_a_registry_can_be_chosen(setting, entry):
    value = get(load(f"{setting}={entry}"), setting)
    assert value == ((entry,) if setting == "extras.use" else entry)


@pytest.mark.parametrize("setting", CHOICES)
def test_the_default_and_the_papers_value_are_entries(setting):
    for value in (KNOWN[setting].default, KNOWN[setting].metadata["paper"]):
        assert set(value if isinstance(value, tuple) else [value]) <= set(CHOICES[setting])


@pytest.mark.parametrize("setting", CHOICES)
def test_a_name_that_is_no_entry_is_refused_with_those_there_are(setting):
    message = refusal(f"{setting}=zzz")
    assert message == f"{setting}: 'zzz' is not one of its choices; the choices are {', '.join(CHOICES[setting])}"


def test_one_wrong_name_in_a_list_is_refused():
    assert refusal("extras.use=v,nois") == "extras.use: 'nois' is not one of its choices; did you mean noise?"


def test_a_folder_in_a_list_may_end_with_a_bracket():
    assert load("training.faces=data/lfw (copy)").training.faces == ("data/lfw (copy)",)
    assert load("training.faces=(a, b)").training.faces == load("training.faces=[a,b]").training.faces == ("a", "b")


def test_lists_of_paths_and_records_of_when_they_were_one_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert load("verify.lfw_pairs=~/pairs.txt, other.txt").verify.lfw_pairs == ("/home/me/pairs.txt", "other.txt")
    config = load("--preset=lfw")
    earlier = dataclasses.asdict(config)
    earlier["verify"] |= {"lfw_pairs": "data/lfw/pairs.txt", "lfw_faces": ""}
    assert from_record(earlier) == dataclasses.replace(config, verify=dataclasses.replace(config.verify, lfw_faces=()))
    assert from_record(dataclasses.asdict(config)) == config


def test_a_new_entry_can_be_chosen_at_once(monkeypatch):
    assert "'mine' is not one of its choices" in refusal("guidance.rule=mine")
    monkeypatch.setitem(RULES, "mine", RULES["negative"])
    assert load("guidance.rule=mine").guidance.rule == "mine"


# ---- help ------------------------------------------------------------------------------------------------------------

def test_help_lists_every_setting_with_its_default():
    text = help_text("Stage 3.", choices=CHOICES)
    for name, field in KNOWN.items():
        assert f"  {name}\n      {field.metadata['help']}\n" in text
    assert "[default constant; one of constant, linear, reverse, interval; paper: constant]" in text
    assert "[default 0.5; paper: 0.5]" in text and "[default none; unit: epochs; paper: none]" in text
    assert get(load(), "fr.scale") == 64.0


@pytest.mark.parametrize("reads", [("guidance",), ("paths", "contexts", "negatives"), ("extras",)])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_only_the_groups_that_the_script_reads(capsys, reads, flag):
    with pytest.raises(SystemExit) as end:
        load_config("\nStage 3: draw.\n", reads, arguments=["guidance.w=1", flag])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("Stage 3: draw.\n") and all(preset in text for preset in PRESETS)
    listed = re.findall(r"^  (\S+)$", text, re.MULTILINE)
    assert listed == ["device", *(name for name in KNOWN if name.partition(".")[0] in reads)]


def test_settings_of_groups_that_the_script_does_not_read_may_be_given():
    assert load_config("", ("guidance",), arguments=["fr.scale=16"]).fr.scale == 16.0


@pytest.mark.parametrize("setting, words", [
    ("paths.run=../x", "lies outside paths.output"), ("paths.run=/x", "lies outside"), ("contexts.name=../../x", "lies outside"),
    ("fr.name=a/../../x", "lies outside"), ("training.name=/x", "lies outside"), ("paths.output=", "is empty"),
    ("paths.output=~nobody-of-that-name/x", "home of an unknown user")])
def test_no_name_leads_out_of_the_output(setting, words):
    with pytest.raises(UserError) as error:
        resolve({}, dict([setting.split("=")]))
    assert str(error.value).startswith(setting.partition("=")[0]) and words in str(error.value)


def test_the_output_itself_may_be_anywhere():
    assert resolve({}, {"paths.output": "../x", "paths.run": "demo/far"}).paths.output == "../x"


def test_a_list_of_folders_may_lie_at_home_and_records_of_one_folder_are_read(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    config = load("training.faces=~/a, data/b")
    assert config.training.faces == ("/home/ann/a", "data/b")
    earlier = dataclasses.asdict(config) | {"training": dataclasses.asdict(config.training) | {"faces": "data/c"}}
    assert from_record(earlier).training.faces == ("data/c",)
