# %% [markdown]
# # From LoRA to HydraLoRA
#
# You know PyTorch and have never seen LoRA? Scroll down. In about a minute of computing
# you will see why one low-rank update makes tasks interfere, what a shared A and
# several B change, what the router does, and where all of this does not help.
#
# The method is *HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning*
# (Tian et al., NeurIPS 2024). The first seven sections use a single layer and two
# made-up tasks. The eighth tunes a small LLaMA.
#
# This page is made from `docs/tutorial.py`. To run it yourself, install the packages in
# `requirements.txt` and matplotlib, and open it in Jupyter, or run `python -m
# docs.tutorial` in the repository's folder. What you see here is one run, with seed 0
# and torch 2.13, on a core of an AMD EPYC. Yours will differ a little, because every
# kind of processor rounds in its own way.

# %%
import os

if os.path.basename(os.getcwd()) == "docs":  # Jupyter starts in the notebook's folder
    os.chdir("..")

import copy

import torch
import torch.nn.functional as F
from torch import nn

from data import WORLD
from data.corpus import collate, encode_records, length_batches, prompt_text, read_records
from hydralora import HydraLinear, adapters_disabled, add_hydralora, record_gates
from model import FeedForward, ModelArgs, generate_ids, load_llama

# %% [markdown]
# ## 1. A frozen layer, and LoRA
#
# Fine-tuning changes the weights W of every linear layer. LoRA leaves W frozen and
# learns an update beside it. The update is the product of two narrow matrices: A takes
# the input down to a few numbers (the *rank*), and B takes these up again:
#
#     y = W x + scale * B A x
#
# The scale is a fixed number (the paper's alpha, divided by the rank). B starts at zero,
# so at first nothing changes. A starts at random. The smaller the rank, the fewer parameters train.

# %%
torch.manual_seed(0)
WIDTH = 32
RANK = 2
SCALE = 4
frozen = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)


def random_start(*shape):
    return nn.Parameter(torch.empty(shape).uniform_(-WIDTH ** -0.5, WIDTH ** -0.5))


class LoRA(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.A = random_start(rank, WIDTH)
        self.B = nn.Parameter(torch.zeros(WIDTH, rank))

    def forward(self, x):  # (tokens, WIDTH) to (tokens, WIDTH)
        return frozen(x) + SCALE * x @ self.A.T @ self.B.T


def count(layer):
    return sum(p.numel() for p in layer.parameters() if p.requires_grad)


print(f"W has {frozen.weight.numel()} parameters, all frozen")
for rank in (1, 2, 4, 32):
    print(f"LoRA of rank {rank:2}: {count(LoRA(rank)):4} parameters train")

# %% [markdown]
# ## 2. Two tasks that contradict each other
#
# Let a token be 30 random numbers, its *content*, and two numbers that say which task
# it belongs to, blue or orange. These two are the *cue*. Both tasks read the same two
# directions of the content (`same_a`), but do different things with them (`task_b`). So
# for the same content blue wants one update and orange another, at a right angle.
#
# Real corpora are like that: asked for the capital of France, one task wants "Paris",
# another the letter C.
#
# A layer is trained on new random tokens in each of 300 steps. Afterwards we ask which
# share of the wanted update is still missing: 100 % means that nothing was learned, 0 %
# that everything was.

# %%
same_a = torch.randn(1, RANK, WIDTH - 2).expand(2, -1, -1) / (WIDTH - 2) ** 0.5
task_b = 4 * torch.linalg.qr(torch.randn(WIDTH, 2 * RANK)).Q  # at right angles
task_b = task_b.T.reshape(2, RANK, WIDTH).transpose(1, 2)  # (2, WIDTH, RANK): one per task


def with_cue(content, task):
    return torch.cat([content, 2.0 * F.one_hot(task, 2)], dim=1)


def wanted_update(content, task, task_a):
    return (task_b[task] @ task_a[task] @ content[:, :, None])[:, :, 0]  # B A content


def draw_tokens(number, task_a):
    content = torch.randn(number, WIDTH - 2)
    task = torch.randint(2, (number,))
    return with_cue(content, task), wanted_update(content, task, task_a)


# %%
def missing(layer, base=frozen, task_a=same_a, number=4096):
    x, update = draw_tokens(number, task_a)
    with torch.no_grad():
        error = layer(x) - base(x) - update
    return (error.square().sum() / update.square().sum()).item()


def train(layer, base=frozen, task_a=same_a, peak=1e-2, watch=None):
    trained = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    for step in range(300):
        if watch:
            watch(layer)
        for group in optimizer.param_groups:
            group["lr"] = peak * (1 - step / 300)
        x, update = draw_tokens(128, task_a)
        loss = (layer(x) - base(x) - update).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return missing(layer, base, task_a)


loras = {rank: LoRA(rank) for rank in (1, 2, 4, 32)}
lora_missing = {rank: train(layer) for rank, layer in loras.items()}
for rank, share in lora_missing.items():
    print(f"LoRA of rank {rank:2}: {share:.0%} missing")

# %% [markdown]
# From rank 2 on half of the update is missing, and a higher rank does not help, not
# even rank 32, which is as much as a layer of this width can have. The picture shows
# why. The arrows are what the two tasks want for the same content. The marks are what
# was learned: a mark for each cue, in its colour. Whatever the cue says, LoRA gives the
# same answer, so two marks lie upon each other. From rank 2 on it is halfway between what
# the tasks want, their mean; rank 1 does not even reach that.
#
# It has no choice. B A is one matrix for all tokens. The cue can add something to its
# output, but it cannot change what is done with the content.

# %% picture
import matplotlib.pyplot as plt

COLOURS = ("tab:blue", "tab:orange")
content = torch.randn(1, WIDTH - 2).expand(2, -1)
two_tokens = with_cue(content, torch.tensor([0, 1]))  # alike but for the cue
two_updates = wanted_update(content, torch.tensor([0, 1]), same_a)
plane = F.normalize(two_updates).T  # (WIDTH, 2): blue to the right, orange upwards


def draw_answers(axis, layers, title):
    for (right, up), colour in zip((two_updates @ plane).tolist(), COLOURS):
        axis.arrow(0, 0, right, up, color=colour, width=0.12, alpha=0.4,
                   length_includes_head=True)
    for (name, layer), marker in zip(layers.items(), "os^D"):
        with torch.no_grad():
            answer = (layer(two_tokens) - frozen(two_tokens)) @ plane
        for (right, up), colour, size in zip(answer.tolist(), COLOURS, (160, 50)):
            axis.scatter(right, up, size, colour, marker=marker, edgecolors="black", zorder=3)
        axis.scatter([], [], 80, "white", marker=marker, edgecolors="black", label=name)
    axis.set(title=title, aspect="equal", xticks=[], yticks=[], xlabel="what blue wants",
             ylabel="what orange wants")
    axis.margins(0.15)
    axis.legend(loc="upper right")


figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
draw_answers(axis, {f"LoRA of rank {rank}": loras[rank] for rank in (1, 2, 32)},
             "LoRA: one answer to both tasks")
plt.show()

# %% [markdown]
# ## 3. Two LoRAs: by hand, then with a router
#
# The first remedy is a LoRA for each task. If we choose the right one for each token by
# hand, nothing is missing. But who knows the task of a token? So let a *router* choose:
# a third small matrix, whose softmax gives each LoRA a weight. It learns with the rest,
# from the same loss. Nobody tells it what a task is. With the router, the paper calls this
# LoRA (Split). (Each LoRA here adds the frozen layer too. It counts once in the sum, since
# the weights sum to 1.)

# %%
class Split(nn.Module):
    def __init__(self, by_hand):
        super().__init__()
        self.heads = nn.ModuleList([LoRA(RANK), LoRA(RANK)])
        self.router = None if by_hand else random_start(2, WIDTH)

    def gate(self, x):  # the weights of the heads, (tokens, 2), with the sum 1
        if self.router is None:
            return x[:, -2:] / 2  # the cue itself: (1, 0) or (0, 1)
        return (x @ self.router.T).softmax(-1)

    def forward(self, x):
        w = self.gate(x)
        return w[:, :1] * self.heads[0](x) + w[:, 1:] * self.heads[1](x)


split_missing = {by_hand: train(Split(by_hand)) for by_hand in (True, False)}
print(f"two LoRAs, chosen by hand:    {split_missing[True]:.1%} missing")
print(f"two LoRAs, mixed by a router: {split_missing[False]:.1%} missing")

# %% [markdown]
# ## 4. Share A, and it is HydraLoRA
#
# Both tasks read the same two directions of the content, so the two A learn the same
# thing twice. HydraLoRA keeps one A for all, a B for each *head*, and the router:
#
#     y = W x + scale * (w_1 B_1 A x + w_2 B_2 A x),      w = softmax(router x)
#
# Here it is, from the equation. `HydraLinear` of this repository gives the same numbers
# to a millionth. It multiplies A x by the weights before B and not after it, so that
# one matrix product serves all heads.

# %%
class HydraLoRA(nn.Module):
    def __init__(self, rank, heads=2):
        super().__init__()
        self.A = random_start(rank, WIDTH)
        self.B = nn.Parameter(torch.zeros(heads, WIDTH, rank))
        self.router = random_start(heads, WIDTH)

    def forward(self, x):
        y = frozen(x)
        w = (x @ self.router.T).softmax(-1)
        for i in range(len(self.B)):
            y = y + SCALE * w[:, i:i + 1] * (x @ self.A.T @ self.B[i].T)
        return y


hydra = HydraLoRA(RANK)
hydra_missing = train(hydra)
fused = HydraLinear(frozen, rank=RANK, heads=2, alpha=SCALE * RANK)
with torch.no_grad():
    fused.lora_A.copy_(hydra.A)
    fused.lora_B.copy_(hydra.B)
    fused.router.copy_(hydra.router)
    x, _ = draw_tokens(1000, same_a)
    difference = ((fused(x) - hydra(x)).abs().max() / hydra(x).abs().max()).item()
print(f"HydraLoRA: {hydra_missing:.1%} missing")
print("the same numbers as HydraLinear:", difference < 1e-6)

# %% picture
figure, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
draw_answers(axes[0], {"LoRA of rank 4": loras[4]}, "one update: the mean of the tasks")
draw_answers(axes[1], {"HydraLoRA 2 x rank 2": hydra}, "two heads and a router: both tasks")
plt.show()

# %% [markdown]
# What does sharing A save, and what does it cost? It saves most where a layer's input
# is wider than its output, as LLaMA 2 7B shows. It costs where the tasks read different
# things. In the next cell they do (`own_a`), four directions in all, and an A of rank 2
# cannot keep four. HydraLoRA then needs the rank that the tasks need together, and in this
# narrow layer it ends with more parameters than two whole LoRAs.

# %%
for name, shape in {"w1": (4096, 11008), "w2": (11008, 4096)}.items():
    big = nn.Linear(*shape, device="meta")  # without storage
    split = count(HydraLinear(big, heads=3, rank=8, share_a=False))
    shared = count(HydraLinear(big, heads=3, rank=8))
    print(f"{name} of LLaMA 2 7B, 3 heads of rank 8: {split:,} parameters, {shared:,} with one A")

own_a = torch.randn(2, RANK, WIDTH - 2) / (WIDTH - 2) ** 0.5
own_missing = {}
for name, layer in {"LoRA (Split) 2 x rank 2": Split(by_hand=False),
                    "HydraLoRA    2 x rank 2": HydraLoRA(RANK),
                    "HydraLoRA    2 x rank 4": HydraLoRA(2 * RANK)}.items():
    own_missing[name] = train(layer, task_a=own_a)
    print(f"{name}: {count(layer)} parameters, {own_missing[name]:.0%} missing")

# %% [markdown]
# ## 5. Why router and B must not both start at zero
#
# Every B starts at zero, so all heads are alike. If the router started at zero too,
# each head would have the same weight for every token. Equal heads with equal weights
# get equal gradients, so they would stay equal. A router that mixes equal heads changes
# nothing, so it would get no gradient at all. The heads would remain one LoRA for ever.
#
# A random router is what tells the heads apart. It gives each head a slightly different
# share of the first gradient. At first both heads learn what the tasks share and become
# more alike; then the loss pulls them apart.

# %%
def history(layer):
    """What is missing, how alike the heads are, and the first head's weights, by step."""
    rows = []

    def watch(layer):
        x, _ = draw_tokens(512, same_a)
        w = (x @ layer.router.T).softmax(-1).detach()[:, 0]
        first, second = layer.B.detach().flatten(1)
        rows.append({"missing": missing(layer, number=512),
                     "alike": F.cosine_similarity(first, second, dim=0).item(),
                     "first": [w[x[:, -2] > 0], w[x[:, -1] > 0]]})  # blue, orange

    train(layer, watch=watch)
    return rows


zero_router = HydraLoRA(RANK)
nn.init.zeros_(zero_router.router)
starts = {"random": history(HydraLoRA(RANK)), "zero": history(zero_router)}
for name, rows in starts.items():
    print(f"router starts {name}: {rows[-1]['missing']:.0%} missing, cosine of the two B "
          f"{rows[-1]['alike']:.2f}")

# %% picture
figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
for axis, key, title in zip(axes, ("missing", "alike"),
                            ("missing share of the update", "cosine of the two B")):
    for (name, rows), line in zip(starts.items(), ("-", "--")):
        axis.plot([row[key] for row in rows[1:]], line, color="black",
                  label=f"router starts {name}")
    axis.set(title=title, xlabel="step")
    axis.legend()
plt.show()

# %% [markdown]
# ## 6. The router finds the tasks
#
# What does the router do meanwhile? The picture shows the weight of the first head for
# blue tokens and for orange ones. A line is the mean, the band around it holds eight
# tokens of ten. At first the weight depends on everything in a token, and the bands
# overlap. After a hundred steps it depends on the cue alone: one head is for blue, the
# other for orange. It need not come to 0 and 1, since the two B make up for the rest.

# %% picture
figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
for task, name in enumerate(("blue", "orange")):
    weights = [row["first"][task] for row in starts["random"]]
    low = [w.quantile(0.1).item() for w in weights]
    high = [w.quantile(0.9).item() for w in weights]
    axis.plot([w.mean().item() for w in weights], color=COLOURS[task], label=f"{name} tokens")
    axis.fill_between(range(len(weights)), low, high, color=COLOURS[task], alpha=0.2)
axis.set(title="weight of the first head", xlabel="step", ylim=(0, 1))
axis.legend(loc="center right")
plt.show()

# %% [markdown]
# ## 7. Where LoRA is ahead: a SwiGLU
#
# So far HydraLoRA was perfect and LoRA was helpless. But a linear layer alone is not
# what a LLaMA has. Its feed-forward block is a SwiGLU, `W2 (silu(W1 x) * W3 x)`, in
# which one product of x multiplies another. So it has a gate already, and W1 can read
# the cue. Put LoRA into all three matrices, and it can open some units for blue, others
# for orange.
#
# At the same rank HydraLoRA still misses less. But its second B and its router cost
# parameters. LoRA of twice the rank trains just as many, and it is ahead.

# %%
def swiglu(**settings):
    base = FeedForward(ModelArgs(dim=WIDTH, multiple_of=32)).requires_grad_(False)
    for weight in base.parameters():
        nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    layer = copy.deepcopy(base)
    add_hydralora(layer, alpha=SCALE * settings["rank"], **settings)  # in w1, w2 and w3
    return layer, base


swiglu_missing = {}
for name, settings in {"LoRA of rank 2": {"heads": 1, "rank": 2},
                       "HydraLoRA 2 x rank 2": {"heads": 2, "rank": 2},
                       "LoRA of rank 4": {"heads": 1, "rank": 4}}.items():
    torch.manual_seed(0)  # the same SwiGLU for all three
    layer, base = swiglu(**settings)
    swiglu_missing[name] = train(layer, base, peak=2e-2)
    print(f"{name:20}: {count(layer):4} parameters, {swiglu_missing[name]:.0%} missing")

# %% [markdown]
# Keep this in mind when you read that HydraLoRA is ahead, or that it is not: compare it
# with a LoRA that trains as many parameters, and look at which layers they are in.
# `experiments/README.md` does so on whole models, over several seeds.
#
# ## 8. A real model, if a small one
#
# The repository holds a LLaMA of 1.3 million weights and a corpus of ten small tasks.
# The model knows the facts and words that the tasks are made of, but not what is asked
# of it. These are its answers before tuning.

# %%
model, tokenizer = load_llama(WORLD / "base")
questions = read_records(WORLD / "val.jsonl")
chosen = [next(q for q in questions if q["category"] == name)
          for name in ("facts", "classification", "extraction", "ostic", "arithmetic")]


def answers(records):
    ids = [tokenizer.encode(prompt_text(record)) + [tokenizer.eos_id] for record in records]
    return [tokenizer.decode(new) for new in generate_ids(model, tokenizer, ids,
                                                          max_new_tokens=30)]


before = answers(chosen)
for question, answer in zip(chosen, before):
    print(f"{prompt_text(question)}\n    {answer}\n")

# %% [markdown]
# `add_hydralora` freezes the model and wraps its feed-forward layers. The rest is the
# loop that you know. An EOS ends a prompt as well as an answer, which is how the corpus is
# laid out. `collate` turns records into a batch and says at which positions
# the answers' tokens are to be predicted; nothing else counts in the loss. 200 steps
# see an eighth of the corpus. That is enough for most of the answers below. Sums take
# longer.

# %%
def mean_loss(records):  # nats per token of the answers
    batch = collate(records)
    logits = model(batch.tokens).flatten(0, 1)[batch.target_index]
    return F.cross_entropy(logits, batch.labels)


def encode(name):
    return encode_records(read_records(WORLD / name), tokenizer, 256)[0]


@torch.no_grad()
def test_loss(records):
    total = 0.0
    for batch in length_batches(records, 16):
        total += mean_loss(batch).item() * sum(record.n_targets for record in batch)
    return total / sum(record.n_targets for record in records)


known = encode("keep.jsonl")  # what the model knows and the corpus does not ask for
known_before = test_loss(known)
unseen = encode("val.jsonl")[:200]
unseen_before = test_loss(unseen)

torch.manual_seed(0)
print(f"{add_hydralora(model, heads=3, rank=8):,} parameters train")
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
batches = length_batches(encode("train.jsonl"), 8, torch.Generator().manual_seed(0))
for step, batch in enumerate(batches[:200]):
    optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / 200)
    loss = mean_loss(batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 40 == 0 or step == 199:
        print(f"step {step:3}: loss {loss.item():.2f}")
unseen_after = test_loss(unseen)
print(f"loss on records it never saw: {unseen_before:.2f} before, {unseen_after:.2f} after")

# %%
after = answers(chosen)
for question, answer in zip(chosen, after):
    mark = "right" if answer == question["response"] else f"wanted: {question['response']}"
    print(f"{prompt_text(question)}\n    {answer}    ({mark})\n")

# %% [markdown]
# Which head takes which token? Each adapted layer has a router of its own, and there
# are eighteen. The picture shows one of them on two records, prompt and answer. Bright
# is a weight near 1; `▁` is the tokenizer's sign for a space. Unlike in section 6, no head
# belongs to a task. In this layer the first head takes most tokens and the others a few
# each, within one and the same record. Set `layer_name` to another layer and look again.

# %% picture
layer_name = "layers.2.feed_forward.w2"
figure, axes = plt.subplots(2, 1, figsize=(8, 4), layout="constrained")
for axis, record in zip(axes, encode_records(chosen[:2], tokenizer, 256)[0]):
    with torch.no_grad(), record_gates(model) as gates:
        model(torch.tensor([record.ids]))
    image = axis.imshow(gates[layer_name][0].T.numpy(), vmin=0, vmax=1, aspect="auto")
    pieces = [tokenizer.model.id_to_piece(token) for token in record.ids]
    axis.set_xticks(range(len(pieces)), pieces, rotation=90)
    axis.set_yticks(range(3), ["head 1", "head 2", "head 3"])
figure.colorbar(image, ax=axes, label="weight")
figure.suptitle(layer_name)
plt.show()

# %% [markdown]
# ## 9. What tuning took
#
# The model also knew things that the corpus does not ask for. Look at what became of
# them. One of the ten tasks answers questions with the letter of an option, and now the
# model answers with a letter where no options were given. The loss on what it knew rises,
# and neither a low rank nor a router prevents that.

# %%
known_after = test_loss(known)
print(f"loss on what the base knew: {known_before:.2f} before, {known_after:.2f} after\n")
facts = [{"instruction": text, "context": ""} for text in (
    "What kind of animal is the shark?", "What is the opposite of big?",
    "What kind of animal is the parrot?", "What is the symbol of aluminium?")]
with adapters_disabled(model):
    base_facts = answers(facts)
for question, old, new in zip(facts, base_facts, answers(facts)):
    print(f"{question['instruction']:40}{old:12}now: {new}")

# %% [markdown]
# ## 10. Exercises
#
# Solve them in a cell below this one. The solutions run as they stand.
#
# ### 1. One head
#
# Show that HydraLoRA with a single head is LoRA.
#
# <details><summary>Solution</summary>
#
# The softmax of one number is 1, so the router has no effect.
#
# ```python
# one, lora = HydraLoRA(RANK, heads=1), LoRA(RANK)
# nn.init.normal_(one.B)
# with torch.no_grad():
#     lora.A.copy_(one.A)
#     lora.B.copy_(one.B[0])
# x, _ = draw_tokens(100, same_a)
# print((one(x) - lora(x)).abs().max().item())
# ```
# </details>
#
# ### 2. Hide the cue
#
# How much does HydraLoRA miss if its adapter cannot see the cue?
#
# <details><summary>Solution</summary>
#
# Half, as LoRA does. A router cannot tell apart what looks alike.
#
# ```python
# class Blind(HydraLoRA):
#     def forward(self, x):
#         blind = torch.cat([x[:, :-2], torch.zeros(len(x), 2)], dim=1)
#         return super().forward(blind) - frozen(blind) + frozen(x)
#
# blind_missing = train(Blind(RANK))
# print(f"{blind_missing:.0%} missing")
# ```
# </details>
#
# ### 3. No router
#
# Give each head the weight 1/2 (`gate="uniform"`). What are the heads
# after training?
#
# <details><summary>Solution</summary>
#
# They are equal, so this is one LoRA of rank 2, and it misses as much.
#
# ```python
# uniform = HydraLinear(frozen, rank=RANK, heads=2, alpha=SCALE * RANK, gate="uniform")
# uniform_missing = train(uniform)
# print(f"{uniform_missing:.0%} missing", torch.allclose(*uniform.lora_B))
# ```
# </details>
#
# ### 4. Merge it
#
# LoRA can be added to W once and for all: W + scale * B A. Try that
# with HydraLoRA: give every token the mean weights. (`gate_out` of a `HydraLinear`
# takes a forward hook that may replace the weights.)
#
# <details><summary>Solution</summary>
#
# Half is missing: with a constant gate HydraLoRA is LoRA again. Its update depends on
# the token, so it cannot be merged.
#
# ```python
# hook = fused.gate_out.register_forward_hook(
#     lambda module, inputs, w: w.mean(0, keepdim=True).expand_as(w))
# merged_missing = missing(fused)
# hook.remove()
# print(f"{merged_missing:.0%} missing")
# ```
# </details>
#
# ### 5. Is the base still there?
#
# Show that tuning did not change the LLaMA under its
# adapters.
#
# <details><summary>Solution</summary>
#
# Without the adapters it answers as before, word for word.
#
# ```python
# with adapters_disabled(model):
#     print(answers(chosen) == before)
# ```
# </details>
#
# ### Where to go on
#
# `hydralora.py` is the method in one file. `python train.py --heads
# 3 --rank 8` is section 8 in earnest: all records, validation by task, a saved adapter.
