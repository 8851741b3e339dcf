"""The same LLaMA in `transformers`: PEFT's LoRA, and a looped HydraLoRA.

PEFT has no HydraLoRA. LoopedHydra is written here after equation 2 in the shape that
public implementations give it: a Python loop over the heads, in which each head draws a
dropout mask of its own on x, computes A x again and adds its full-width output.
Imported by parts.py when transformers and peft are installed
(requirements-optional.txt).
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from data.corpus import pad
from experiments.steps import ALPHA, CLIP, DROPOUT, LR, Method, precision_of
from tools.hf_layout import tensor_names

FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")  # w1, w3, w2


class LoopedHydra(nn.Module):
    """y = W0 x + (alpha / R) * sum_i w_i(x) * B_i A dropout_i(x), head by head."""

    def __init__(self, base, rank, heads):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = ALPHA / rank
        self.dropout = nn.Dropout(DROPOUT)
        new = dict(bias=False, device=base.weight.device)
        self.lora_A = nn.Linear(base.in_features, rank, **new)
        self.lora_B = nn.ModuleList(nn.Linear(rank, base.out_features, **new)
                                    for _ in range(heads))
        self.router = nn.Linear(base.in_features, heads, **new)
        for b in self.lora_B:
            nn.init.zeros_(b.weight)

    def forward(self, x):
        y = self.base(x)
        w = self.router(x).float().softmax(-1).to(x.dtype)
        for i, b in enumerate(self.lora_B):
            y = y + w[..., i:i + 1] * b(self.lora_A(self.dropout(x))) * self.scale
        return y


def llama(base):
    """transformers' LLaMA on the weights of a Transformer, frozen. Their rows are in
    Meta's order, so only time and memory mean anything."""
    args = base.args
    config = LlamaConfig(
        hidden_size=args.dim, num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads, intermediate_size=args.ffn_dim,
        vocab_size=args.vocab_size, max_position_embeddings=args.max_seq_len,
        rms_norm_eps=args.norm_eps, attn_implementation="sdpa", tie_word_embeddings=False,
        use_cache=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = base.state_dict()
    names = tensor_names(weights)
    model.load_state_dict({names[name]: w for name, w in weights.items()}, assign=True)
    rotary = type(model.model.rotary_emb)(config)  # its table is in no state dict
    model.model.rotary_emb = rotary.to(base.output.weight.device)
    return model.requires_grad_(False).train()


def peft_lora(base, *, rank, checkpoint=False):
    config = LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=DROPOUT, bias="none",
                        target_modules=list(FEED_FORWARD), task_type="CAUSAL_LM")
    return as_method(get_peft_model(llama(base), config), base, checkpoint)


def looped_hydra(base, *, rank, heads, checkpoint=False):
    model = llama(base)
    for layer in model.model.layers:
        for name in FEED_FORWARD:
            linear = getattr(layer.mlp, name)
            setattr(layer.mlp, name, LoopedHydra(linear, rank, heads))
    return as_method(model, base, checkpoint)


def as_method(model, base, checkpoint):
    """With the model's own loss, AdamW fused, the gradient clipped as ours is."""
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    method = Method(model, optimizer)

    def step(batch):
        inputs = padded(batch, base.output.weight.device)
        with precision_of(base):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    method.step = step
    return method


def padded(batch, device):
    """The keyword arguments of a batch as a collator of `transformers` makes them:
    padded on the right, the prompt and the padding without labels, the mask only where
    something is padded. Each sequence has as many positions as in ours: transformers
    shifts the labels itself, so it is given one token less."""
    ids, mask = pad([s.ids[:-1] for s in batch])
    labels = torch.full_like(ids, -100)
    for row, s in enumerate(batch):
        width = len(s.ids) - 1
        start = min(s.response_start, width - 1)  # one target at least
        labels[row, start:width] = ids[row, start:width]
    return dict(input_ids=ids.to(device), labels=labels.to(device),
                attention_mask=None if mask.all() else mask.to(device))
