"""A setting is named once, in HydraSettings: these tests say what a fork of it has forgotten."""

from dataclasses import fields, replace

import pytest
import torch
from torch import nn

import eval_mmlu
import train
from data.corpus import read_records
from data.make.world import write_records
from hydralora import (
    HydraLinear,
    HydraSettings,
    add_hydralora,
    hydra_layers,
    load_adapter,
    save_adapter,
)
from model import load_llama, save_llama
from tests.conftest import WORLD, tiny_model
from tools import generate, hf_layout, official_adapter, to_lora

DEFAULT = HydraSettings()
SETTINGS = [field.name for field in fields(HydraSettings)]
FLAGS = {action.dest: action for action in train.make_parser()._actions if action.dest in SETTINGS}


def other(name):
    """A value that differs from the default."""
    value = getattr(DEFAULT, name)
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        choices = getattr(FLAGS.get(name), "choices", None)
        assert choices, f"{name} is a text: its flag in train.py needs choices=..."
        return next(choice for choice in choices if choice != value)
    return (value or 0) + 1 if isinstance(value, (int, type(None))) else value / 2 + 0.1


def flag_of(name, value):
    """The flag of train.py that gives a setting this value."""
    flag = f"--{name.replace('_', '-')}"
    return [flag] if FLAGS[name].nargs == 0 else [flag, str(value)]


def layer_with(**settings):
    torch.manual_seed(0)
    layer = HydraLinear(nn.Linear(12, 20, bias=False), **settings)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).sin().view(parameter.shape))
    return layer


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_changes_what_the_layer_computes(name):
    x = torch.linspace(-1, 1, 60).cos().view(5, 12)
    torch.manual_seed(0)
    usual = layer_with()(x)
    torch.manual_seed(0)
    assert not torch.allclose(layer_with(**{name: other(name)})(x), usual)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_loaded_layer_has_the_settings_of_the_saved_one_and_computes_the_same(name, tmp_path):
    model, loaded, x = tiny_model(), tiny_model(), torch.randint(768, (2, 9))
    add_hydralora(model, **{name: other(name)})
    for layer in hydra_layers(model).values():
        layer.lora_B.data.normal_()
    save_adapter(model, tmp_path / "a.pt")
    config = load_adapter(loaded, tmp_path / "a.pt")
    assert set(config) == {"targets", *SETTINGS}
    for layer, again in zip(hydra_layers(model).values(), hydra_layers(loaded).values()):
        assert again.settings == layer.settings == replace(DEFAULT, **{name: other(name)})
    assert torch.equal(loaded.eval()(x), model.eval()(x))


@pytest.mark.parametrize("settings", [*({name: other(name)} for name in SETTINGS),
                                      *train.METHODS.values()], ids=str)
def test_an_adapted_model_is_causal_with_every_setting_and_method(settings):
    model, x = tiny_model().eval(), torch.randint(768, (2, 9))
    add_hydralora(model, **settings)
    for layer in hydra_layers(model).values():
        layer.lora_B.data.normal_()
    assert torch.allclose(model(x)[:, :5], model(x[:, :5]), atol=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_an_older_file_lacks_has_its_default(name, tmp_path):
    model, loaded = tiny_model(), tiny_model()
    add_hydralora(model)
    save_adapter(model, tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    del content["config"][name]
    torch.save(content, tmp_path / "a.pt")
    load_adapter(loaded, tmp_path / "a.pt")
    assert all(layer.settings == DEFAULT for layer in hydra_layers(loaded).values())


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_has_a_flag_of_train_py_or_is_fixed_by_a_method(name):
    args = train.parse_args([])
    if not hasattr(args, name):
        assert any(name in fixed for fixed in train.METHODS.values())
        return
    args = train.parse_args(flag_of(name, other(name)))
    assert train.adapter_settings(args)[name] == other(name)
    usual = train.adapter_settings(train.parse_args([]))[name]
    assert usual == (train.WORLD_RECIPE[name] if name in train.WORLD_RECIPE
                     else getattr(DEFAULT, name))


@pytest.mark.parametrize("method", train.METHODS)
def test_a_flag_that_a_method_fixes_is_refused_and_what_is_fixed_is_shown(method, capsys):
    args = train.parse_args(["--method", method])
    for name, value in train.METHODS[method].items():
        if hasattr(args, name):
            assert getattr(args, name) == value
            usual = getattr(DEFAULT, name)
            with pytest.raises(SystemExit):
                train.parse_args(["--method", method, *flag_of(
                    name, other(name) if usual == value else usual)])
            assert f"--method {method} has {name} {value}" in capsys.readouterr().err


@pytest.mark.parametrize("tool", [official_adapter, to_lora])
def test_a_format_refuses_a_setting_that_it_cannot_hold(tool, monkeypatch):
    monkeypatch.setattr(HydraSettings, "new", 0, raising=False)
    for name in [*SETTINGS, "new"]:
        value = 1 if name == "new" else other(name)
        if name in tool.SUPPORTED:
            hf_layout.check_settings({name: value}, tool.SUPPORTED, "it")
        else:
            with pytest.raises(ValueError, match=f"{name} is"):
                hf_layout.check_settings({name: value}, tool.SUPPORTED, "it")
        hf_layout.check_settings({name: getattr(HydraSettings, name)}, (), "it")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    save_llama(tiny_model(n_layers=1), WORLD / "base" / "tokenizer.model", folder / "weights")
    records = [r for r in read_records(WORLD / "train.jsonl") if r["category"] == "tavi"][:24]
    write_records(records, folder / "data.jsonl")
    return folder


@pytest.mark.parametrize("method, flags", [
    *((method, []) for method in train.METHODS),
    *(("hydralora", flag_of(name, other(name))) for name in FLAGS)], ids=str)
def test_every_method_and_setting_runs_through_every_tool(method, flags, place, tmp_path, capsys):
    weights, data = str(place / "weights"), str(place / "data.jsonl")
    assert train.main(["--weights", weights, "--data", data, "--method", method, "--device", "cpu",
                       "--max-seq-len", "100", "--max-steps", "2", "--rank", "2", "--dropout", "0",
                       "--out", str(tmp_path / "run"), *flags]) == 0
    base = ["--weights", weights, "--device", "cpu"]
    if method == "full":
        tuned = ["--weights", str(tmp_path / "run"), "--device", "cpu"]
    else:
        tuned = [*base, "--adapter", str(tmp_path / "run" / "adapter.pt")]
    assert train.main(["--weights", weights, "--method", method, "--dry-run", *flags]) == 0
    assert generate.main(["Say it.", *tuned, "--max-new-tokens", "2"]) == 0
    assert eval_mmlu.main([*tuned, "--shots", "0", "--limit", "1", "--max-seq-len", "100",
                           "--out", str(tmp_path / "m.json")]) == 0
    if method == "full":
        return
    adapter = str(tmp_path / "run" / "adapter.pt")
    model, _ = load_llama(weights)
    config = load_adapter(model, adapter)
    assert config.items() >= train.METHODS[method].items()
    unusual = {name for name in SETTINGS if config[name] != getattr(DEFAULT, name)}
    for tool, more in [(official_adapter, []), (to_lora, ["--constant", "uniform", "--val-data",
                                                          data, "--device", "cpu"])]:
        status = tool.main([adapter, str(tmp_path / tool.__name__), "--weights", weights, *more])
        held = unusual <= set(tool.SUPPORTED)
        assert status == (0 if held else 2), capsys.readouterr().err
