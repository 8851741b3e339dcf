"""HydraLoRA: one shared A, several B, and a router that mixes them token by token.

Tian et al., NeurIPS 2024, section 3.1 (equation 2) and figure 1(c). Of a frozen linear layer W0 it
makes

    y = W0 x + (alpha / R) * sum_i w_i(x) * B_i A x,      w(x) = softmax(Wr x)

    trainable = add_hydralora(model, targets=("w1", "w2", "w3"), rank=8, heads=3)

The same class is LoRA (heads=1), LoRA (Split) (share_a=False) and the uniform gate.
Shapes: N heads, R rank, I width in, O width out; "..." any leading dimensions (batch, tokens).
"""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from data.files import check_finite, check_tensors, misfits, read_torch, write_file

GATES = ("learned", "uniform")
CONFIG_KEYS = ("targets", "rank", "heads", "alpha", "dropout", "gate", "share_a")


class HydraLinear(nn.Module):
    """y = W0 x + (alpha / R) * sum_i w_i(x) B_i A x around a frozen nn.Linear.

    x is (..., I), y (..., O) in the base's dtype. Adapter and router are fp32 whatever the base
    is; under autocast the products run in its dtype, the softmax always in fp32.
    """

    def __init__(self, base, *, rank=8, heads=3, alpha=32.0, dropout=0.0, gate="learned",
                 share_a=True):
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise ValueError(f"HydraLinear wraps an nn.Linear, not {type(base).__name__}")
        if rank < 1 or heads < 1:
            raise ValueError(f"rank and heads must be at least 1, got {rank} and {heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if not math.isfinite(alpha):
            raise ValueError(f"alpha must be finite, got {alpha}")
        if gate not in GATES:
            raise ValueError(f"gate must be one of {GATES}, got {gate!r}")
        self.base = base.requires_grad_(False)
        self.rank, self.heads, self.scale, self.dropout = rank, heads, alpha / rank, dropout
        self.enabled = True

        def new(*shape):
            return torch.zeros(shape, dtype=torch.float32, device=base.weight.device)

        inputs, outputs = base.in_features, base.out_features
        self.lora_A = nn.Parameter(new(rank, inputs) if share_a else new(heads, rank, inputs))
        # (N, O, R) laid out as (O, N, R), so that [B_1 .. B_N] side by side is a view, not a copy
        self.lora_B = nn.Parameter(new(outputs, heads, rank).transpose(0, 1))
        routed = gate == "learned" and heads > 1
        self.router = nn.Parameter(new(heads, inputs)) if routed else None
        self.reset_parameters()

    def reset_parameters(self):
        """B zero, so that y = W0 x at the start; A and router U(-1/sqrt(I), 1/sqrt(I)).

        The random router is all that tells the heads apart: B gets the first gradients, in
        proportion to the gate. With router and B both zero the heads stay identical for ever.
        """
        bound = self.base.in_features ** -0.5  # Kaiming-uniform with a = sqrt(5)
        nn.init.uniform_(self.lora_A, -bound, bound)
        nn.init.zeros_(self.lora_B)
        if self.router is not None:
            nn.init.uniform_(self.router, -bound, bound)

    def down(self, x):
        """(A x, w(x)): (..., R), or (..., N * R) if A is not shared, and the gate (..., N) in fp32,
        summing to 1. One product for both, so that x is read and its gradient written once."""
        a = self.lora_A.flatten(0, -2)
        if self.router is None:
            return F.linear(x, a), x.new_full((*x.shape[:-1], self.heads), 1 / self.heads,
                                              dtype=torch.float32)
        z, scores = F.linear(x, torch.cat([a, self.router])).split([len(a), self.heads], -1)
        return z, scores.float().softmax(-1)

    def gate_weights(self, x):
        """w(x) (..., N) alone."""
        return self.down(x)[1]

    def forward(self, x):
        y = self.base(x)
        if not self.enabled:
            return y
        device = x.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            x = x.to(self.lora_A.dtype)
        z, w = self.down(x)
        # deviation: dropout on A x, one mask for all heads; the released code drops x, head by head
        z = F.dropout(z, self.dropout, self.training).unflatten(-1, (-1, self.rank))
        # the gate acts in rank space, so that one product with [B_1 .. B_N] serves all heads and
        # nothing of size N * O is ever kept for the backward pass
        u = (self.scale * w[..., None] * z).flatten(-2)  # (..., N * R)
        b = self.lora_B.transpose(0, 1).flatten(1)  # (N, O, R) -> (O, N * R), a view
        y += F.linear(u, b).to(y.dtype)  # in place: nothing else holds the base's output
        return y

    def extra_repr(self):
        return f"rank={self.rank}, heads={self.heads}, scale={self.scale:g}"


def hydra_layers(model):
    """{name: HydraLinear} of the model, in order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, HydraLinear)}


def find_linears(model, targets):
    """{name: every nn.Linear whose last name is exactly one of targets}; raises ValueError for a
    target that matches nothing and for a model that already has adapters."""
    if hydra_layers(model):
        raise ValueError("the model already has adapters")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = {name: m for name, m in linears.items() if name.split(".")[-1] in targets}
    unmatched = set(targets) - {name.split(".")[-1] for name in found}
    if unmatched or not found:
        names = sorted({name.split(".")[-1] for name in linears})
        raise ValueError(f"no linear layer is called {sorted(unmatched)}; there are {names}")
    return found


def add_hydralora(model, *, targets=("w1", "w2", "w3"), rank=8, heads=3, alpha=32.0, dropout=0.0,
                  gate="learned", share_a=True):
    """Freezes the model, wraps every nn.Linear whose last name is exactly one of targets, and
    returns the number of trainable parameters, router included. Raises ValueError for a target
    that matches nothing and for a model that already has adapters."""
    found = find_linears(model, targets)
    config = dict(targets=list(targets), rank=rank, heads=heads, alpha=alpha, dropout=dropout,
                  gate=gate, share_a=share_a)
    settings = {key: value for key, value in config.items() if key != "targets"}
    wrapped = {name: HydraLinear(linear, **settings) for name, linear in found.items()}
    model.requires_grad_(False)
    for name, layer in wrapped.items():
        set_module(model, name, layer)
    model.hydralora_config = config  # what save_adapter writes beside the tensors
    return sum(p.numel() for p in adapter_parameters(model).values())


def set_module(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def adapter_parameters(model):
    """{name: parameter} of every lora_A, lora_B and router: found by type, so none is missed."""
    return {f"{name}.{key}": parameter for name, layer in hydra_layers(model).items()
            for key, parameter in layer.named_parameters(recurse=False)}


@contextmanager
def adapters_disabled(model):
    """Inside, the model is the base model, exactly."""
    before = {layer: layer.enabled for layer in hydra_layers(model).values()}
    for layer in before:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


@contextmanager
def record_gates(model):
    """Yields {layer name: gate (..., N) of the latest forward pass}. The gates are computed again
    by a hook that stands only inside, so ordinary training pays nothing for it."""
    gates = {}

    def hook(name):
        def keep(layer, inputs, _):
            x = inputs[0].detach().to(layer.lora_A.dtype)
            gates[name] = layer.gate_weights(x).detach()
        return keep

    handles = [layer.register_forward_hook(hook(name))
               for name, layer in hydra_layers(model).items()]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------- saving and loading


def base_fingerprint(model):
    """{tensor name: [shape, 16 evenly spaced values]} of the frozen weights: enough to tell two
    models apart, and comparable when one of them was loaded in another dtype."""
    adapter = set(adapter_parameters(model))
    prints = {}
    for name, weight in model.named_parameters():
        if name not in adapter:
            step = max(1, weight.numel() // 16)
            values = weight.detach().flatten()[::step][:16].float().tolist()
            prints[name.replace(".base.", ".")] = [list(weight.shape), values]
    return prints


def same_base(a, b):
    """Whether two fingerprints agree, each value within the rounding of bf16 and fp16."""
    return a.keys() == b.keys() and all(
        a[name][0] == b[name][0] and torch.allclose(
            torch.tensor(a[name][1]), torch.tensor(b[name][1]), rtol=2**-8, atol=1e-7)
        for name in a)


def save_adapter(model, path):
    """Writes the adapter's tensors, its config and the base's fingerprint to one file. Raises
    ValueError, and writes nothing, where a value is not finite."""
    tensors = {name: p.detach().cpu() for name, p in adapter_parameters(model).items()}
    if not tensors:
        raise ValueError("the model has no adapters to save")
    content = {"config": model.hydralora_config, "base": base_fingerprint(model),
               "tensors": tensors}
    check_finite(tensors, path)
    write_file(path, lambda file: torch.save(content, file))


def adapter_shapes(model, *, targets, **settings):
    """{tensor name: shape} that add_hydralora would make, found on the meta device: a config that
    asks for a terabyte costs nothing."""
    def twin(linear):
        shape = dict(in_features=linear.in_features, out_features=linear.out_features)
        return HydraLinear(nn.Linear(**shape, bias=False, device="meta"), **settings)

    return {f"{name}.{key}": parameter.shape
            for name, linear in find_linears(model, targets).items()
            for key, parameter in twin(linear).named_parameters(recurse=False)}


def load_adapter(model, path):
    """Adds the layers that the file's config describes, loads every tensor, returns the config.

    Raises ValueError, with the model as it was, when the file is no adapter, belongs to another
    base model, holds a value that is not finite, or has a tensor missing, extra, renamed or
    mis-shaped.
    """
    if hydra_layers(model):
        raise ValueError("the model already has adapters")
    content = read_torch(path, "an adapter of this project")
    try:
        config, base, tensors = content["config"], content["base"], content["tensors"]
        settings = {key: config[key] for key in CONFIG_KEYS}
        if not isinstance(settings["targets"], list):
            raise ValueError(f"its targets are {type(settings['targets']).__name__}, not a list")
        check_tensors(tensors)
        same = same_base(base, base_fingerprint(model))
        wanted = adapter_shapes(model, **settings) if same else None
    except Exception as error:  # damaged content raises almost anything
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is not an adapter of this project: {reason}") from error
    if not same:
        raise ValueError(f"{path} was trained on another base model than this one: give that one "
                         "as --weights")
    if wrong := misfits(wanted, tensors):
        raise ValueError(f"{path} does not fit its own config: {wrong[:4]} missing, extra or "
                         "mis-shaped")
    check_finite(tensors, path)
    add_hydralora(model, **settings)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_(tensors[name])
    return config
