"""model.py: every formula against a twin written with loops, loading, generation."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from model import (
    SPLIT_DIM,
    Attention,
    FeedForward,
    ModelArgs,
    RMSNorm,
    Tokenizer,
    Transformer,
    apply_rotary,
    generate,
    generate_ids,
    load_llama,
    rotary_table,
    save_llama,
)
from tests.conftest import WORLD, asset, tiny_args, tiny_model

TOKENIZER = WORLD / "base" / "tokenizer.model"


def tokens(*shape, seed=0):
    return torch.randint(3, 768, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the pieces


def test_rms_norm_equals_its_loop_twin():
    norm = RMSNorm(6, eps=1e-5)
    norm.weight.data = torch.rand(6) + 0.5
    x = torch.randn(4, 6)
    for row, got in zip(x, norm(x)):
        scale = 1 / math.sqrt(sum(v.item() ** 2 for v in row) / 6 + 1e-5)
        want = [v.item() * scale * w.item() for v, w in zip(row, norm.weight)]
        assert got.tolist() == pytest.approx(want, rel=1e-5)


def test_rms_norm_divides_in_fp32_whatever_the_dtype():
    norm = RMSNorm(64, eps=1e-5).half()
    x = torch.full((1, 64), 3e4, dtype=torch.float16)  # its square overflows fp16
    assert torch.equal(norm(x), torch.ones(1, 64, dtype=torch.float16))


def test_rotary_turns_neighbouring_pairs_by_position_times_frequency():
    x = torch.randn(1, 5, 2, 6)
    got = apply_rotary(x, rotary_table(torch.arange(5)[None], 6, 10000.0))
    for t in range(5):
        for head in range(2):
            for pair in range(3):
                a, b = x[0, t, head, 2 * pair].item(), x[0, t, head, 2 * pair + 1].item()
                turned = complex(a, b) * complex(math.cos(t * 10000 ** (-2 * pair / 6)),
                                                 math.sin(t * 10000 ** (-2 * pair / 6)))
                assert got[0, t, head, 2 * pair].item() == pytest.approx(turned.real, abs=1e-5)
                assert got[0, t, head, 2 * pair + 1].item() == pytest.approx(turned.imag, abs=1e-5)


def test_rotary_turns_in_fp32_and_the_gradient_back():
    x = torch.rand(2, 300, 3, 16).bfloat16().requires_grad_()
    positions = torch.stack([torch.arange(300), torch.arange(300, 600)])
    table = rotary_table(positions, 16, 10000.0)
    got = apply_rotary(x, table)
    assert torch.equal(got, apply_rotary(x.float(), table).bfloat16())
    got.backward(gradient=x.detach())
    assert torch.equal(x.grad, apply_rotary(x.float(), table.conj()).bfloat16())


def test_grouped_query_attention_equals_its_loop_twin():
    args = tiny_args()
    attention, x = Attention(args), torch.randn(1, 6, args.dim)
    table = rotary_table(torch.arange(6)[None], 8, args.rope_theta)
    got = attention(x, table)[0]
    q = apply_rotary(attention.wq(x).view(1, 6, 4, 8), table)[0]
    k = apply_rotary(attention.wk(x).view(1, 6, 2, 8), table)[0]
    v = attention.wv(x).view(6, 2, 8)
    rows = []
    for t in range(6):
        heads = []
        for head in range(4):
            group = head // 2  # two query heads share a key/value head
            scores = torch.stack([q[t, head] @ k[s, group] / math.sqrt(8) for s in range(t + 1)])
            weights = scores.softmax(0)
            heads.append(sum(weights[s] * v[s, group] for s in range(t + 1)))
        rows.append(attention.wo(torch.cat(heads)))
    assert torch.allclose(got, torch.stack(rows), atol=1e-5)


def test_swiglu_equals_its_loop_twin():
    args = tiny_args()
    layer, x = FeedForward(args), torch.randn(args.dim)
    hidden = []
    for gate, up in zip(layer.w1.weight, layer.w3.weight):
        g, u = (gate @ x).item(), (up @ x).item()
        hidden.append(g / (1 + math.exp(-g)) * u)
    want = [sum(w.item() * h for w, h in zip(row, hidden)) for row in layer.w2.weight]
    assert layer(x).tolist() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("args, width", [
    (ModelArgs(), 11008),  # 7B
    (ModelArgs(dim=5120), 13824),  # 13B
    (ModelArgs(dim=8192, ffn_dim_multiplier=1.3, multiple_of=4096), 28672),  # 70B
])
def test_feed_forward_width_is_llama_2s(args, width):
    assert args.ffn_dim == width


# ---------------------------------------------------------------- the whole


def test_a_token_never_sees_what_comes_after_it(model):
    a = tokens(1, 10)
    b = a.clone()
    b[0, 6:] = tokens(1, 4, seed=1)
    x, y = model(a), model(b)
    assert torch.equal(x[:, :6], y[:, :6]) and not torch.allclose(x[:, 6], y[:, 6])


def test_padding_and_the_rest_of_the_batch_change_nothing(model):
    a, b = tokens(1, 7), tokens(1, 12, seed=1)
    batch = torch.zeros(2, 12, dtype=torch.long)
    batch[0, :7], batch[1] = a[0], b[0]
    out = model(batch)
    assert torch.allclose(out[0, :7], model(a)[0], atol=1e-4)
    assert torch.allclose(out[1], model(b)[0], atol=1e-4)


def test_tokens_beyond_the_context_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="129 tokens do not fit max_seq_len 128"):
        model(tokens(1, 129))
    with pytest.raises(ValueError, match="do not fit max_seq_len"):
        generate(model, tokenizer, ["the"], max_new_tokens=128)


# ---------------------------------------------------------------- Meta's layout


def write_shards(model, folder, cuts):
    """Splits a model as Meta's model-parallel code does; cuts are the shares of the shards."""
    folder.mkdir()
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 8,
              "norm_eps": 1e-5, "vocab_size": -1, "max_seq_len": 128}
    (folder / "params.json").write_text(json.dumps(params))
    shards = [{"rope.freqs": torch.zeros(4)} for _ in cuts]
    for name, weight in model.state_dict().items():
        dim = SPLIT_DIM.get(name.split(".")[-2])
        sizes = [weight.shape[dim or 0] * cut // sum(cuts) for cut in cuts]
        parts = [weight] * len(cuts) if dim is None else weight.split(sizes, dim)
        for shard, part in zip(shards, parts):
            shard[name] = part.clone()
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i:02d}.pth")
    return folder


@pytest.mark.parametrize("cuts", [[1], [1, 1], [1, 1, 1, 1], [1] * 8, [1, 3]], ids=str)
def test_any_number_of_shards_gives_the_same_logits(model, tmp_path, cuts):
    loaded, tokenizer = load_llama(write_shards(model, tmp_path / "w", cuts))
    assert torch.equal(loaded(tokens(2, 9)), model(tokens(2, 9)))
    assert tokenizer.vocab_size == loaded.args.vocab_size == 768
    assert all(p.requires_grad for p in loaded.parameters())


def test_a_saved_model_loads_back_bit_for_bit(model, tmp_path):
    save_llama(model, TOKENIZER, tmp_path / "w")
    loaded, _ = load_llama(str(tmp_path / "w"))
    assert loaded.args == model.args
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))


def test_the_files_dtype_is_kept_unless_another_is_asked_for(model, tmp_path):
    save_llama(model, TOKENIZER, tmp_path / "w", dtype=torch.bfloat16)
    assert {p.dtype for p in load_llama(tmp_path / "w")[0].parameters()} == {torch.bfloat16}
    loaded, _ = load_llama(tmp_path / "w", dtype=torch.float16)
    assert {p.dtype for p in loaded.parameters()} == {torch.float16}


def test_max_seq_len_is_the_argument_else_the_file_s_else_4096(model, tmp_path):
    folder = write_shards(model, tmp_path / "w", [1])
    assert load_llama(folder)[0].args.max_seq_len == 128
    assert load_llama(folder, max_seq_len=64)[0].args.max_seq_len == 64
    params = json.loads((folder / "params.json").read_text())
    del params["max_seq_len"]
    (folder / "params.json").write_text(json.dumps(params))
    assert load_llama(folder)[0].args.max_seq_len == 4096


def rewrite(folder, change):
    path = folder / "consolidated.00.pth"
    shard = torch.load(path, weights_only=True)
    change(shard)
    torch.save(shard, path)


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("layers.1.attention.wq.weight"), r"missing \['layers.1.attention.wq.weight"),
    (lambda s: s.update({"layers.9.attention.wq.weight": torch.zeros(1)}), "extra .*layers.9"),
    (lambda s: s.update({"norm.weight": torch.ones(31)}), r"norm.weight .* is \(31,\)"),
    (lambda s: s.update({"lm_head.weight": s.pop("output.weight")}), "missing .*output.weight"),
    (lambda s: s.pop("tok_embeddings.weight"), "missing .*tok_embeddings.weight"),
])
def test_missing_extra_renamed_and_misshaped_tensors_are_refused(model, tmp_path, change, message):
    folder = write_shards(model, tmp_path / "w", [1])
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        load_llama(folder)


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "params.json").unlink(), "no params.json"),
    (lambda f: (f / "params.json").write_text("{"), "not a JSON object"),
    (lambda f: (f / "params.json").write_text('{"use_scaled_rope": true}'), "use_scaled_rope"),
    (lambda f: (f / "consolidated.00.pth").unlink(), r"found \['consolidated.01.pth'\]"),
    (lambda f: (f / "consolidated.01.pth").write_bytes(b"PK"), "not a whole PyTorch checkpoint"),
    (lambda f: (f / "tokenizer.model").unlink(), "no tokenizer"),
    (lambda f: (f / "tokenizer.model").write_text("x"), "not a sentencepiece model"),
])
def test_a_damaged_folder_is_refused_with_what_was_found(model, tmp_path, damage, message):
    folder = write_shards(model, tmp_path / "w", [1, 1])
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_llama(folder)


def test_a_tokenizer_with_more_pieces_than_the_embedding_has_rows_is_refused(tmp_path):
    folder = write_shards(tiny_model(vocab_size=700), tmp_path / "w", [1])
    with pytest.raises(ValueError, match="768 pieces, the embedding 700 rows"):
        load_llama(folder)


@pytest.mark.parametrize("spare", [0, 2, 1000, 5000])
def test_rows_without_a_piece_are_allowed_in_any_number_and_never_drawn(tmp_path, tokenizer, spare):
    big = tiny_model(vocab_size=768 + spare)
    with torch.no_grad():  # the rows without a piece would win every time
        big.output.weight[768:] = 9 * big.output.weight[300]
    folder = write_shards(big, tmp_path / "w", [1, 1])
    loaded, tokenizer = load_llama(folder)
    for sampling in ({}, {"temperature": 5.0}, {"temperature": 1.0, "top_p": 0.5}):
        for row in generate_ids(loaded, tokenizer, [[1], [1, 300]], max_new_tokens=12, **sampling):
            assert all(token < 768 for token in row)
    assert len(generate(loaded, tokenizer, ["the"], max_new_tokens=5)) == 1


def test_ids_beyond_the_pieces_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("a cat")
    assert tokenizer.decode([*ids[:2], 768, *ids[2:], 99999]) == "a cat"
    assert max(tokenizer.encode("<|im_end|> [PAD]")) < tokenizer.vocab_size


@pytest.mark.parametrize("name", ["rope.freqs", "layers.1.attention.inner_attention.rope.freqs",
                                  "layers.0.attention.rope.freqs"])
def test_every_spelling_of_rope_freqs_is_dropped_by_name(model, tmp_path, name):
    folder = write_shards(model, tmp_path / "w", [1])
    rewrite(folder, lambda s: s.update({name: torch.ones(4, dtype=torch.bfloat16)}))
    assert torch.equal(load_llama(folder)[0](tokens(1, 5)), model(tokens(1, 5)))


@pytest.mark.parametrize("key, value, message", [
    ("max_batch_size", 32, None), ("n_kv_heads", 2, None), ("ffn_dim_multiplier", None, None),
    ("use_scaled_rope", True, "does not know: .*use_scaled_rope"),
    ("head_dim", 16, "does not know: .*head_dim"),
    ("n_layers", 2.5, "n_layers must be a whole number"),
    ("n_heads", None, "n_heads must be a whole number"), ("max_seq_len", -1, "max_seq_len must be"),
    ("dim", True, "dim must be a whole number .*found true"),
    ("ffn_dim_multiplier", 0, "ffn_dim_multiplier must be a number above 0")])
def test_params_that_would_change_the_model_or_that_no_llama_has_are_refused(
        model, tmp_path, key, value, message):
    folder = write_shards(model, tmp_path / "w", [1])
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**params, key: value}))
    if message is None:
        assert torch.equal(load_llama(folder)[0](tokens(1, 5)), model(tokens(1, 5)))
    else:
        with pytest.raises(ValueError, match=message):
            load_llama(folder)


@pytest.mark.parametrize("name, content", [
    ("consolidated.00.pth", b""), ("consolidated.00.pth", b"PK"), ("tokenizer.model", b"x"),
    ("consolidated.00.pth", b"version https://git-lfs.github.com/spec/v1\n")])
def test_no_librarys_text_is_passed_on(model, tmp_path, name, content):
    folder = write_shards(model, tmp_path / "w", [1])
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        load_llama(folder)
    assert not re.search("torch.save|torch.load|weights_only|mmap|INTERNAL|ModelProto|Stream",
                         str(refusal.value))


def test_a_single_shard_is_memory_mapped_not_copied(model, tmp_path):
    folder = write_shards(model, tmp_path / "w", [1])
    loaded, _ = load_llama(folder)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux tells what a process has mapped")
    assert str(folder / "consolidated.00.pth") in maps.read_text()
    assert torch.equal(loaded.output.weight, model.output.weight)


# ---------------------------------------------------------------- tokenizer and generation


TEXTS = ["plain text", " leading and  double spaces ", "emoji 😀🎉 and 中文字符",
         "def f(x):\n\treturn {x: [1, 2]}  # código\n", "", "\n\n", "1234567890", "</s><s>[INST]"]


@pytest.mark.parametrize("name", ["world", "llama-tokenizer/tokenizer.model"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding_and_decoding(tokenizer, text, name):
    if name != "world":
        tokenizer = Tokenizer(asset(name))
        assert tokenizer.vocab_size == 32000
    assert tokenizer.decode(tokenizer.encode(text, eos=True)) == text


def test_bos_and_eos_are_added_if_asked_for(tokenizer):
    bare = tokenizer.encode("cat", bos=False)
    assert tokenizer.encode("cat") == [tokenizer.bos_id] + bare
    assert tokenizer.encode("cat", bos=False, eos=True) == bare + [tokenizer.eos_id]


def test_stories260k_tells_its_story_character_for_character():
    folder = asset("stories260k")
    model, tokenizer = load_llama(folder)
    want = (folder / "expected_greedy.txt").read_text(encoding="utf-8")
    count = len(tokenizer.encode(want, bos=False))
    assert generate(model, tokenizer, [""], max_new_tokens=count) == [want]


def slow_greedy(model, tokenizer, prompt, count):
    """No cache, one prompt, the whole sequence at every step."""
    ids = tokenizer.encode(prompt)
    start = len(ids)
    for _ in range(count):
        token = model(torch.tensor([ids]))[0, -1].argmax().item()
        if token == tokenizer.eos_id:
            break
        ids.append(token)
    return tokenizer.decode(ids)[len(tokenizer.decode(ids[:start])):]


PROMPTS = ["", "the old cook", "What is the capital of France?", "one two three four five six"]


@torch.no_grad()
def test_cached_and_batched_generation_equals_uncached_one_by_one(model, tokenizer):
    want = [slow_greedy(model, tokenizer, prompt, 20) for prompt in PROMPTS]
    assert generate(model, tokenizer, [], max_new_tokens=20) == []
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=20) == want
    assert [generate(model, tokenizer, [p], max_new_tokens=20)[0] for p in PROMPTS] == want


def test_generation_stops_at_eos_and_leaves_it_out(model, tokenizer):
    with torch.no_grad():
        token = model(torch.tensor([tokenizer.encode("the")]))[0, -1].argmax().item()
        first = tokenizer.decode(tokenizer.encode("the") + [token])[3:]
        tokenizer_like = Tokenizer(TOKENIZER)
        assert generate(model, tokenizer_like, ["the"], max_new_tokens=1) == [first]
        tokenizer_like.eos_id = token
        assert generate(model, tokenizer_like, ["the"], max_new_tokens=5) == [""]


def test_a_completion_continues_its_prompt_with_the_space_between():
    folder = asset("stories260k")
    model, tokenizer = load_llama(folder)
    story = (folder / "expected_greedy.txt").read_text(encoding="utf-8")
    for prompt in ("Once upon a time,", "Once upon a"):  # the cut falls before a space
        completion, = generate(model, tokenizer, [prompt], max_new_tokens=12)
        assert story.startswith(prompt + completion) and completion.startswith(" ")


def test_sampling_repeats_with_its_seed_and_does_not_depend_on_the_batch(model, tokenizer):
    def draw(prompts, seed):
        return generate(model, tokenizer, prompts, max_new_tokens=12, temperature=1.0, top_p=0.9,
                        seed=seed)

    assert draw(PROMPTS, 1) == draw(PROMPTS, 1) != draw(PROMPTS, 2)
    assert draw(PROMPTS[2:3], 1) == draw(PROMPTS, 1)[2:3]


def test_a_tiny_top_p_is_greedy(model, tokenizer):
    greedy = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=2.0,
                    top_p=1e-6) == greedy


def test_llama_2_7b_and_70b_have_metas_parameter_counts():
    with torch.device("meta"):
        seven = Transformer(ModelArgs(vocab_size=32000))
        seventy = Transformer(ModelArgs(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8,
                                        vocab_size=32000, ffn_dim_multiplier=1.3, multiple_of=4096))
    assert sum(p.numel() for p in seven.parameters()) == 6_738_415_616
    assert sum(p.numel() for p in seventy.parameters()) == 68_976_648_192
