"""A value for a key of text is the text that was written, in the file and on the command line."""

import dataclasses
import string
import types
import typing

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bloomft.config.keys import Config
from bloomft.config.loading import config_to_yaml, load_config
from bloomft.config.yaml_text import InvalidYAMLError, read_yaml
from bloomft.errors import UserError
from tests.bloomft.config.conftest import SEED

PLAIN = """007 0o17 0x1f 12:30:00 190:20:30 2024-01-01 2001-12-14t21:59:43Z 1_000 12e4567 1e5 1.10 .5 +1 -0 0
.inf .nan yes No on off y true FALSE = << v1.0 a:b a#b ${oc.env:HOME} ${data.max_length} ??? ~x a=b -x é/ü"""
QUOTED = """&x *.txt *x !x {} [ ] [ab].txt 'a' "a" ' " | > @a `a` %x - --- ... ~ Null NULL"""
NOT_A_NUMBER = """train.batch_size=1_0 train.batch_size=1:30 train.batch_size=4.0 train.batch_size=1e2
train.batch_size=true train.compile=yes train.compile=1 optim.optimizer.lr=0x10 optim.optimizer.lr=1e400
optim.optimizer.lr=.inf optim.optimizer.lr=1_0.0"""
WORDS = [*PLAIN.split(), "a, b", "a b"]
NEEDS_QUOTES_IN_A_FILE = [
    *QUOTED.split(), "runs/exp #2", "# a", " a ", "a ", "\ta", "!!int 3", "{a: 1}", "a: b", "- a", "? a"
]  # fmt: skip


def text_keys(node=Config, prefix="") -> dict[str, tuple]:
    """Every key that may hold any text, with the types that its values may have."""
    found = {}
    for spec in dataclasses.fields(node):
        kinds = typing.get_args(spec.type) if isinstance(spec.type, types.UnionType) else (spec.type,)
        if dataclasses.is_dataclass(spec.type):
            found |= text_keys(spec.type, f"{prefix}{spec.name}.")
        elif str in kinds and "choices" not in spec.metadata:
            found[prefix + spec.name] = kinds
    return found


KEYS = text_keys()


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "seed.yaml"
    path.write_text(SEED)
    return path


def value_of(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config


def in_file(path, key, written) -> Config:
    """The configuration with ``written``, YAML, for ``key``."""
    *nodes, name = key.split(".")
    whole = target = yaml.safe_load(SEED)
    for node in nodes:
        target = target[node]
    target[name] = "PLACEHOLDER"
    changed = path.with_name("changed.yaml")
    changed.write_text(yaml.safe_dump(whole, width=10**6).replace("PLACEHOLDER", written), encoding="utf-8")
    return load_config(changed)


def test_the_keys_of_text():
    assert set(KEYS) == {
        "data.filenames", "data.cache_dir", "train.resume", "train.output_dir",
        *(f"model.transformer.{name}" for name in
          ("pretrained_model_name_or_path", "revision", "subfolder", "cache_dir", "token")),
    }  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_every_word_on_the_command_line(seed, key, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    for word in [*WORDS, *NEEDS_QUOTES_IN_A_FILE, "a\nb"]:
        folder = key in ("train.output_dir", "data.cache_dir")
        expected = "/home/somebody" if folder and word == "~" else word
        assert value_of(load_config(seed, [f"{key}={word}"]), key) == expected


@pytest.mark.parametrize("key", KEYS)
def test_every_word_in_a_file(seed, key):
    for word in WORDS:
        assert value_of(in_file(seed, key, word), key) == word


@pytest.mark.parametrize("key", KEYS)
def test_every_word_in_quotes_in_a_file(seed, key):
    for word in WORDS + NEEDS_QUOTES_IN_A_FILE:
        if word != "~":
            assert value_of(in_file(seed, key, "'" + word.replace("'", "''") + "'"), key) == word


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("word", ["null", "Null", "NULL", "~"])
def test_null_is_null_only_where_a_key_may_be_null(seed, key, word, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    if types.NoneType not in KEYS[key]:
        assert value_of(in_file(seed, key, word), key) == word
        assert value_of(load_config(seed, [f"{key}={word}"]), key) == word
        return
    default = value_of(in_file(seed, "train.batch_size", "4"), key)
    assert value_of(in_file(seed, key, word), key) == default
    if word == "null":
        assert (
            value_of(load_config(seed.with_name("changed.yaml"), [f"{key}=x", f"{key}=null"]), key) == default
        )


def test_texts_in_lists(seed):
    line = "data.filenames=[a #1.txt, 2024-01-01.txt, yes, 1e5, *.md, 'b, c.txt', \"d e\" f, ~]"
    expected = ["a #1.txt", "2024-01-01.txt", "yes", "1e5", "*.md", "b, c.txt", '"d e" f', "~"]
    assert load_config(seed, [line]).data.filenames == expected
    written = "[2024-01-01.txt, yes, 1e5, 007, 'a #1.txt', '*.md']"
    expected = ["2024-01-01.txt", "yes", "1e5", "007", "a #1.txt", "*.md"]
    assert in_file(seed, "data.filenames", written).data.filenames == expected
    assert load_config(seed, ["data.filenames=[a]"]).data.filenames == ["a"]
    assert load_config(seed, ["model.lora.parts=[q, v]"]).model.lora.parts == ["q", "v"]
    assert load_config(seed, ["optim.optimizer.betas=[.9,0.95]"]).optim.optimizer.betas == [0.9, 0.95]
    with pytest.raises(UserError, match=r"filenames\[1\]: null is not allowed"):
        load_config(seed, ["data.filenames=[a,,b]"])


def test_texts_in_a_node_on_the_command_line(seed):
    config = load_config(seed, ["model={transformer: {revision: 1.10, subfolder: yes}}"])
    assert (config.model.transformer.revision, config.model.transformer.subfolder) == ("1.10", "yes")


@pytest.mark.parametrize(
    "written",
    ["&x", "&x runs", "*x", "*.txt", "!x", "!!str 3", "!!int 3", "[a #1.txt, b]", "@x", "%x", "a\x85b"],
)
def test_what_yaml_would_make_something_else_of_is_refused_with_its_line(seed, written):
    with pytest.raises(UserError, match=r"changed.yaml:\d+: not valid YAML: ") as caught:
        in_file(seed, "data.filenames", written)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("1e-4", 1e-4),
        ("1e5", 1e5),
        ("1E-4", 1e-4),
        ("1", 1.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("+2.5e+1", 25.0),
        ("010", 10.0),
    ],
)
def test_numbers(seed, word, expected):
    for config in (
        load_config(seed, [f"optim.optimizer.lr={word}"]),
        in_file(seed, "optim.optimizer.lr", word),
        in_file(seed, "optim.optimizer.lr", f"'{word}'"),
    ):
        assert config.optim.optimizer.lr == expected
        assert type(config.optim.optimizer.lr) is float


@pytest.mark.parametrize(
    ("word", "expected"), [("12", 12), ("+3", 3), ("010", 10), ("0x1f", 31), ("0o17", 15)]
)
def test_integers(seed, word, expected):
    assert load_config(seed, [f"train.batch_size={word}"]).train.batch_size == expected
    assert in_file(seed, "train.batch_size", word).train.batch_size == expected


@pytest.mark.parametrize("line", NOT_A_NUMBER.split())
def test_what_is_no_number_or_boolean_in_yaml_1_2_is_refused(seed, line):
    key, word = line.split("=")
    with pytest.raises(UserError, match=rf"command line: {key}: .* is not allowed"):
        load_config(seed, [line])
    with pytest.raises(UserError, match=rf"changed.yaml:\d+: {key}: .* is not allowed"):
        in_file(seed, key, word)


def test_values_of_a_schedule_follow_the_core_schema(seed):
    written = "{a: 1e5, b: '1e5', c: yes, d: true, e: 0x10, f: 12:30, g: null, h: 3}"
    expected = {"a": 1e5, "b": "1e5", "c": "yes", "d": True, "e": 16, "f": "12:30", "g": None, "h": 3}
    key = "optim.scheduler.scheduler_specific_kwargs"
    assert value_of(load_config(seed, [f"{key}={written}"]), key) == expected
    assert value_of(in_file(seed, key, written), key) == expected
    assert value_of(load_config(seed, [f"{key}.a=1e5", f"{key}.c=yes"]), key) == {"a": 1e5, "c": "yes"}


def test_a_name_of_no_user_is_a_folder_as_written(seed):
    assert load_config(seed, ["train.output_dir=~no-such-user"]).train.output_dir == "~no-such-user"


@settings(deadline=None)
@given(
    text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
    | st.text(string.digits + "+-._:eExXobaAnf #~'\"\n ", min_size=1)
)
def test_any_text_survives_the_resolved_file(seed, text):
    config = load_config(seed)
    config.data.filenames = [text, "a"]
    config.model.transformer.revision = config.train.resume = text
    config.optim.scheduler.scheduler_specific_kwargs = {"a": text, "b": 1e-7, "c": 3, "d": True, "e": None}
    again = seed.with_name("again.yaml")
    again.write_text(config_to_yaml(config), encoding="utf-8", newline="")
    assert load_config(again) == config
    assert yaml.safe_load(config_to_yaml(config))["train"]["resume"] == text


@settings(deadline=None)
@given(st.text(st.sampled_from(list("ab:#-?[]{},&*!|>'\"%@` \n\t~01")), max_size=30))
def test_arbitrary_files_are_read_or_refused_in_one_line(text):
    try:
        read_yaml(text)
    except InvalidYAMLError as error:
        lines = str(error).splitlines()
    else:
        lines = ["read"]
    assert len(lines) == 1
