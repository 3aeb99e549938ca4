"""Every mistake in a configuration is one line with path, place, what is allowed and a suggestion."""

import sys
import time
from pathlib import Path

import pytest
import yaml

from bloomft.config import loading as config_module
from bloomft.config.keys import filename_patterns
from bloomft.config.loading import config_to_yaml, load_config
from bloomft.errors import UserError
from tests.bloomft.config.conftest import SEED

ROOT = Path(__file__).parents[3]


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "seed.yaml"
        path.write_text(text)
        return path

    return write


def test_the_seed_s_file_loads_as_it_is(write):
    config = load_config(write(SEED))
    assert config.data.max_length == 2048
    assert config.model.lora.lora_scale == 4.0
    assert config.optim.optimizer.lr == 1e-4
    assert config.optim.optimizer.eps == 1e-6
    assert config.optim.optimizer.betas == [0.9, 0.999]
    assert config.train.gradient_checkpointing is True
    assert config.train.output_dir == "runs/seed"
    assert filename_patterns(config.data) == ["examples/*.txt"]


def test_overrides_win_and_the_resolved_file_loads_again(write, tmp_path):
    words = [
        "train.batch_size=2",
        "data.filenames=[a/*.md,b.jsonl]",
        "train.precision=bf16",
        "model.lora.parts=[q,v]",
    ]
    config = load_config(write(SEED), [*words, "optim.scheduler.scheduler_specific_kwargs.num_cycles=2"])
    assert config.train.batch_size == 2
    assert filename_patterns(config.data) == ["a/*.md", "b.jsonl"]
    assert config.model.lora.parts == ["q", "v"]
    assert config.optim.scheduler.scheduler_specific_kwargs == {"num_cycles": 2}
    (tmp_path / "again.yaml").write_text(config_to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_a_wrong_value_in_the_file_is_not_blamed_on_an_override_of_its_neighbour(write):
    path = write(SEED.replace("batch_size: 4", "batch_size: x"))
    with pytest.raises(UserError, match=r"seed.yaml:26: train.batch_size: x"):
        load_config(path, ["train={precision: fp32}"])


@pytest.mark.parametrize("size", [config_module.LARGEST_FILE, 10**7])
def test_a_huge_file_is_refused_in_no_time(write, size):
    text = SEED + "".join(f"  k{i}: {i}\n" for i in range(size // 8))
    start = time.perf_counter()
    with pytest.raises(UserError, match="larger than 262144 bytes"):
        load_config(write(text))
    assert time.perf_counter() - start < 2


def test_the_access_token_is_not_left_where_loggers_look(write, monkeypatch):
    words = [
        "train",
        "run.yaml",
        "model.transformer.token=hf_secret",
        "model={transformer: {token: hf_secret}}",
    ]
    monkeypatch.setattr(sys, "argv", list(words))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", *words])
    assert load_config(write(SEED), words[2:]).model.transformer.token == "hf_secret"
    assert "hf_secret" not in " ".join(sys.argv + sys.orig_argv)
    assert sys.argv[:3] == ["train", "run.yaml", "model.transformer.token=hidden"]


def test_folders_of_the_home_directory(write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(write(SEED), ["train.output_dir=~/run"]).train.output_dir == str(tmp_path / "run")


def test_the_access_token_is_not_written(write):
    config = load_config(write(SEED), ["model.transformer.token=secret"])
    assert config.model.transformer.token == "secret"
    assert "secret" not in config_to_yaml(config)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("lora_dim: 8", "lora_dmi: 8", r"seed.yaml:10: model.lora.lora_dmi: unknown key; .*mean .*lora_dim"),
        ("train:\n", "trian:\n", r"seed.yaml:25: trian: unknown key; did you mean train"),
        ("lr: 1e-4", "lr: fast", r"seed.yaml:16: optim.optimizer.lr: fast is .* allowed: number > 0"),
        ("lr: 1e-4", "lr: -1", r"seed.yaml:16: optim.optimizer.lr: -1.0 is not allowed"),
        ("lr: 1e-4", "lr: .nan", r"optim.optimizer.lr: nan is not allowed"),
        ("lr: 1e-4", "lr:", r"optim.optimizer.lr: null is not allowed"),
        ("0.999]", "1.0]", r"seed.yaml:17: optim.optimizer.betas: .* allowed: 2 numbers ≥ 0 and < 1"),
        (", 0.999]", "]", r"betas: \[0.9\] is not allowed; allowed: 2 numbers"),
        ("0.999]", "x]", r"seed.yaml:17: optim.optimizer.betas\[1\]: x is not allowed"),
        ("name: linear", "name: liner", r"seed.yaml:21: .*did you mean linear\?"),
        ("batch_size: 4", "batch_size: 0", r"train.batch_size: 0 is not allowed; allowed: integer ≥ 1"),
        ("batch_size: 4", "batch_size: 1.5", r"train.batch_size: 1.5 is not allowed"),
        ("  batch_size: 4\n", "", r"train.batch_size is missing: rows in a micro-batch"),
        ("max_length: 2048", "max_length: ...", r"data.max_length: \.\.\. is not allowed"),
        ("max_length: 2048", "max_length: ${data.nothing}", r"yaml:3: .*: \$\{data.nothing\} is not"),
        ("checkpointing: true", "checkpointing: maybe", r"checkpointing: maybe is .*true, false, selective"),
        ("num_warmup_steps: 100", "num_warmup_steps: 6000", r"num_warmup_steps: 6000 is more than"),
        ("name: linear", "name: greedy\n    x: 1", r"optim.scheduler.x: unknown key"),
        ("filenames: examples/*.txt", "filenames:", r"data.filenames: null is not .* text or a list of"),
        ("filenames: examples/*.txt", "filenames: []", r"data.filenames: \[\] is not allowed"),
        ("  lora:\n", "  lora: 3\n  lara:\n", r"model.lora: expected the keys lora_dim"),
        ("lora_scale: 4", "lora_scale: 4\n    parts: [q, w]", r"lora.parts: \[q, w\] is not .* q, k, v"),
        ("lora_scale: 4", "lora_scale: 0", r"yaml:11: model.lora.lora_scale: 0.0 .* number ≠ 0"),
        ("lora_scale: 4", "lora_scale: 4\n    parts: [q, q]", r"lora.parts: \[q, q\] is not allowed"),
        ("lora_dim: 8", "lora_dim: 1000000000000", r"lora_dim: 1000000000000 .* integer ≥ 1 and ≤ 65536"),
        ("_name: query_key_value", "_name: lm_head", r"seed.yaml:12: .*lm_head is not .* dense_4h_to_h$"),
        ("_name: query_key_value", "_name: dense\n    parts: [q]", r"yaml:13: .*parts: \[q\] are rows"),
        ("[0.9, 0.999]", "{0: 0.9, 1: 0.9}", r"seed.yaml:17: optim.optimizer.betas: \{0: .* 2 numbers"),
        ("[0.9, 0.999]", "[[0.9], 0.9]", r"seed.yaml:17: optim.optimizer.betas\[0\]: \[0.9\] is not"),
        ("checkpointing: true", "checkpointing: [selective]", r"yaml:29: .*\[selective\] is not allowed"),
        ("checkpointing: true", "checkpointing: 1", r"yaml:29: .*checkpointing: 1 is not allowed"),
        ("checkpointing: true", "checkpointing: {a: selective}", r"yaml:29: .* is not allowed"),
        ("checkpointing: true", "checkpointing: true\n  output_dir: ''", r"output_dir: '' is not allowed"),
        ("checkpointing: true", "checkpointing: true\n  output_dir: /", r"yaml:30: .*: / is not a folder"),
        ("checkpointing: true", "checkpointing: true\n  output_dir: //../.", r"is not a folder for a"),
        ("batch_size: 4", "batch_size: 9223372036854775808", r"batch_size: a number of more than 64 bits"),
        ("batch_size: 4", f"batch_size: 1{'0' * 5000}", r"yaml:26: .*: 10+\.\.\. is not allowed"),
        ("examples/*.txt", '"a\\0b"', r"seed.yaml:2: data.filenames: .* is not allowed"),
        ("examples/*.txt", "{a: b}", r"seed.yaml:2: data.filenames: \{a: b\} is not allowed"),
        ("name: linear", "name: linear\n    scheduler_specific_kwargs: [1]", r"_kwargs: \[1\] is not"),
        ("name: linear", "name: linear\n    scheduler_specific_kwargs: {a: [1]}", r"a mapping of names to"),
        ("lr: 1e-4", f"lr: {'[' * 5000}{']' * 5000}", r"seed.yaml .*: nested too deeply"),
        ("lr: 1e-4", f"lr: {'{a: ' * 300}1{'}' * 300}", r"nested too deeply|is not allowed"),
        ("data:\n", "data: [\n", r"seed.yaml:\d+: not valid YAML"),
        ("model:\n", "data: {}\nmodel:\n", r"not valid YAML: found duplicate key data"),
    ],
)  # fmt: skip
def test_mistakes_in_the_file(write, old, new, expected):
    assert old in SEED
    with pytest.raises(UserError, match=expected) as caught:
        load_config(write(SEED.replace(old, new, 1)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "3", "[1, 2]", "# nothing"])
def test_a_file_that_is_no_mapping(write, text):
    with pytest.raises(UserError, match="expected the nodes data, model, optim, train"):
        load_config(write(text))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.batch_size=x", r"command line: train.batch_size: x is not allowed"),
        ("train.bach_size=3", r"command line: train.bach_size: unknown key; did you mean train.batch_size"),
        ("batch_size=3", r"command line: batch_size: unknown key; did you mean train.batch_size"),
        ("train=3", r"command line: train: expected the keys"),
        ("nonsense", r"'nonsense' is not of the form key=value"),
        ("train.logger={a", r"command line: train.logger: {a is not allowed"),
        ("train={a", r"command line: train: expected the keys"),
        ("train={a}}", r"command line: 'train={a}}' cannot be read"),
        ("train={output_dir: runs/exp #2}", r"command line: .* cannot be read"),
        ("train={output_dir: a, output_dir: b}", r"found duplicate key output_dir"),
        ("train.compile=yes", r"command line: train.compile: yes is not .* true or false"),
        ("data.split_state=~", r"command line: data.split_state: ~ is not allowed"),
        ("train.batch_size=-2", r"command line: train.batch_size: -2 is not allowed"),
        ("train.batch_size.x=4", r"command line: train.batch_size: \{x: 4\} is not allowed"),
        ("data.filenames[0]=x", r"filenames\[0\]: unknown key; did you mean data.filenames"),
        ("train={batch_size: x}", r"command line: train.batch_size: x is not allowed"),
        ("train.output_dir=", r"'train.output_dir=' is not of the form key=value"),
        ("data.filenames=\udcff", r"command line: data.filenames: '.udcff' is not allowed"),
        ("optim.optimizer.betas={a: 1}", r"command line: optim.optimizer.betas: \{a: 1\} is not allowed"),
        ("optim.optimizer.betas.0=1", r"command line: optim.optimizer.betas: .* is not allowed"),
        (f"train.batch_size=1{'0' * 5000}", r"command line: train.batch_size: 10+\.\.\. is not allowed"),
        (f"train={{{'[' * 5000}}}", r"nested too deeply"),
        (f"{'a.' * 3000}a=1", r"nested too deeply|unknown key"),
        (f"optim.scheduler.scheduler_specific_kwargs.{'a.' * 200}a=1", r"nested too deeply|is not allowed"),
    ],
)
def test_mistakes_on_the_command_line(write, override, expected):
    with pytest.raises(UserError, match=expected):
        load_config(write(SEED), [override])


def test_a_missing_file_and_one_that_is_not_text(tmp_path):
    with pytest.raises(UserError, match="cannot read the configuration: No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize("name", ["560m", "1b1", "1b7", "3b", "7b1", "tiny"])
def test_shipped_configurations_load(name):
    path = ROOT / "configs" / f"bloom-{name}.yaml"
    config = load_config(path)
    assert config.optim.scheduler.num_warmup_steps < config.optim.scheduler.num_training_steps
    seed_keys = set(yaml.safe_load(SEED)["train"])
    assert seed_keys <= set(yaml.safe_load(path.read_text())["train"])


@pytest.mark.parametrize("name", ["bloom-tiny.yaml", "configs/bloom-tiny.yaml", "./configs/bloom-tiny.yaml"])
def test_a_shipped_configuration_is_found_by_its_name(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = load_config(name)
    assert config.model.transformer.pretrained_model_name_or_path == "builtin:tiny"
    assert config.train.output_dir == "runs/bloom-tiny"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{Path(name)}: not found here; using the one shipped with bloomft, ")
    assert Path(line.rpartition(", ")[2]).samefile(ROOT / "configs" / "bloom-tiny.yaml")


def test_a_file_of_one_s_own_comes_before_the_shipped_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bloom-tiny.yaml").write_text(SEED)
    assert load_config("bloom-tiny.yaml").data.max_length == 2048
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["other/bloom-tiny.yaml", "bloom-2b.yaml", "", "configs", "bloom-tiny"])
def test_what_is_not_the_name_of_a_shipped_configuration_is_not_found(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cannot read the configuration"):
        load_config(name)
    with pytest.raises(UserError, match="cannot read the configuration"):
        load_config(tmp_path / "bloom-tiny.yaml")
    (tmp_path / "bloom-tiny.yaml").symlink_to("nothing")
    with pytest.raises(UserError, match="cannot read the configuration"):
        load_config("bloom-tiny.yaml")
    assert capsys.readouterr().err == ""
