"""HydraLoRA: one shared A, several B, and a router that mixes them per token.

Tian et al., NeurIPS 2024, section 3.1 (equation 2), figure 1(c). A frozen W0 becomes

    y = W0 x + (alpha / R) * sum_i w_i(x) * B_i A x,      w(x) = softmax(Wr x)

    trainable = add_hydralora(model, targets=("w1", "w2", "w3"), rank=8, heads=3)

The same class is LoRA (heads=1), LoRA (Split) (share_a=False) and the uniform gate.
Shapes: N heads, R rank, I width in, O width out; "..." as in x: (batch, tokens) or any.
"""

import math
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGETS = ("w1", "w2", "w3")  # the default: the feed-forward, as in the released code
GATES = ("learned", "uniform")


@dataclass
class HydraSettings:
    """The settings of a layer: what an adapter's file holds, and train.py's flags."""
    rank: int = 8
    heads: int = 3  # number of B matrices; a single one has the weight 1, which is LoRA
    alpha: float = 32.0  # the update is scaled by alpha / rank
    dropout: float = 0.0  # in training only
    gate: str = "learned"  # "uniform": no router, 1 / N for every token
    share_a: bool = True  # False: one A per head, which is LoRA (Split)

    def __post_init__(self):
        if not (self.rank >= 1 and self.heads >= 1 and math.isfinite(self.alpha)
                and 0 <= self.dropout < 1 and self.gate in GATES):
            raise ValueError("rank and heads must be at least 1, alpha finite, dropout must be "
                             f"in [0, 1), gate must be one of {GATES}, got {self}")


class HydraLinear(nn.Module):
    """y = W0 x + (alpha / R) * sum_i w_i(x) * B_i A x of a frozen nn.Linear W0, with
    x (..., I) and y (..., O) in the base's dtype. A, the B_i, the router Wr and the
    softmax are always fp32; under autocast the products run in its dtype."""

    def __init__(self, base: nn.Linear, **settings):
        super().__init__()
        self.settings = s = HydraSettings(**settings)
        self.scale = s.alpha / s.rank
        self.base = base.requires_grad_(False)
        # identity; a forward hook on it reads the gate, as record_gates, or replaces it
        self.gate_out = nn.Identity()
        width = base.in_features
        frozen = [*base.parameters(), *base.buffers()]  # buffers if quantised
        fp32 = dict(dtype=torch.float32, device=frozen[0].device)

        def random(*shape):  # U(-1/sqrt(I), 1/sqrt(I)), Kaiming-uniform with a = sqrt(5)
            values = torch.empty(shape, **fp32)
            return nn.Parameter(values.uniform_(-width ** -0.5, width ** -0.5))

        self.lora_A = random(s.rank, width) if s.share_a else random(s.heads, s.rank, width)
        # B starts at zero, so only the random router breaks the symmetry between heads:
        # it scales each head's first gradient. With a zero router all heads stay equal.
        self.lora_B = nn.Parameter(torch.zeros(s.heads, base.out_features, s.rank, **fp32))
        routed = s.gate == "learned" and s.heads > 1
        self.router = random(s.heads, width) if routed else None
        self.train(base.training)  # added to a model in eval mode, it has no dropout
        self.register_state_dict_post_hook(HydraLinear.hide_base)
        self.register_load_state_dict_pre_hook(HydraLinear.find_base)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A x (..., R), or (..., N * R) for N matrices A, and the scores Wr x (..., N):
        one product, so x is read once. Without a router zeros: their softmax is 1 / N."""
        a = self.lora_A.flatten(0, -2)
        if self.router is None:
            z = F.linear(x, a)
            scores = x.new_zeros(*x.shape[:-1], self.settings.heads)
        else:
            both = F.linear(x, torch.cat([a, self.router]))
            z, scores = both.split([len(a), len(self.router)], -1)
        # deviation: dropout on A x, one mask for all heads; released code: on x, per head
        return F.dropout(z, self.settings.dropout, self.training), scores

    def gate(self, scores: Tensor) -> Tensor:
        """The heads' weights (..., N) in fp32, summing to 1, from Wr x (..., N)."""
        return scores.float().softmax(-1)

    def update(self, x: Tensor) -> Tensor:
        """The update (..., O), to be added to W0 x: fp32, or under autocast its dtype."""
        kind = x.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            x = x.to(self.lora_A.dtype)  # outside autocast an fp32 adapter needs fp32 input
        z, scores = self.project(x)  # A x and Wr x
        w = self.gate_out(self.gate(scores))  # w(x)
        # w acts on A x, before B: one product with [B_1 .. B_N] then serves all heads,
        # and nothing of size N * O per token is kept for the backward pass
        z = z.unflatten(-1, (-1, self.settings.rank))  # (..., 1, R), or (..., N, R)
        u = (self.scale * w[..., None] * z).flatten(-2)  # (alpha / R) w_i A x, (..., N * R)
        b = self.lora_B.transpose(0, 1).flatten(1)  # [B_1 .. B_N], (O, N * R)
        return F.linear(u, b)  # scale * einsum("...n,nor,...r->...o", w, B, A x)

    def forward(self, x: Tensor) -> Tensor:
        if self.lora_A.is_meta and not x.is_meta:
            raise ValueError("the adapter is on the meta device: load the base before adding")
        y = self.base(x)  # W0 x
        return y + self.update(x).to(y.dtype)

    # so the state_dict of a model with adapters still fits the model without them
    def hide_base(self, state, prefix, metadata):
        for name in self.base.state_dict():
            state[prefix + name] = state.pop(f"{prefix}base.{name}")

    def find_base(self, state, prefix, *_):
        for name in self.base.state_dict():
            if prefix + name in state:
                state[f"{prefix}base.{name}"] = state.pop(prefix + name)

    def _apply(self, fn, recurse=True):
        """.to(), .half(), .cuda(): A, B and Wr follow the device, never the dtype."""
        def move(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.base._apply(fn, recurse)
        return super()._apply(move, recurse=False)


def hydra_layers(model: nn.Module) -> dict[str, HydraLinear]:
    """{name: HydraLinear} of the model, in order, without torch.compile's prefix."""
    return {name.replace("_orig_mod.", ""): m for name, m in model.named_modules()
            if isinstance(m, HydraLinear)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of every lora_A, lora_B and router of the model."""
    return {f"{name}.{key}": parameter for name, layer in hydra_layers(model).items()
            for key, parameter in layer.named_parameters(recurse=False)}


def target_layers(model, targets):
    """{name: nn.Linear} of the layers whose last name is exactly one of targets."""
    if hydra_layers(model):
        raise ValueError("the model already has adapters")
    # a parameter may have a target's name, such as fused experts: it is refused below
    parts = [*model.named_modules(), *model.named_parameters()]
    parts = {name.replace("_orig_mod.", ""): part for name, part in parts}
    linears = {name: part for name, part in parts.items() if isinstance(part, nn.Linear)}
    found = [name for name in parts if name.split(".")[-1] in targets]
    wrong = [name for name in found if name not in linears]
    wrong += sorted(set(targets) - {name.split(".")[-1] for name in found})
    if wrong or not targets:
        raise ValueError(f"no linear layer is called {wrong[:3]}; there are "
                         f"{sorted({name.split('.')[-1] for name in linears})}")
    return {name: linears[name] for name in found}


def make_layer(name, base, settings):
    """The one place to let a layer's settings depend on its name."""
    return HydraLinear(base, **settings)


def add_hydralora(model: nn.Module, *, targets=TARGETS, **settings) -> int:
    """Freezes the model, wraps every nn.Linear whose last name is exactly one of targets,
    and returns the number of trainable parameters, router included. Raises ValueError
    for a target that names nothing or another kind of layer, and if there are adapters."""
    layers = {name: make_layer(name, base, settings)
              for name, base in target_layers(model, targets).items()}
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    model.hydralora_config = {"targets": list(targets), **asdict(HydraSettings(**settings))}
    return sum(p.numel() for p in adapter_parameters(model).values())


def remove_adapters(model: nn.Module) -> None:
    """Puts every base layer back, still frozen. Another adapter can then be added."""
    for name, layer in hydra_layers(model).items():
        model.set_submodule(name, layer.base)
    model.__dict__.pop("hydralora_config", None)


@contextmanager
def adapters_disabled(model: nn.Module):
    """Within this context every layer is its base: outputs are exactly the base model's."""
    with ExitStack() as after:
        for name, layer in hydra_layers(model).items():
            model.set_submodule(name, layer.base)
            after.callback(model.set_submodule, name, layer)
        yield model


@contextmanager
def record_gates(model: nn.Module):
    """Yields {layer name: gate (..., N)} of the latest forward pass: the tensors that
    acted, with their gradient, so that a loss on them can join the training loss."""
    gates = {}
    with ExitStack() as hooks:  # removes them at the end
        for name, layer in hydra_layers(model).items():
            def record(module, inputs, gate, name=name):
                gates[name] = gate
            hooks.enter_context(layer.gate_out.register_forward_hook(record))
        yield gates


def base_fingerprint(model: nn.Module) -> dict[str, list]:
    """{tensor name: [shape, 16 evenly spaced values]} of the frozen weights, used to check
    that an adapter is loaded on its base. Packed (quantised) weights are left out."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "dense_fingerprint"):  # its dense weight's, kept when packing
            found[f"{name}.weight"] = layer.dense_fingerprint
    adapter = set(adapter_parameters(model).values())
    for name, weight in model.named_parameters(remove_duplicate=False):  # tied: both names
        if weight.is_meta:
            raise ValueError(f"{name} is on the meta device or offloaded: load it first")
        value = weight.full_tensor() if hasattr(weight, "full_tensor") else weight.data
        packed = type(value) is not Tensor or not value.is_floating_point()
        if weight not in adapter and not packed:
            sample = value.flatten()[::max(1, value.numel() // 16)][:16]
            found[name] = [list(value.shape), sample.float().tolist()]
    return {name.replace("_orig_mod.", "").replace(".base.", "."): entry
            for name, entry in found.items()}


def check_adapter(model, base, tensors, targets, **settings):
    """Raises ValueError unless this is the base and the settings ask for these tensors."""
    now = base_fingerprint(model)
    for name in sorted(base.keys() & now.keys()):  # a packed weight is in one alone
        before, here = torch.tensor(base[name][1]), torch.tensor(now[name][1])
        if not torch.allclose(before, here, rtol=2**-8, atol=1e-7):  # bf16's rounding
            raise ValueError(f"it was trained on another base model ({name} differs)")
    shapes = {}
    for name, layer in target_layers(model, targets).items():
        linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
        twin = make_layer(name, linear, settings)  # takes no memory
        shapes |= {f"{name}.{key}": p.shape for key, p in twin.named_parameters(recurse=False)}
    good = {name for name, t in tensors.items() if t.shape == shapes.get(name)
            and t.is_floating_point() and t.layout == torch.strided
            and t.nbytes <= t.untyped_storage().nbytes() and t.float().isfinite().all()}
    wrong = sorted((shapes.keys() | tensors.keys()) - good)
    if wrong:
        raise ValueError("its tensors do not match its config (missing, unexpected, wrong "
                         f"shape or not finite): {', '.join(wrong[:4])}")


def save_adapter(model: nn.Module, file) -> None:
    """Writes config, base_fingerprint and tensors to a path or an open binary file.
    Raises ValueError, with nothing written, without an adapter or if it is not finite."""
    base = base_fingerprint(model)
    tensors = {name: p.detach().cpu() for name, p in adapter_parameters(model).items()}
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad or not tensors:
        raise ValueError(f"{file}: no adapter to save, or not a finite one {bad[:1]}")
    content = {"config": model.hydralora_config, "base": base, "tensors": tensors}
    if hasattr(model, "quantized"):  # only then: older versions refuse the key
        content["quantized"] = model.quantized
    torch.save(content, file)


def load_adapter(model: nn.Module, path) -> dict:
    """Adds the layers that the file's config describes, loads every tensor and returns the
    config. A setting that the file lacks has its default. Raises ValueError, with the
    model as it was, if the file is no adapter or does not fit this model."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        check_adapter(model, content["base"], content["tensors"], **content["config"])
    except Exception as error:  # a damaged file raises almost anything
        reason = "it holds something else, or is damaged"
        if isinstance(error, (OSError, RuntimeError, ValueError)):
            reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is not an adapter of this project, or not one for this "
                         f"model: {reason}") from error
    add_hydralora(model, **content["config"])
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_(content["tensors"][name])
    return model.hydralora_config
