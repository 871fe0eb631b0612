"""models/hydra_config.py: a stranger's YAML is checked before anything in it is resolved, and nothing in it is called."""
import time
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from models import random_weights
from models.hydra_config import HydraConfig
from models.published import load_diffusion
from tests.runtime.mutations import check_reader
from utils.runtime.errors import UserError


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> HydraConfig:
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        return HydraConfig(tmp_path / "config.yaml")

    return write


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message and "config.yaml: " in message and "; " in message
    return message


# ---- what is plain ---------------------------------------------------------------------------------------------------

def test_values_and_interpolations(config):
    values = config("a: {b: [1, 2.5, true, text], c: '${size}'}\nsize: ${sizes.${which}}\nsizes: {small: 64}\nwhich: small\n"
                    "name: run-${which}-${size}\nurl: http://${which}/x\nalso: ${a}\n")
    assert values["a.b"] == [1, 2.5, True, "text"] and values["a.b.1"] == 2.5
    assert values["a"] == values["also"] == {"b": [1, 2.5, True, "text"], "c": 64}
    assert values["name"] == "run-small-64" and values["url"] == "http://small/x"


def test_only_what_is_asked_for_is_resolved(config):
    assert config("size: 3\npaths: ${oc.env:DATA}/faces\nlost: ${nowhere}\nround: ${round}\nmust: ???\n")["size"] == 3


@pytest.mark.parametrize("text, path, words", [
    ("a: 1", "b", "b: is missing"),
    ("a: null", "a", "a: is missing"),
    ("a: text", "a.b", "a.b: is missing"),
    ("", "a", "a: is missing"),
    ("[1, 2]", "a", "a: is missing"),
    ("a: [1, 2]", "a.b", "a.b: cannot be resolved"),
    ("a: ???", "a", "a: cannot be resolved (Missing mandatory value"),
    ("a: ${b}", "a", "a: cannot be resolved (Interpolation key 'b' not found)"),
    ("a: ${b}\nb: ${a}", "a", "a: cannot be resolved (Recursive interpolation detected)"),
    ("a: {b: '${a}'}", "a", "a: cannot be resolved (Interpolation to parent node detected)"),
    ("\n".join(f"a{k}: ${{a{k + 1}}}" for k in range(400)), "a0", "a0: cannot be resolved"),
])
def test_what_cannot_be_resolved_is_named(config, text, path, words):
    assert words in refusal(config(text).__getitem__, path)


DOUBLING = "a0: xxxxxxxxxx\n" + "\n".join(f"a{k}: ${{a{k - 1}}}${{a{k - 1}}}" for k in range(1, 40))


@pytest.mark.parametrize("text, path, words", [
    (DOUBLING, "a39", "it takes more than 1000 interpolations"),
    (DOUBLING.replace("xxxxxxxxxx", "a0"), "a39", "it takes more than 1000 interpolations"),
    ("a0: 1\n" + "\n".join(f"a{k}: {{x: '${{a{k - 1}}}', y: '${{a{k - 1}}}'}}" for k in range(1, 40)), "a39", "more than 1000"),
    ("a0: 1\n" + "\n".join(f"a{k}: ['${{a{k - 1}}}', '${{a{k - 1}}}']" for k in range(1, 40)), "a39", "more than 1000"),
    ("k: a0\nx: {a0: k}\n" + "\n".join(f"a{k}: ${{x.${{k}}}}${{a{k - 1}}}${{a{k - 1}}}" for k in range(1, 40)) + "\na0: 1",
     "a39", "more than 1000"),
    ("a: x" + "y" * 60_000 + "\nb: " + "${a}" * 240, "b", "cannot be resolved"),
    ("a: " + "${b}" * 15_000 + "\nb: 1", "a", "cannot be resolved"),
    ("a: " + "${" * 30_000, "a", "cannot be resolved"),
    ("a: ${.b}\nb: 1", "a", "cannot be resolved"),
], ids=["texts", "circle", "sections", "lists", "nested", "long", "many", "open", "relative"])
def test_interpolations_that_multiply_are_refused_at_once(config, text, path, words):
    start = time.process_time()
    assert words in refusal(config(text).__getitem__, path)
    assert time.process_time() - start < 2


def test_many_interpolations_that_do_not_multiply_are_resolved(config):
    values = config("x: 1\n" + "\n".join(f"a{k}: ${{x}}/{k}" for k in range(300)) + "\nall: ["
                    + ", ".join(f"'${{a{k}}}'" for k in range(150)) + "]")
    assert values["all"][149] == "1/149"


# ---- resolvers -------------------------------------------------------------------------------------------------------

@pytest.fixture
def calls():
    """What the resolver `note` was called with."""
    given = []
    register = getattr(OmegaConf, "register_resolver", None) or OmegaConf.register_new_resolver  # as omegaconf 2.3 calls it
    register("note", lambda *arguments: given.append(arguments) or "called")
    yield given
    OmegaConf.clear_resolver("note")


@pytest.mark.parametrize("text", [
    "a: ${note:1}",
    "a: ${ note : 1}",
    "a: x${note:1}y",
    "a: '${note:${note:1}}'",
    "a: ${note:}",
    "a: ${n:1}${note:1}",
    "n: note\na: ${${n}:1}",
    "n: te\na: ${no${n}:1}",
    "a: '\\${note:1}'",
    "a: '\\\\${note:1}'",
    "a: 'x\\\\\\${note:1}'",
    "b: 'x\\'\na: '${b}${note:1}'",
    "b: ${note:1}\na: ${b}",
    "b: ${note:1}\nc: ${b}\na: ${c}",
    "b: $\nc: '{note:1}'\na: ${b}${c}",
    "b: $\nc: '{note:1}'\nd: ${b}${c}\na: ${d}",
    "b: [1, '${note:1}']\na: ${b}",
    "b: {c: '${note:1}'}\na: ${b}",
    "b: {c: '${note:1}'}\na: ${b.c}",
    "b: note:1\na: ${${b}}",
    "a: \"${\\nnote\\n:1}\"",
])
def test_nothing_is_called(config, calls, text):
    refusal(lambda: config(text)["a"])
    assert calls == []


def test_a_resolver_would_have_been_called(calls):
    assert OmegaConf.create({"a": "${note:1}"}).a == "called" and calls == [(1,)]


def test_what_would_call_something_is_said(config):
    message = refusal(config("a: ${oc.env:HOME}/x").__getitem__, "a")
    assert "a: '${oc.env:HOME}/x' cannot be resolved without calling something; write the value there" in message


# ---- what is not plain -----------------------------------------------------------------------------------------------

def nested(levels: int) -> str:
    """Mappings nested that many levels deep."""
    return "{a: " * levels + "1" + "}" * levels


@pytest.mark.parametrize("text, words", [
    ("a: &x 1\nb: *x", "line 1 has an alias, an anchor or a tag"),
    ("b: 2\na: &x [1]", "line 2 has an alias, an anchor or a tag"),
    ("&x a: 1", "line 1 has an alias, an anchor or a tag"),
    ("a: !!int abc", "line 1 has an alias, an anchor or a tag"),
    ("b: 2\nc: 3\na: !!int 5", "line 3 has an alias, an anchor or a tag"),
    ("a: !!python/object/apply:os.system ['true']", "line 1 has an alias, an anchor or a tag"),
    ("a: ! text", "line 1 has an alias, an anchor or a tag"),
    ("a: !!map {b: 1}", "line 1 has an alias, an anchor or a tag"),
    (nested(9), "line 1 is nested deeper than 8 levels"),
    ("[" * 900 + "]" * 900, "line 1 is nested deeper than 8 levels"),
    ("a:\n" + "- 1\n" * 998, "line 999 is nested deeper than 8 levels, or is beyond 1000 nodes"),
    ("# " + "x" * 64 * 1024, "it is larger than 64 KB"),
    ("a: [unclosed", "while parsing"),
    ("a: 1\n---\na: 2", "expected a single document"),
    ("a: 2001-01-01", "not a supported primitive type"),
    ("a: 2001-13-01", "month must be in 1..12"),
    ("a: " + "1" * 5000, "Exceeds the limit"),
    ("? [1]\n: 2", "found unhashable key"),
    ("null: 2", "Incompatible key type"),
])
def test_a_file_that_is_not_plain_is_refused(config, text, words):
    message = refusal(config, text)
    assert "is not the plain YAML of a model" in message and words in message


def test_what_is_as_deep_long_and_large_as_allowed_is_read(config):
    assert config(nested(8))["a.a.a.a.a.a.a.a"] == 1
    assert len(config("a:\n" + "- 1\n" * 997)["a"]) == 997  # and the mapping, its key and the list: 1000 nodes
    text = "a: 1\n# "
    assert config(text + "x" * (64 * 1024 - len(text)))["a"] == 1


def test_bytes_that_are_no_text_and_a_missing_file_are_refused(tmp_path):
    assert "config.yaml: no such file" in refusal(HydraConfig, tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_bytes(b"a: \xff\xfe")
    assert "is not the plain YAML of a model" in refusal(HydraConfig, tmp_path / "config.yaml")


# ---- through the reader of models ------------------------------------------------------------------------------------

REST = "latent_diffusion: true\nconstants: {image_size: 64}\ndiffusion: {T: 1000, schedule_type: linear}\n"
NETWORK = ("model: {input_channels: 3, initial_channels: 32, channel_multipliers: [1, 2], is_attention: [false, true],"
           " attention_heads: -1, attention_head_channels: 32, n_blocks_per_resolution: 1, condition_type: CA,"
           " is_context_conditional: true, n_context_classes: 0, context_input_channels: 16, context_channels: 32,"
           " learn_empty_context: false, context_dropout_probability: 0.25}\n")


@pytest.mark.parametrize("text, words", [
    (REST + "model: [1]", "model: [1] describes no network"),
    (REST + "model: 3", "model: 3 describes no network"),
    (REST + "model: ${diffusion.schedule_type}", "model: 'linear' describes no network"),
    (REST + "model: {width: 3}", "model: describes no network that is known here"),
    (REST + NETWORK.replace("[1, 2]", "[0, 2]"), "model.channel_multipliers: [0, 2] has a multiplier that is none"),
    (REST + NETWORK.replace("[1, 2]", "[256, 256]"), "model: describes no network that is known here (ValueError: more than"),
    (REST + NETWORK.replace("[1, 2]", "[1, 1, 1, 1, 1, 1, 1, 1, 1]"), "model.channel_multipliers: [1, 1, 1, 1, 1, 1, 1, 1, 1] "
     "is no list of 1 to 8"),
    (REST + NETWORK.replace("[1, 2]", "[]"), "model.channel_multipliers: [] is no list of 1 to 8"),
    (REST + NETWORK.replace("[1, 2]", "12"), "model.channel_multipliers: 12 is no list of 1 to 8"),
    (REST + NETWORK.replace("[false, true]", "[0, 1]"), "model.is_attention: [0, 1] is no list of true and false"),
    (REST + NETWORK.replace("[false, true]", "[true]"), "model.is_attention: 1 is not supported, only 2"),
    (REST + NETWORK.replace("channels: 32,", "channels: -32,", 1), "model.initial_channels: -32 is no whole number from 1 to"),
    (REST + NETWORK.replace("channels: 32,", "channels: 1000000000,", 1), "model.initial_channels: 1000000000 is no whole"),
    (REST + NETWORK.replace("channels: 32,", "channels: 32.0,", 1), "model.initial_channels: 32.0 is no whole number"),
    (REST + NETWORK.replace("channels: 32,", "channels: true,", 1), "model.initial_channels: True is no whole number"),
    (REST + NETWORK.replace("head_channels: 32", "head_channels: 0"), "model.attention_head_channels: 0 is no whole number"),
    (REST + NETWORK.replace("heads: -1", "heads: 1.5"), "model.attention_heads: 1.5 is no whole number"),
    (REST + NETWORK.replace("resolution: 1", "resolution: 1000000"), "model.n_blocks_per_resolution: 1000000 is no whole"),
    (REST + NETWORK.replace("probability: 0.25", "probability: .nan"), "model.context_dropout_probability: nan is no number"),
    (REST + NETWORK.replace("learn_empty_context: false", "learn_empty_context: 7"), "model.learn_empty_context: 7 is neither"),
    (REST + NETWORK.replace("input_channels: 3, ", ""), "model: describes no network that is known here"),
    (REST.replace("64", "20") + NETWORK, "constants.image_size: 20 is no multiple of 8, which the network halves it by"),
    (REST.replace("64", "4"), "constants.image_size: 4 is no multiple of 4 from 8 to 8192"),
    (REST.replace("64", str(2**30)), f"constants.image_size: {2**30} is no multiple of 4 from 8 to 8192"),
    (REST.replace("64", "true"), "constants.image_size: True is no multiple of 4"),
    (REST.replace("1000", "true"), "diffusion: schedule 'linear' with T = True is not supported"),
    (REST.replace("1000", "1000000000"), "diffusion: schedule 'linear' with T = 1000000000 is not supported"),
    (REST.replace("1000", "1"), "diffusion: schedule 'linear' with T = 1 is not supported"),
    (REST.replace("1000", "1" + ":59" * 3000), "diffusion.T: cannot be resolved (Exceeds the limit"),
    (REST, "model: is missing"),
    (REST + "model: &m {}", "has an alias, an anchor or a tag"),
    (REST + "model: {a: !!int abc}", "has an alias, an anchor or a tag"),
    (REST + f"model: {nested(8)}", "nested deeper than 8 levels"),
    (REST + "model: [" + "1, " * 1000 + "1]", "beyond 1000 nodes"),
    (REST.replace("1000", "'${oc.env:T}'"), "diffusion.T: '${oc.env:T}' cannot be resolved without calling something"),
    (REST.replace("{T: 1000, schedule_type: linear}", "[1]"), "diffusion.T: cannot be resolved"),
    (REST.replace("{T: 1000, schedule_type: linear}", "linear"), "diffusion.T: is missing"),
    (REST.replace("1000", "x"), "diffusion: schedule 'linear' with T = x is not supported"),
    (REST.replace("64", "[64]"), "constants.image_size: [64] is no multiple of 4"),
    ("latent_diffusion: 'yes'\n" + REST.partition("\n")[2], "latent_diffusion: models of pixels are not supported"),
])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_model_described_otherwise_is_refused_in_one_line(tmp_path, text, words):
    folder = tmp_path / "model"
    for file in (Path(".hydra/config.yaml"), Path("checkpoints/ema_averaged_model.ckpt")):
        (folder / file).parent.mkdir(parents=True)
        (folder / file).touch()
    (folder / ".hydra/config.yaml").write_text(text)
    assert words in refusal(load_diffusion, folder)


# ---- random damage ---------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_damaged_configuration_is_read_or_refused(tmp_path):
    file = tmp_path / ".hydra" / "config.yaml"
    for part in (file, tmp_path / "checkpoints" / "ema_averaged_model.ckpt"):
        part.parent.mkdir()
        part.touch()

    def read() -> None:
        try:
            load_diffusion(tmp_path)
        except UserError as error:
            if "ema_averaged_model.ckpt: is damaged or incomplete" not in str(error):  # then the configuration was read
                raise

    check_reader(file, yaml.safe_dump(random_weights.config("small"), sort_keys=False).encode(), read)
