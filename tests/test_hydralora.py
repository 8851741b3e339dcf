"""hydralora.py: the layer against its looped twin, what trains, what is saved."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hydralora
from hydralora import (
    HydraLinear,
    adapter_parameters,
    adapters_disabled,
    add_hydralora,
    base_fingerprint,
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


def test_the_update_is_all_that_the_layer_adds_and_is_fp32_over_a_bf16_base():
    layer, x = hydra(), torch.randn(3, 12)
    want = looped(layer, x) - layer.base(x)
    assert torch.allclose(layer.update(x), want, atol=1e-5)
    layer.base.bfloat16()
    update = layer.update(x.bfloat16())
    assert update.dtype == torch.float32
    assert torch.equal(layer(x.bfloat16()), layer.base(x.bfloat16()) + update.bfloat16())


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, nn.Module.double,
                                  lambda model: model.to("cpu", torch.bfloat16)])
def test_casts_change_the_base_and_leave_the_adapter_fp32_to_the_last_bit(model, cast):
    adapted(model)
    before = copy.deepcopy(adapter_parameters(model))
    cast(model)
    dtype = model.output.weight.dtype
    assert dtype != torch.float32
    assert all(layer.base.weight.dtype == dtype for layer in hydra_layers(model).values())
    for name, parameter in adapter_parameters(model).items():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name]), name
    layer = hydra_layers(model)["layers.0.feed_forward.w1"]
    assert layer(torch.ones(2, 32, dtype=dtype)).dtype == dtype


def test_the_adapter_follows_its_base_to_another_device(model):
    adapted(model).to("meta")
    assert all(p.is_meta for p in model.parameters())
    model.half().to_empty(device="cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert all(p.is_shared() for p in model.share_memory().parameters())


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


class Conv1D(nn.Module):
    """A layer that is linear, and no nn.Linear."""


@pytest.mark.parametrize("other", [Conv1D(), nn.Embedding(3, 4), nn.Parameter(torch.zeros(2, 3))],
                         ids=["Conv1D", "Embedding", "fused experts"])
def test_a_target_that_names_another_kind_of_layer_is_refused_where_others_match(model, other):
    model.layers[1].feed_forward.experts = nn.Module()
    model.layers[1].feed_forward.experts.w1 = other
    with pytest.raises(ValueError, match=r"called \['layers.1.feed_forward.experts.w1'\]"):
        add_hydralora(model)
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


def test_a_model_without_values_takes_adapters_but_neither_computes_nor_saves_nor_loads(tmp_path):
    save_adapter(adapted(tiny_model()), tmp_path / "a.pt")
    with torch.device("meta"):
        model, other = tiny_model(), tiny_model()
    assert add_hydralora(model) > 0
    with pytest.raises(ValueError, match="the adapter is on the meta device"):
        hydra_layers(model)["layers.0.feed_forward.w1"](torch.ones(2, 32))
    for attempt in (lambda: save_adapter(model, io.BytesIO()),
                    lambda: load_adapter(other, tmp_path / "a.pt")):
        with pytest.raises(ValueError, match="tok_embeddings.weight is on the meta device"):
            attempt()


# ---------------------------------------------------------------- quantised layers


class Packed(torch.autograd.Function):
    """A quantised layer's product, whose output is a view, as those of some libraries."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x.flatten(0, -2), layer.dense()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.layer.dense(), None


class PackedLinear(nn.Linear):
    """int8, with one scale per layer. in_buffers: the layer has no parameter at all."""

    def __init__(self, linear, in_buffers):
        nn.Module.__init__(self)
        self.out_features, self.in_features = linear.weight.shape
        self.scale = linear.weight.detach().abs().max() / 127
        codes = (linear.weight / self.scale).round().to(torch.int8)
        if in_buffers:
            self.register_buffer("codes", codes)
            self.dense_fingerprint = base_fingerprint(linear)["weight"]
        else:
            self.weight = nn.Parameter(codes, requires_grad=False)

    def dense(self):
        return (self.codes if hasattr(self, "codes") else self.weight) * self.scale

    def forward(self, x):
        return Packed.apply(x, self)


def packed_model(in_buffers, **changes):
    model = tiny_model(**changes)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "output":
            model.set_submodule(name, PackedLinear(layer, in_buffers))
    return model


@pytest.mark.parametrize("in_buffers", [False, True])
def test_quantised_layers_train_and_their_adapters_move_to_the_dense_base_and_back(
        tmp_path, in_buffers):
    x = torch.randint(768, (2, 9))
    model = adapted(packed_model(in_buffers))
    model(x).square().mean().backward()
    assert all(p.grad.any() for p in adapter_parameters(model).values())
    save_adapter(model, tmp_path / "packed.pt")
    again = packed_model(in_buffers)
    load_adapter(again, tmp_path / "packed.pt")
    assert torch.equal(again(x), model(x))
    load_adapter(tiny_model(), tmp_path / "packed.pt")
    save_adapter(adapted(tiny_model()), tmp_path / "dense.pt")
    load_adapter(packed_model(in_buffers), tmp_path / "dense.pt")
    for name in ("packed.pt", "dense.pt"):
        with pytest.raises(ValueError, match="another base model"):
            load_adapter(packed_model(in_buffers, seed=1), tmp_path / name)


class PackedTensor(torch.Tensor):
    """A weight of another library, which knows a linear layer's product and little else."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), others=None):
        assert function is not torch.Tensor.flatten, "not implemented"
        return super().__torch_function__(function, types, arguments, others)


def test_an_adapter_over_tensors_of_another_type_is_saved_and_loaded(tmp_path):
    def model(seed=0):
        model = tiny_model(seed)
        for block in model.layers:
            weight = block.feed_forward.w1.weight.detach().as_subclass(PackedTensor)
            block.feed_forward.w1.weight = nn.Parameter(weight, requires_grad=False)
        return model

    save_adapter(adapted(model()), tmp_path / "a.pt")
    load_adapter(model(), tmp_path / "a.pt")
    load_adapter(tiny_model(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="another base model"):
        load_adapter(model(seed=1), tmp_path / "a.pt")


def test_a_layer_that_kept_its_dense_fingerprint_is_compared_by_it(tmp_path):
    save_adapter(adapted(packed_model(True)), tmp_path / "a.pt")
    model = tiny_model()
    with torch.no_grad():
        model.layers[1].attention.wo.weight.mul_(1.1)  # norms and embedding are the same
    with pytest.raises(ValueError, match="layers.1.attention.wo.weight differs"):
        load_adapter(model, tmp_path / "a.pt")


# ---------------------------------------------------------------- saving and loading


def test_state_dict_has_the_bases_names_and_both_spellings_load(model):
    before = model.state_dict()
    adapted(model)
    state = model.state_dict()
    assert state.keys() == before.keys() | adapter_parameters(model).keys()
    assert all(torch.equal(state[name], before[name]) for name in before)
    tiny_model(seed=1).load_state_dict({name: state[name] for name in before})
    for names in (state, dict(model.named_parameters())):  # w1.weight, and w1.base.weight
        other, x = adapted(tiny_model(seed=1)), torch.randint(768, (2, 9))
        other.load_state_dict({name: tensor.detach() for name, tensor in names.items()})
        assert torch.equal(other(x), model(x))
    with pytest.raises(RuntimeError, match="w1.weigth"):
        model.load_state_dict({**state, "layers.0.feed_forward.w1.weigth": torch.zeros(1)})


def test_a_copied_and_a_pickled_model_keep_these_names(model):
    file = io.BytesIO()
    torch.save(adapted(model), file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other.state_dict().keys() == model.state_dict().keys()
        other.load_state_dict(model.state_dict())


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


def test_settings_of_a_single_layer_have_one_place_and_survive_saving_and_loading(
        tmp_path, monkeypatch, model):
    make_layer = hydralora.make_layer

    def more_heads_in_w2(name, base, settings):
        return make_layer(name, base, {**settings, "heads": 4 if name.endswith("w2") else 2})

    monkeypatch.setattr(hydralora, "make_layer", more_heads_in_w2)
    adapted(model, targets=("w1", "w2"), rank=2)
    tokens = torch.tensor([[1, 2, 3]])
    wanted = model(tokens)
    save_adapter(model, tmp_path / "adapter.pt")
    remove_adapters(model)
    load_adapter(model, tmp_path / "adapter.pt")
    assert {len(layer.lora_B) for layer in hydra_layers(model).values()} == {2, 4}
    assert torch.equal(model(tokens), wanted)


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
    with pytest.raises(ValueError, match="another base model"):
        load_adapter(compiled(tiny_model(seed=1)), tmp_path / "a.pt")


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [compiled_whole, compiled_by_block])
def test_a_compiled_model_that_has_run_takes_adapters_and_gives_them_up(compiled, tmp_path):
    save_adapter(adapted(tiny_model()), tmp_path / "a.pt")
    model, plain, x = compiled(tiny_model()), tiny_model(), torch.randint(768, (2, 9))
    base = model(x)
    load_adapter(model, tmp_path / "a.pt")
    load_adapter(plain, tmp_path / "a.pt")
    assert torch.equal(model(x), plain(x)) and not torch.allclose(model(x), base)
    with adapters_disabled(model):
        assert torch.equal(model(x), base)
    remove_adapters(model)
    assert torch.equal(model(x), base)


@pytest.mark.slow
def test_an_exported_layer_computes_the_same():
    layer, x = hydra().eval(), torch.randn(2, 5, 12)
    batch = torch.export.Dim("batch")
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: batch}})
    assert torch.allclose(program.module()(x[:1]), layer(x[:1]), atol=1e-6)


def test_a_base_is_the_same_with_tied_and_untied_weights(tmp_path):
    def model(tied):
        other = tiny_model()
        weight = other.tok_embeddings.weight
        other.output.weight = weight if tied else nn.Parameter(weight.detach().clone())
        return other

    for tied in (True, False):
        save_adapter(adapted(model(tied)), tmp_path / "a.pt")
        load_adapter(model(not tied), tmp_path / "a.pt")
        with pytest.raises(ValueError, match="another base model"):
            load_adapter(tiny_model(), tmp_path / "a.pt")


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
