"""The same LLaMA in `transformers`, to compare with: PEFT's LoRA, and a looped HydraLoRA.

PEFT has no HydraLoRA. LoopedHydra is written here after equation 2 in the shape that public
implementations give it: a Python loop over the heads, in which each head draws a dropout mask of
its own on x, computes A x again and adds its full-width output. Imported by benchmark.py and gpu.py
when transformers and peft are installed (requirements-optional.txt).
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tools.hf_layout import tensor_names

FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")  # w1, w3, w2


class LoopedHydra(nn.Module):
    """y = W0 x + (alpha / R) * sum_i w_i(x) * B_i A dropout_i(x), head by head."""

    def __init__(self, base, rank, heads, alpha, dropout):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.dropout, new = nn.Dropout(dropout), dict(bias=False, device=base.weight.device)
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


def llama(args, base=None):
    """transformers' LLaMA in the shape of our ModelArgs, frozen. With a base, a Transformer, it
    shares its weights; their rows are in Meta's order, so that only time and memory mean anything.
    """
    config = LlamaConfig(
        hidden_size=args.dim, num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads, intermediate_size=args.ffn_dim,
        vocab_size=args.vocab_size, max_position_embeddings=args.max_seq_len,
        rms_norm_eps=args.norm_eps, attn_implementation="sdpa", tie_word_embeddings=False,
        use_cache=False)
    if base is None:
        return LlamaForCausalLM(config).requires_grad_(False).train()
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights, names = base.state_dict(), tensor_names(base.state_dict())
    model.load_state_dict({names[name]: w for name, w in weights.items()}, assign=True)
    rotary = type(model.model.rotary_emb)(config)  # its table is in no state dict
    model.model.rotary_emb = rotary.to(base.output.weight.device)
    return model.requires_grad_(False).train()


def peft_lora(args, *, rank, alpha, dropout, base=None):
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none",
                        target_modules=list(FEED_FORWARD), task_type="CAUSAL_LM")
    return get_peft_model(llama(args, base), config)


def looped_hydra(args, *, rank, heads, alpha, dropout, base=None):
    model = llama(args, base)
    for layer in model.model.layers:
        for name in FEED_FORWARD:
            linear = getattr(layer.mlp, name)
            setattr(layer.mlp, name, LoopedHydra(linear, rank, heads, alpha, dropout))
    return model


def padded(batch):
    """The keyword arguments of a batch as a collator of `transformers` makes them: padded on the
    right, the prompt and the padding without labels, the mask only where something is padded."""
    width = max(len(s.ids) for s in batch)
    ids = torch.tensor([s.ids + [0] * (width - len(s.ids)) for s in batch])
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, s in enumerate(batch):
        labels[row, s.response_start:len(s.ids)] = ids[row, s.response_start:len(s.ids)]
        mask[row, :len(s.ids)] = 1
    return dict(input_ids=ids, labels=labels, attention_mask=None if mask.all() else mask)


def train_step(model, batch, optimizer, clip):
    weight = model.get_input_embeddings().weight
    inputs = {name: value if value is None else value.to(weight.device)
              for name, value in padded(batch).items()}
    with torch.autocast(weight.device.type, torch.bfloat16, enabled=weight.dtype != torch.float32):
        loss = model(**inputs).loss
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_(trained, clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
