"""hydralora.py: the layer against its looped twin, what trains, what is saved."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hydralora import (
    HydraLinear,
    adapter_parameters,
    adapters_disabled,
    add_hydralora,
    hydra_layers,
    load_adapter,
    record_gates,
    remove_adapters,
    save_adapter,
)
from model import ModelArgs, Transformer, rotary_table
from tests.conftest import tiny_model

VARIANTS = [dict(), dict(share_a=False), dict(gate="uniform"), dict(gate="uniform", share_a=False),
            dict(heads=1), dict(heads=5, rank=2)]


def filled(layer, seed=0):
    """The layer with a B that is not zero, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator))
    return layer


def hydra(**settings):
    torch.manual_seed(0)
    return filled(HydraLinear(nn.Linear(12, 20, bias=False), **{**dict(rank=4), **settings}))


def adapted(model, **settings):
    """The model with adapters that are not zero."""
    torch.manual_seed(0)
    add_hydralora(model, **settings)
    for layer in hydra_layers(model).values():
        filled(layer)
    return model


def gate_of(layer, x):
    """w(x) (..., N)."""
    return layer.gate(layer.project(x)[1])


def looped(layer, x):
    """Equation 2 head by head, as the paper writes it."""
    y = layer.base(x)
    heads, _, rank = layer.lora_B.shape
    gate = (F.linear(x, layer.router).softmax(-1) if layer.router is not None
            else torch.full((*x.shape[:-1], heads), 1 / heads))
    for i in range(heads):
        a = layer.lora_A if layer.lora_A.ndim == 2 else layer.lora_A[i]
        y = y + 32.0 / rank * gate[..., i:i + 1] * ((x @ a.T) @ layer.lora_B[i].T)
    return y


# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_outputs_and_every_gradient_equal_the_looped_twins(settings):
    layer, x = hydra(**settings), torch.randn(2, 5, 12, requires_grad=True)
    wanted = [p for p in layer.parameters() if p.requires_grad] + [x]
    y, twin = layer(x), looped(layer, x)
    assert torch.allclose(y, twin, atol=1e-5)
    weight = torch.randn_like(y)
    for got, want in zip(torch.autograd.grad((y * weight).sum(), wanted),
                         torch.autograd.grad((twin * weight).sum(), wanted)):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
    one_head_or_uniform = layer.settings.heads == 1 or layer.settings.gate == "uniform"
    assert (layer.router is None) == one_head_or_uniform and layer.lora_B.is_contiguous()


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 4, 12)])
def test_any_leading_dimensions_work(shape):
    layer, x = hydra(), torch.randn(shape)
    assert torch.allclose(layer(x), looped(layer, x), atol=1e-5)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_a_new_layer_is_the_base_layer_exactly(settings):
    base = nn.Linear(12, 20, bias=False)
    x = torch.randn(3, 12)
    assert torch.equal(HydraLinear(base, **settings)(x), base(x))


def test_a_and_the_router_start_uniform_within_one_over_sqrt_in_and_b_at_zero():
    layer = HydraLinear(nn.Linear(400, 20, bias=False), rank=8, heads=4)
    for tensor in (layer.lora_A, layer.router):
        assert 0.95 / 20 < tensor.abs().max() <= 1 / 20
        assert tensor.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.1)
    assert not layer.lora_B.any()


def test_the_random_router_separates_the_heads_where_a_zero_one_never_would():
    def spread(zero_router):
        torch.manual_seed(0)
        layer = HydraLinear(nn.Linear(12, 20, bias=False), rank=4)
        if zero_router:
            nn.init.zeros_(layer.router)
        optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
        goal = torch.randn(20)
        for _ in range(50):
            optimizer.zero_grad()
            (layer(torch.randn(16, 12)) - goal).square().mean().backward()
            optimizer.step()
        return (layer.lora_B - layer.lora_B.mean(0)).abs().max().item()

    assert spread(zero_router=True) < 1e-6 and spread(zero_router=False) > 1e-3


def test_dropout_acts_in_training_only_and_never_on_the_routers_input():
    layer, x = hydra(dropout=0.5), torch.randn(50, 12)
    assert not torch.allclose(layer(x), layer(x))
    with_mask = []
    hook = torch.nn.functional.dropout
    try:
        F.dropout = lambda x, p, training: with_mask.append((p, training)) or hook(x, p, training)
        layer.lora_A.data.zero_()
        assert torch.equal(layer(x), layer.base(x))
    finally:
        F.dropout = hook
    assert with_mask == [(0.5, True)]  # once: the router's input has none
    assert torch.allclose(gate_of(layer, x), F.linear(x, layer.router).softmax(-1))
    layer = hydra(dropout=0.5).eval()
    assert torch.allclose(layer(x), looped(layer, x), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_adapters_stay_fp32_over_any_base_with_and_without_autocast(dtype, autocast):
    layer = hydra()
    want = looped(layer, torch.ones(3, 12))
    layer.base.to(dtype)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = layer(torch.ones(3, 12, dtype=dtype))
        assert gate_of(layer, torch.ones(3, 12)).dtype == torch.float32
    y.float().sum().backward()
    assert y.dtype == (autocast or dtype)
    assert torch.allclose(y.float(), want, rtol=0.05, atol=0.15)
    for name, parameter in layer.named_parameters(recurse=False):
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name


@pytest.mark.parametrize("settings, message", [
    (dict(rank=0), "rank"), (dict(heads=0), "heads"), (dict(dropout=1.0), "dropout"),
    (dict(gate="top1"), "gate")])
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HydraLinear(nn.Linear(3, 3), **settings)


def test_the_branch_keeps_no_tensor_of_a_heads_full_width():
    def kept(heads):
        layer, x = hydra(heads=heads), torch.randn(512, 12, requires_grad=True)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: sizes.append(t.numel()) or t, lambda t: t):
            layer(x)
        return sum(sizes)

    assert kept(8) - kept(1) < 8 * 512 * 20  # a loop would keep (N, tokens, width)


# ---------------------------------------------------------------- in a model


def test_injection_wraps_exactly_the_layers_that_are_named(model):
    count = add_hydralora(model, targets=("w1", "wq"))
    assert sorted(hydra_layers(model)) == [
        f"layers.{i}.{name}" for i in (0, 1) for name in ("attention.wq", "feed_forward.w1")]
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("targets, message", [
    (("w",), r"no linear layer is called \['w'\]"), (("feed_forward.w1",), "no linear layer"),
    (("w1", "gate_proj"), r"called \['gate_proj'\]; there are \['output', 'w1'"),
    ((), r"called \[\]; there are")])
def test_targets_that_are_no_whole_name_of_a_linear_layer_are_refused(model, targets, message):
    with pytest.raises(ValueError, match=message):
        add_hydralora(model, targets=targets)
    assert not hydra_layers(model) and all(p.requires_grad for p in model.parameters())


def test_adapters_are_not_added_twice(model):
    add_hydralora(model)
    with pytest.raises(ValueError, match="already has adapters"):
        add_hydralora(model)


def test_only_adapters_train_all_of_them_and_the_base_keeps_its_bytes(model):
    add_hydralora(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapters = adapter_parameters(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == adapters.keys()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(3):
        x = torch.randint(768, (2, 9), generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in adapters), name


def test_disabled_adapters_leave_the_base_model_exactly(model):
    x = torch.randint(768, (2, 9))
    base = model(x)
    tuned = adapted(model)(x)
    with pytest.raises(RuntimeError), adapters_disabled(model):
        assert torch.equal(model(x), base)
        with adapters_disabled(model):
            pass
        assert torch.equal(model(x), base)
        raise RuntimeError
    assert torch.equal(model(x), tuned) and not torch.allclose(tuned, base)


def test_removed_adapters_leave_the_frozen_base_and_room_for_others(model, tmp_path):
    x = torch.randint(768, (2, 9))
    base, modules, state = model(x), dict(model.named_modules()), vars(model).copy()
    tuned = adapted(model)(x)
    save_adapter(model, tmp_path / "a.pt")
    remove_adapters(model)
    assert torch.equal(model(x), base) and vars(model) == state
    assert dict(model.named_modules()) == modules
    assert not any(p.requires_grad for p in model.parameters())
    load_adapter(model, tmp_path / "a.pt")
    assert torch.equal(model(x), tuned)


@pytest.mark.parametrize("training", [True, False])
def test_new_layers_are_in_the_mode_of_those_they_wrap(model, tmp_path, training):
    save_adapter(adapted(tiny_model(), dropout=0.5), tmp_path / "a.pt")
    load_adapter(model.train(training), tmp_path / "a.pt")
    assert all(module.training == training for module in model.modules())
    x = torch.randint(768, (2, 9))
    assert torch.equal(model(x), model(x)) == (not training)  # dropout in training alone


def test_checkpointed_activations_give_the_same_adapter_gradients_dropout_included(model):
    adapted(model, dropout=0.3)

    def gradients():
        torch.manual_seed(5)
        model.zero_grad()
        model(torch.arange(20).view(2, 10)).square().mean().backward()
        return {name: p.grad.clone() for name, p in adapter_parameters(model).items()}

    plain = gradients()
    model.checkpoint_activations = True
    again = gradients()
    assert all(torch.equal(plain[name], again[name]) and plain[name].any() for name in plain)


def test_recorded_gates_are_the_ones_in_use_and_leave_no_hook(model):
    add_hydralora(model)
    x = torch.randint(768, (2, 9))
    with record_gates(model) as gates:
        model(x)
    assert gates.keys() == hydra_layers(model).keys()
    first = hydra_layers(model)["layers.0.feed_forward.w1"]
    block = model.layers[0]
    h = model.tok_embeddings(x)
    h = h + block.attention(block.attention_norm(h), rotary_table(torch.arange(9)[None], 8, 1e4))
    want = gate_of(first, block.ffn_norm(h))
    assert torch.allclose(gates["layers.0.feed_forward.w1"], want, atol=1e-5)
    gates.clear()
    model(x)
    assert not gates


@pytest.mark.parametrize("targets, count", [(("w1", "w2", "w3"), 26_812_416),
                                            (("wq", "wv"), 9_175_040)])
def test_7b_has_the_papers_number_of_trainable_parameters(targets, count):
    with torch.device("meta"):
        model = Transformer(ModelArgs(vocab_size=32000))
    assert add_hydralora(model, targets=targets, rank=8, heads=3) == count


# ---------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("settings", [dict(), dict(share_a=False, heads=2, rank=3, alpha=6.0,
                                                   targets=["wq", "wo"])], ids=str)
def test_a_loaded_adapter_equals_the_saved_one(tmp_path, settings):
    model, x = adapted(tiny_model(), **settings), torch.randint(768, (2, 9))
    save_adapter(model, tmp_path / "a.pt")
    other = tiny_model()
    config = load_adapter(other, tmp_path / "a.pt")
    assert config == model.hydralora_config and config.items() >= settings.items()
    assert torch.equal(other(x), model(x))
    assert [p for p in tmp_path.iterdir()] == [tmp_path / "a.pt"]


def test_the_file_holds_exactly_the_adapters_tensors(tmp_path):
    model = adapted(tiny_model())
    save_adapter(model, tmp_path / "a.pt")

    def tensors(content):
        if isinstance(content, dict):
            return sum((tensors(v) for v in content.values()), [])
        return [content] if isinstance(content, torch.Tensor) else []

    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert len(tensors(content)) == len(adapter_parameters(model)) == 18
    assert any(name.endswith(".router") for name in content["tensors"])


def test_lora_b_of_an_older_file_is_loaded_whatever_its_strides(tmp_path):
    model, loaded = adapted(tiny_model()), tiny_model()
    save_adapter(model, tmp_path / "a.pt")
    spoil(tmp_path / "a.pt", lambda c: c["tensors"].update({  # a view of (O, N, R), as once saved
        name: t.transpose(0, 1).contiguous().transpose(0, 1)
        for name, t in c["tensors"].items() if name.endswith("lora_B")}))
    load_adapter(loaded, tmp_path / "a.pt")
    x = torch.randint(768, (2, 9))
    assert torch.equal(loaded(x), model(x))
    assert all(layer.lora_B.is_contiguous() for layer in hydra_layers(loaded).values())


def compiled_whole(model):
    return torch.compile(model, backend="eager")


def compiled_by_block(model):
    for i, block in enumerate(model.layers):
        model.layers[i] = torch.compile(block, backend="eager")
    return model


@pytest.mark.parametrize("compiled", [compiled_whole, compiled_by_block])
def test_an_adapter_passes_between_compiled_and_plain_models(tmp_path, compiled):
    save_adapter(compiled(adapted(tiny_model())), tmp_path / "a.pt")
    load_adapter(tiny_model(), tmp_path / "a.pt")
    load_adapter(compiled(tiny_model()), tmp_path / "a.pt")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_same_base_in_another_dtype_is_accepted(tmp_path, dtype):
    save_adapter(adapted(tiny_model()), tmp_path / "a.pt")
    load_adapter(tiny_model().to(dtype), tmp_path / "a.pt")


def spoil(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


KEY = "layers.0.feed_forward.w1.router"


@pytest.mark.parametrize("change, message", [
    (lambda c: c["tensors"].pop(KEY), KEY),
    (lambda c: c["tensors"].update(more=torch.zeros(1)), "more"),
    (lambda c: c["tensors"].update({KEY + "s": c["tensors"].pop(KEY)}), KEY),
    (lambda c: c["tensors"].update({KEY: torch.zeros(3, 31)}), KEY),
    (lambda c: c["config"].update(rank=4), "lora_A"),
    (lambda c: c.pop("tensors"), "not an adapter"),
    (lambda c: c["config"].update(targets=["gate_proj"]), "gate_proj"),
])
def test_a_file_that_does_not_fit_is_refused_and_the_model_is_as_it_was(tmp_path, change, message):
    save_adapter(adapted(tiny_model()), tmp_path / "a.pt")
    spoil(tmp_path / "a.pt", change)
    model, fresh = tiny_model(), tiny_model()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path / "a.pt")
    assert not hydra_layers(model) and all(p.requires_grad for p in model.parameters())
    assert model.state_dict().keys() == fresh.state_dict().keys()


def test_an_adapter_of_another_base_model_is_refused(tmp_path):
    save_adapter(adapted(tiny_model()), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"another base model \(layers.0.attention.wk.weight"):
        load_adapter(tiny_model(seed=1), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="another base model"):
        load_adapter(tiny_model(n_layers=3), tmp_path / "a.pt")


def test_files_that_are_no_adapters_are_refused(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"no adapter")
    torch.save([1, 2], tmp_path / "b.pt")
    for name in ("a.pt", "b.pt", "absent.pt"):
        with pytest.raises(ValueError, match="not an adapter"):
            load_adapter(tiny_model(), tmp_path / name)
