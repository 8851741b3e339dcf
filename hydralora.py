"""HydraLoRA: one shared A, several B, and a router that mixes them token by token.

Tian et al., NeurIPS 2024, section 3.1 (equation 2), figure 1(c). A frozen linear layer W0 becomes

    y = W0 x + (alpha / R) * sum_i w_i(x) * B_i A x,      w(x) = softmax(Wr x)

    trainable = add_hydralora(model, targets=("w1", "w2", "w3"), rank=8, heads=3)

The same class is LoRA (heads=1), LoRA (Split) (share_a=False) and the uniform gate.
Shapes: N heads, R rank, I width in, O width out; "..." any leading dimensions (batch, tokens).
"""

import math
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

TARGETS = ("w1", "w2", "w3")  # adapted by default: the feed-forward, as in the released code
GATES = ("learned", "uniform")


@dataclass
class HydraSettings:
    """What an adapter is, said once: layer, file, train.py and memory sums read these fields."""
    rank: int = 8
    heads: int = 3  # number of B matrices; a single one has the weight 1, which is LoRA
    alpha: float = 32.0  # the update is scaled by alpha / rank
    dropout: float = 0.0  # in training only
    gate: str = "learned"  # "uniform": no router, 1 / N for every token
    share_a: bool = True  # False: an A for every head, which is LoRA (Split)

    def __post_init__(self):
        if not (self.rank >= 1 and self.heads >= 1 and math.isfinite(self.alpha)
                and 0 <= self.dropout < 1 and self.gate in GATES):
            raise ValueError(f"rank and heads must be at least 1, alpha finite, dropout must be in "
                             f"[0, 1), gate must be one of {GATES}, got {self}")


class HydraLinear(nn.Module):
    """A frozen nn.Linear W0, with A, the B_i and the router Wr beside it. As a loop over the heads:

        y, w = W0 @ x, softmax(Wr @ x)
        for i in range(N):
            y += alpha / R * w[i] * (B[i] @ (A @ x))

    x is (..., I), y (..., O) in the base's dtype. A, B, Wr and the softmax are always fp32; under
    autocast the products run in its dtype."""

    def __init__(self, base, **settings):
        super().__init__()
        self.settings = s = HydraSettings(**settings)
        self.base, self.scale = base.requires_grad_(False), s.alpha / s.rank
        self.gate_out = nn.Identity()  # the gate passes through here: record_gates listens to it
        width, fp32 = base.in_features, dict(dtype=torch.float32, device=base.weight.device)

        def random(*shape):  # U(-1/sqrt(I), 1/sqrt(I)), Kaiming-uniform with a = sqrt(5)
            return nn.Parameter(torch.empty(shape, **fp32).uniform_(-width ** -0.5, width ** -0.5))

        self.lora_A = random(s.rank, width) if s.share_a else random(s.heads, s.rank, width)
        # B is zero, so that y = W0 x at the start. Only the random router tells the heads apart: it
        # scales the first gradient of each B. With a router of zeros they would stay alike.
        # (N, O, R) laid out as (O, N, R), so that [B_1 .. B_N] side by side is a view, not a copy
        b = torch.zeros(base.out_features, s.heads, s.rank, **fp32)
        self.lora_B = nn.Parameter(b.transpose(0, 1))
        self.router = random(s.heads, width) if s.gate == "learned" and s.heads > 1 else None

    def project(self, x):
        """A x (..., R), or (..., N * R) for N matrices A, and Wr x (..., N), zero without a router.
        One product for both, so that x is read, and its gradient written, once."""
        a, heads = self.lora_A.flatten(0, -2), self.settings.heads
        if self.router is None:
            z, scores = F.linear(x, a), x.new_zeros(*x.shape[:-1], heads)
        else:
            z, scores = F.linear(x, torch.cat([a, self.router])).split([len(a), heads], -1)
        # deviation: dropout on A x, one mask for all heads; the released code drops x, head by head
        return F.dropout(z, self.settings.dropout, self.training), scores

    def gate(self, scores):
        """The heads' weights (..., N) in fp32, summing to 1, from Wr x (..., N)."""
        return scores.float().softmax(-1)

    def forward(self, x):
        y = self.base(x)  # W0 x
        device = x.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            x = x.to(self.lora_A.dtype)
        z, scores = self.project(x)  # A x and Wr x
        w = self.gate_out(self.gate(scores))  # w(x)
        # w acts on A x, before B: one product with [B_1 .. B_N] then serves all heads, and nothing
        # of size N * O is kept for the backward pass
        z = z.unflatten(-1, (-1, self.settings.rank))  # (..., 1, R), or (..., N, R) for N matrices
        u = (self.scale * w[..., None] * z).flatten(-2)  # (alpha / R) w_i(x) A x, (..., N * R)
        b = self.lora_B.transpose(0, 1).flatten(1)  # [B_1 .. B_N], (O, N * R), a view
        y += F.linear(u, b).to(y.dtype)  # the sum over i; in place, since nothing else holds y
        return y


def hydra_layers(model):
    """{name: HydraLinear} of the model, in order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, HydraLinear)}


def find_linears(model, targets):
    """{name: nn.Linear} of those whose last name is exactly one of targets. ValueError where one of
    them matches nothing, and for a model that already has adapters."""
    if hydra_layers(model):
        raise ValueError("the model already has adapters")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = {name.split(".")[-1] for name in linears}
    if not targets or set(targets) - names:
        raise ValueError(f"no linear layer is called {sorted(set(targets) - names)}; there are "
                         f"{sorted(names)}")
    return {name: m for name, m in linears.items() if name.split(".")[-1] in targets}


def add_hydralora(model, *, targets=TARGETS, **settings):
    """Freezes the model, wraps every nn.Linear whose last name is exactly one of targets, and
    returns the number of trainable parameters, router included. ValueError as in find_linears."""
    layers = {name: HydraLinear(linear, **settings)
              for name, linear in find_linears(model, targets).items()}
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    model.hydralora_config = {"targets": list(targets), **asdict(HydraSettings(**settings))}
    return sum(p.numel() for p in adapter_parameters(model).values())


def adapter_parameters(model):
    """{name: parameter} of every lora_A, lora_B and router: found by type, so none is missed."""
    return {f"{name}.{key}": parameter for name, layer in hydra_layers(model).items()
            for key, parameter in layer.named_parameters(recurse=False)}


@contextmanager
def adapters_disabled(model):
    """Inside, the model is the base model, exactly: each layer gives way to its own base."""
    with ExitStack() as after:
        for name, layer in hydra_layers(model).items():
            model.set_submodule(name, layer.base)
            after.callback(model.set_submodule, name, layer)
        yield model


@contextmanager
def record_gates(model):
    """Yields {layer name: gate (..., N)} of the latest forward pass: the tensors that acted, with
    their gradient, so that a loss on them may join the training loss."""
    gates = {}
    with ExitStack() as after:
        for name, layer in hydra_layers(model).items():
            def keep(_, __, w, name=name):
                gates[name] = w
            after.callback(layer.gate_out.register_forward_hook(keep).remove)
        yield gates


def base_fingerprint(model):
    """{tensor name: [shape, 16 evenly spaced values]} of the frozen weights, to know it by."""
    adapter, found = adapter_parameters(model), {}
    for name, weight in model.named_parameters():
        if name not in adapter:
            weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # a DTensor
            values = weight.detach().flatten()[::max(1, weight.numel() // 16)][:16]
            found[name.replace(".base.", ".")] = [list(weight.shape), values.float().tolist()]
    return found


def save_adapter(model, file):
    """Writes the config, the base's fingerprint and the tensors to a path or an open binary file.
    ValueError, with nothing written, where there is no adapter or a value is not finite."""
    tensors = {name: p.detach().cpu() for name, p in adapter_parameters(model).items()}
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad or not tensors:
        raise ValueError(f"{file}: {len(bad)} of {len(tensors)} tensors hold values that are not "
                         f"finite: {' '.join(bad[:1])}; an adapter needs some, all finite")
    torch.save({"config": model.hydralora_config, "base": base_fingerprint(model),
                "tensors": tensors}, file)


def check_adapter(model, config, base, tensors):
    """ValueError unless these are the tensors that this config adds to this model."""
    now, settings, shapes = base_fingerprint(model), dict(config), {}
    if base.keys() != now.keys() or not all(  # equal within the rounding of bf16 and fp16
            shape == base[name][0] and torch.allclose(
                torch.tensor(values), torch.tensor(base[name][1]), rtol=2**-8, atol=1e-7)
            for name, (shape, values) in now.items()):
        raise ValueError("it was trained on another base model: give that one")
    for name, linear in find_linears(model, settings.pop("targets")).items():
        # on the meta device, where a config that asks for a terabyte costs nothing
        twin = nn.Linear(linear.in_features, linear.out_features, device="meta")
        for key, parameter in HydraLinear(twin, **settings).named_parameters(recurse=False):
            shapes[f"{name}.{key}"] = parameter.shape
    wrong = [name for name in sorted(shapes.keys() | tensors.keys()) if name not in tensors
             or tensors[name].shape != shapes.get(name) or not tensors[name].is_floating_point()
             or tensors[name].layout != torch.strided or not tensors[name].isfinite().all()]
    if wrong := [*({"rank"} - config.keys()), *wrong]:
        raise ValueError("it does not fit its own config: missing, extra or mis-shaped, or not "
                         f"finite, {', '.join(wrong[:4])}")


def load_adapter(model, path):
    """Adds the layers that the file's config describes, loads every tensor, returns the config. A
    setting that the file lacks has its default. ValueError, with the model as it was, when it is no
    adapter, was trained on another base model, or has a tensor missing, extra or damaged."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        check_adapter(model, **content)
    except Exception as error:  # a damaged file raises almost anything
        speaks = isinstance(error, (OSError, RuntimeError, ValueError))
        reason = str(error).split("\n")[0] if speaks else "it holds something else, or is damaged"
        raise ValueError(f"{path} is not an adapter of this project, or not one for this model: "
                         f"{reason}") from error
    add_hydralora(model, **content["config"])
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_(content["tensors"][name])
    return model.hydralora_config
