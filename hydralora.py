"""HydraLoRA: one shared A, several B, and a router that mixes them per token.

Tian et al., NeurIPS 2024, section 3.1 (equation 2), figure 1(c). A frozen W0 becomes

    y = W0 x + (alpha / R) * sum_i w_i(x) * B_i A x,      w(x) = softmax(Wr x)

    trainable = add_hydralora(model, targets=("w1", "w2", "w3"), rank=8, heads=3)

The same class is LoRA (heads=1), LoRA (Split) (share_a=False) and the uniform gate.
Shapes: N heads, R rank, I width in, O width out; "..." as in x: (batch, tokens) or any.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGETS = ("w1", "w2", "w3")  # the default: the feed-forward, as in the released code
GATES = ("learned", "uniform")


@dataclass
class HydraSettings:
    """Adapter hyper-parameters: the single source for the layer, the saved file,
    train.py's flags and the memory estimate."""
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
    """A frozen nn.Linear W0, with A, the B_i and the router Wr. As a loop over heads:

        y, w = W0 @ x, softmax(Wr @ x)
        for i in range(N):
            y += alpha / R * w[i] * (B[i] @ (A @ x))

    x is (..., I), y (..., O) in the base's dtype. A, B, Wr and the softmax are always
    fp32; under autocast the products run in its dtype."""

    def __init__(self, base: nn.Linear, **settings):
        super().__init__()
        self.settings = s = HydraSettings(**settings)
        self.scale = s.alpha / s.rank
        self.base = base.requires_grad_(False)
        # identity; a forward hook on it reads the gate (record_gates), or replaces it
        self.gate_out = nn.Identity()
        width = base.in_features
        fp32 = dict(dtype=torch.float32, device=base.weight.device)

        def random(*shape):  # U(-1/sqrt(I), 1/sqrt(I)), Kaiming-uniform with a = sqrt(5)
            values = torch.empty(shape, **fp32)
            return nn.Parameter(values.uniform_(-width ** -0.5, width ** -0.5))

        self.lora_A = random(s.rank, width) if s.share_a else random(s.heads, s.rank, width)
        # B starts at zero, so only the random router breaks the symmetry between heads:
        # it scales each head's first gradient. With a zero router all heads would stay
        # identical.
        self.lora_B = nn.Parameter(torch.zeros(s.heads, base.out_features, s.rank, **fp32))
        routed = s.gate == "learned" and s.heads > 1
        self.router = random(s.heads, width) if routed else None
        self.train(base.training)  # added to a model in eval mode, it has no dropout

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A x (..., R), or (..., N * R) for N matrices A, and the scores Wr x (..., N);
        without a router zeros, whose softmax is the uniform gate. One product for both,
        so that x is read, and its gradient written, once."""
        a = self.lora_A.flatten(0, -2)
        heads = self.settings.heads
        if self.router is None:
            z = F.linear(x, a)
            scores = x.new_zeros(*x.shape[:-1], heads)
        else:
            both = F.linear(x, torch.cat([a, self.router]))
            z, scores = both.split([len(a), heads], -1)
        # deviation: dropout on A x, one mask for all heads; released code: on x, per head
        return F.dropout(z, self.settings.dropout, self.training), scores

    def gate(self, scores: Tensor) -> Tensor:
        """The heads' weights (..., N) in fp32, summing to 1, from Wr x (..., N)."""
        return scores.float().softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)  # W0 x
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
        # the sum over i: y + s * einsum("...n,nor,...r->...o", w, B, A x), s = alpha / R. In
        # place, since base(x) made y and nothing else reads it: 3 % of a small model's step
        y += F.linear(u, b).to(y.dtype)
        return y


def hydra_layers(model: nn.Module) -> dict[str, HydraLinear]:
    """{name: HydraLinear} of the model, in order, without torch.compile's prefix."""
    return {name.replace("_orig_mod.", ""): m for name, m in model.named_modules()
            if isinstance(m, HydraLinear)}


def new_layers(model, targets, settings, meta=False):
    """{name: HydraLinear} to replace every nn.Linear whose last name is exactly one of
    targets. With meta they are on the meta device, where they take no memory."""
    if hydra_layers(model):
        raise ValueError("the model already has adapters")
    if not targets:
        raise ValueError("targets is empty: name at least one linear layer")
    linears = {name.replace("_orig_mod.", ""): m for name, m in model.named_modules()
               if isinstance(m, nn.Linear)}
    names = {name.split(".")[-1] for name in linears}
    unknown = sorted(set(targets) - names)
    if unknown:
        raise ValueError(f"no linear layer is called {unknown}; there are {sorted(names)}")
    layers = {}
    for name, base in linears.items():
        if name.split(".")[-1] in targets:
            if meta:
                base = nn.Linear(base.in_features, base.out_features, device="meta")
            layers[name] = HydraLinear(base, **settings)
    return layers


def add_hydralora(model: nn.Module, *, targets: Sequence[str] = TARGETS, **settings) -> int:
    """Freezes the model, wraps every nn.Linear whose last name is exactly one of targets,
    and returns the number of trainable parameters, router included. Raises ValueError if
    a target matches nothing or the model already has adapters."""
    layers = new_layers(model, targets, settings)
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    config = asdict(HydraSettings(**settings))
    model.hydralora_config = {"targets": list(targets), **config}
    return sum(p.numel() for p in adapter_parameters(model).values())


def remove_adapters(model: nn.Module) -> None:
    """Puts every base layer back, still frozen. Another adapter can then be added."""
    for name, layer in hydra_layers(model).items():
        model.set_submodule(name, layer.base)
    if hasattr(model, "hydralora_config"):
        del model.hydralora_config


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of every lora_A, lora_B and router of the model."""
    return {f"{name}.{key}": parameter for name, layer in hydra_layers(model).items()
            for key, parameter in layer.named_parameters(recurse=False)}


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context every adapted layer is replaced by its base layer, so outputs
    are exactly the base model's."""
    layers = hydra_layers(model)
    for name, layer in layers.items():
        model.set_submodule(name, layer.base)
    try:
        yield model
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


@contextmanager
def record_gates(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yields {layer name: gate (..., N)} of the latest forward pass: the tensors that
    acted, with their gradient, so that a loss on them can join the training loss."""
    gates = {}

    def record(name, module, inputs, gate):
        gates[name] = gate

    hooks = [layer.gate_out.register_forward_hook(partial(record, name))
             for name, layer in hydra_layers(model).items()]
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()


def base_fingerprint(model: nn.Module) -> dict[str, list]:
    """{tensor name: [shape, 16 evenly spaced values]} of the frozen weights, used to check
    that an adapter is loaded on the base it was trained on."""
    adapter = set(adapter_parameters(model).values())
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "dense_fingerprint"):  # its dense weight's, kept when packing
            found[f"{name}.weight"] = layer.dense_fingerprint
    for name, weight in model.named_parameters():
        if weight not in adapter:
            if hasattr(weight, "full_tensor"):  # a DTensor
                weight = weight.full_tensor()
            values = weight.detach().flatten()[::max(1, weight.numel() // 16)][:16]
            found[name] = [list(weight.shape), values.float().tolist()]
    return {name.replace("_orig_mod.", "").replace(".base.", "."): entry
            for name, entry in found.items()}


def check_adapter(model, config, base, tensors, quantized=None):
    """Raises ValueError unless config adds exactly these tensors to this base model, which
    may have been quantised when the adapter was trained, or be so now."""
    now = base_fingerprint(model)
    same = {name for name, (shape, values) in now.items() if name in base
            and shape == base[name][0] and torch.allclose(  # to the rounding of bf16, fp16
                torch.tensor(values), torch.tensor(base[name][1]), rtol=2**-8, atol=1e-7)}
    other = sorted((base.keys() | now.keys()) - same)
    if other:
        raise ValueError(f"it was trained on another base model ({other[0]} differs): pass "
                         "that model")
    settings = dict(config)
    layers = new_layers(model, settings.pop("targets"), settings, meta=True)
    shapes = {f"{name}.{key}": parameter.shape for name, layer in layers.items()
              for key, parameter in layer.named_parameters(recurse=False)}
    good = {name for name, t in tensors.items() if t.shape == shapes.get(name)
            and t.is_floating_point() and t.layout == torch.strided and t.isfinite().all()}
    wrong = sorted((shapes.keys() | tensors.keys()) - good)
    if wrong:
        raise ValueError("its tensors do not match its config (missing, unexpected, wrong "
                         f"shape or not finite): {', '.join(wrong[:4])}")


def save_adapter(model: nn.Module, file: str | Path | BinaryIO) -> None:
    """Writes config, base_fingerprint and tensors to a path or an open binary file.
    Raises ValueError, with nothing written, without an adapter or if it is not finite."""
    tensors = {name: p.detach().cpu() for name, p in adapter_parameters(model).items()}
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad or not tensors:
        raise ValueError(f"{file}: refusing to save an empty or non-finite adapter: {len(bad)} "
                         f"of {len(tensors)} tensors are not finite {' '.join(bad[:1])}")
    content = {"config": model.hydralora_config, "base": base_fingerprint(model),
               "tensors": tensors}
    if hasattr(model, "quantized"):  # older code refuses the key, so it stands only here
        content["quantized"] = model.quantized
    torch.save(content, file)


def load_adapter(model: nn.Module, path: str | Path) -> dict:
    """Adds the layers that the file's config describes, loads every tensor and returns the
    config. A setting that the file lacks has its default. Raises ValueError, with the
    model as it was, if the file is no adapter or does not fit this model."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        check_adapter(model, **content)
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
