"""A frozen base in 8 or 4 bits per weight: the idea of QLoRA (Dettmers et al. 2023).

    python train.py --quantize nf4 ...          # the adapters train as they always do

A weight that never trains need not be kept exactly. It is stored as a code, the number
of a level in a short table, and a block of weights shares a scale:

    W[i] ~ level[code[i]] * scale[block of i],      scale = max |W| in the block

int8  a block is a row; 255 levels, evenly spaced from -1 to 1; a byte per code.
nf4   a block is 64 weights; 16 levels, "4-bit NormalFloat"; two codes per byte.

Why these 16 levels (section 3). Trained weights are nearly normal: many close to zero,
few close to the largest. 16 evenly spaced levels would be crowded in the middle, where
4 of them serve half of all weights, and idle at the ends. NormalFloat takes quantiles of
the normal distribution, dense where the weights are: a quantile code, whose levels are
used more alike. Zero is one of them, since a weight of zero must stay zero; that leaves
7 below it and 8 above. Blocks are short because the largest weight sets the scale: an
outlier spoils the 63 weights beside it, not a whole row.

Where the error goes. The layer computes (W + E) x. Of normal weights, E is 9 % with nf4
(10 % with even levels) and 0.8 % with int8. It is no larger in the product: 6 % on
average in the embedded world's base, whose loss moves by 0.8 %. And it is constant. The
adapters learn on top of W + E and correct what matters of it for the task: here, four
fifths of what NF4 costs the base (docs/performance.md). The gradient is exact for the
model that runs: the backward pass uses the same W + E, and no code ever changes, so
nothing has to be differentiated through a rounding.

What it costs. The dense weight is made anew for each product, forward and backward, and
dropped at once: a step takes longer, and one dense weight exists at a time. An nf4
weight takes 4 bits and its share of a scale, 4.25 in all with bf16 scales. QLoRA has
fp32 scales and quantises them in turn, which comes to 4.13; here a scale is itself one
of the weights, so the dtype of the checkpoint holds it exactly.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("int8", "nf4")
BLOCK = 64  # weights that share a scale in nf4
CHUNK = 2**22  # weights that are encoded at a time, to need little memory besides


def add_quantize_flag(parser):
    parser.add_argument("--quantize", choices=("none", *KINDS), help="hold the frozen linear "
                        "layers of the blocks in 8 or 4 bits (as the adapter's or the "
                        "checkpoint's base was, else none)")


def normal_levels() -> Tensor:
    """NF4's 16 levels, rising from -1 to 1: quantiles of the normal distribution, evenly
    spaced in probability on each side of zero and divided by the largest. The outermost
    probability is the mean of what 15 and 16 levels would have, half a step from 1."""
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    below = torch.special.ndtri(torch.linspace(1 - outermost, 0.5, 8, dtype=torch.float64))
    above = torch.special.ndtri(torch.linspace(0.5, outermost, 9, dtype=torch.float64))
    levels = torch.cat([below, above[1:]])  # zero, the last of the 8, is there once
    return (levels / levels[-1]).float()


def encode(blocks: Tensor, levels: Tensor | None) -> tuple[Tensor, Tensor]:
    """(codes, scales) of weights (blocks, weights per block), each by the nearest of 16
    levels, or of int8's 255 without them. Scales are (blocks, 1)."""
    scales = blocks.abs().amax(1, keepdim=True)
    relative = blocks.float() / scales.float()  # NaN in a block of zeros, whose scale is 0
    if levels is None:
        return (127 * relative).round().to(torch.int8), scales
    middles = (levels[1:] + levels[:-1]) / 2  # the nearest level changes there
    codes = torch.bucketize(relative, middles, out_int32=True).to(torch.uint8)
    return codes[:, ::2] * 16 + codes[:, 1::2], scales


class Product(torch.autograd.Function):
    """x W^T of a QuantizedLinear. F.linear on a dense weight would keep that weight until
    the backward pass; this keeps the layer, and makes the weight again."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.weight)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


class QuantizedLinear(nn.Linear):
    """A frozen nn.Linear without bias that holds its weight (O, I) as codes and scales."""

    def __init__(self, weight: Tensor, kind: str):
        nn.Module.__init__(self)  # not nn.Linear's, which makes a dense weight
        self.out_features, self.in_features = weight.shape
        self.kind = kind
        self.bias = None
        size, levels, pairs = self.in_features, None, None
        if kind == "nf4":
            size = BLOCK
            if weight.numel() % size:
                raise ValueError(f"nf4 takes blocks of {size} weights, and a layer of "
                                 f"{self.out_features} x {self.in_features} is no multiple")
            levels = normal_levels().to(weight.device)
            # (256, 2): the two levels that a byte stands for
            pairs = torch.cartesian_prod(levels, levels)
        blocks = weight.detach().reshape(-1, size)
        parts = [encode(part, levels) for part in blocks.split(max(1, CHUNK // size))]
        codes, scales = (torch.cat(part) for part in zip(*parts))
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("pairs", pairs)
        sample = weight.detach().flatten()[::max(1, weight.numel() // 16)][:16].clone()
        self.register_buffer("sample", sample)

    @property
    def weight(self) -> Tensor:
        """The dense weight (O, I), made anew, in the dtype of the scales."""
        if self.kind == "int8":
            dense = self.codes.to(self.scales.dtype).mul_(self.scales / 127)
        else:
            pairs = self.pairs.to(self.scales.dtype)
            dense = F.embedding(self.codes.int(), pairs).flatten(1).mul_(self.scales)
        return dense.view(self.out_features, self.in_features)

    @property
    def dense_fingerprint(self) -> list:
        """What hydralora.base_fingerprint says of the dense weight."""
        return [[self.out_features, self.in_features], self.sample.float().tolist()]

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"


def quantize_on_load(model: nn.Module, copy: bool, *, kind: str) -> Callable:
    """For load_llama: keep(name, tensor), which quantises the weight of a linear layer in
    a block as soon as it is read, and keeps embedding, head and norms as they are."""
    linears = {f"layers.{name}" for name, layer in model.layers.named_modules()
               if isinstance(layer, nn.Linear)}
    model.quantized = kind  # an adapter's file records it

    def keep(name, tensor):
        linear = name.removesuffix(".weight")
        if linear not in linears:
            return {name: tensor}
        layer = QuantizedLinear(tensor, kind)
        model.set_submodule(linear, layer)
        return {f"{linear}.{key}": value for key, value in layer.state_dict().items()}
    return keep


def quantize_blocks(model: nn.Module, kind: str) -> None:
    """Quantises the linear layers in the blocks of a model that is loaded already."""
    keep = quantize_on_load(model, False, kind=kind)
    for name, weight in list(model.named_parameters()):
        keep(name, weight)
