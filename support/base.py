"""The base: loaded whole, sharded over processes or quantised, and with its adapter.

    model, tokenizer = load_model("llama-2-7b", device="cuda", dtype=torch.bfloat16)
    model, tokenizer = load_model_and_adapter(weights, adapter, device="cpu", dtype="fp32")

Also the checks that model.py and hydralora.py, which stand alone, cannot make: whether these are
the files that a run recorded, and which context length the model was made for.
"""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from hydralora import HydraSettings, base_fingerprint, load_adapter
from model import load_llama
from support.device import DTYPES
from support.distributed import rank, world_size
from support.files import (
    check_finite,
    digest,
    file_fingerprint,
    read_json,
    read_torch,
    weights_fingerprint,
)
from support.jsonl_resume import remove_partial
from support.quantize import KINDS, quantize_on_load

MANY_SPARE = 0.1  # of an embedding's rows: more than that gets a warning

# ---------------------------------------------------------------- the base


def load_model(directory, *, device="cpu", shard_base=False, quantize=None, **settings):
    """load_llama on the device. With shard_base no process ever holds the whole model; with
    quantize the linear layers of the blocks are quantised as they are read. Raises ValueError if
    a weight is not finite."""
    on_load = None
    if quantize in KINDS:
        if shard_base:
            raise ValueError(f"--shard-base cannot share out a base in {quantize}: give "
                             "--quantize none, or drop --shard-base")
        on_load = partial(quantize_on_load, kind=quantize)
    elif shard_base:
        on_load = fsdp_shard
    model, tokenizer = load_llama(directory, device=device, on_load=on_load, **settings)
    parts = {name: getattr(tensor, "to_local", lambda tensor=tensor: tensor)()
             for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    check_finite(parts, directory)
    if shard_base:
        with torch.no_grad():  # FSDP learns from the first pass which blocks there are: all
            model.hidden_states(torch.zeros(1, 1, dtype=torch.long, device=device))
    return model, tokenizer


def fsdp_shard(model, copy):
    """Shards each block of a model on the meta device over the ranks; embedding, head, last norm
    and the adapters to come stay whole. A block is gathered when it computes, and freed again.
    Returns local_shard(name, tensor), {name: the part that this rank holds}. With copy, a
    whole tensor is not that of a mapped file, and is freed once its part has been copied."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor

    kind = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
    mesh = init_device_mesh(kind, (world_size(),))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    wanted = dict(model.named_parameters())
    whole = {weight for weight in wanted.values() if not isinstance(weight, DTensor)}
    fully_shard(model, mesh=mesh, ignored_params=whole)
    register_fsdp_forward_method(model, "hidden_states")

    def local_shard(name, tensor):
        weight = wanted[name]
        if weight in whole:
            return {name: tensor}
        rows = -(-len(tensor) // world_size())  # the last ranks may have fewer
        part = tensor[rank() * rows:(rank() + 1) * rows]
        return {name: DTensor.from_local(
            part.clone() if copy else part, mesh, weight.placements,
            run_check=False, shape=weight.shape, stride=weight.stride())}
    return local_shard


# ---------------------------------------------------------------- with its adapter


def load_model_and_adapter(weights, adapter, *, device, dtype, max_seq_len=None, shard_base=False,
                           quantize=None):
    """(model in eval mode, with its adapter if one is given; tokenizer). Each is compared with the
    run.json that describes it. weights and adapter are Paths, dtype is a name such as "bf16".
    quantize None: as the adapter's base was."""
    if quantize is None:
        quantize = trained_with(adapter) if adapter else "none"
    model, tokenizer = load_model(weights, device=device, dtype=DTYPES[dtype],
                                  max_seq_len=max_seq_len, shard_base=shard_base,
                                  quantize=quantize)
    if adapter:
        load_adapter_file(model, adapter)
        print_quantize(adapter, quantize)
    warn_of_spare_rows(model, tokenizer, weights)
    check_against_run(weights, adapter)
    return model.eval(), tokenizer


def load_adapter_file(model, path):
    """load_adapter of a file that read_torch, which finds more damage, has read."""
    read_torch(path, "an adapter of this project")
    return load_adapter(model, path)


def check_unchanged(model, digest, weights, partial):
    """Raises ValueError, and removes the answers so far, if the model's weights, which may still be
    the file, are no longer those of base_digest."""
    if base_digest(model) != digest:
        remove_partial(partial)
        raise ValueError(f"the files in {weights} changed while they were used: start again")


def trained_with(adapter):
    """--quantize of the run that an adapter comes from. Reads no tensor."""
    content = read_torch(adapter, "an adapter of this project", mmap=True)
    return content.get("quantized", "none") if isinstance(content, dict) else "none"


def print_quantize(adapter, now):
    """Prints how the base was quantised in training, and how it is now, if it is or was."""
    before = trained_with(adapter)
    if not before == now == "none":
        print(f"{adapter} was trained with --quantize {before}; the base here is loaded with "
              f"--quantize {now}")


def read_adapter_config(path):
    """{"targets": list, and every field of HydraSettings} of an adapter file. Raises ValueError for
    any other file."""
    content = read_torch(path, "an adapter of this project")
    try:
        settings = dict(content["config"])
        targets = list(settings.pop("targets"))
        return {"targets": targets, **asdict(HydraSettings(**settings))}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not an adapter of this project: {error}") from None


def base_digest(model):
    """A short key of a model's frozen weights, and of how they are quantised."""
    quantized = [model.quantized] if hasattr(model, "quantized") else []
    return digest(base_fingerprint(model), *quantized)


# ---------------------------------------------------------------- the run.json beside them


def check_against_run(weights, adapter):
    """Raises ValueError if an adapter, or weights that --method full wrote, are not what the
    run.json beside them records. If only the files of the base differ, prints a warning, since
    load_adapter has compared the values in them."""
    if not adapter:
        if changed_since(weights, lambda: {"tuned": weights_fingerprint(weights)}):
            raise ValueError(f"the weights in {weights} are not those that its run.json describes: "
                             "give the whole folder of one run")
        return
    if adapter.name != "adapter.pt":
        return  # run.json describes no other file
    differ = changed_since(adapter.parent, lambda: {
        "adapter": file_fingerprint(adapter), "weights": weights_fingerprint(weights),
        "tokenizer": file_fingerprint(weights / "tokenizer.model")})
    if set(differ) - {"weights"}:
        raise ValueError(f"{', '.join(differ)}: not what the run.json beside {adapter} records: "
                         "give adapter and weights of one run, or move run.json away")
    if differ:
        print(f"warning: {weights} holds other files than those that {adapter} was trained on, "
              "with the same weights as far as load_adapter compares them")


def changed_since(folder, find):
    """Names of the fingerprints that differ between find(), {name: sha256}, and the run.json in
    the folder. Without a run.json nothing differs, and find is not called."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        return []
    try:
        recorded = dict(read_json(path)["fingerprints"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the run.json of a run ({error}): move it away, or give "
                         "files from a whole run folder") from error
    return [name for name, value in find().items() if recorded.get(name, value) != value]


# ---------------------------------------------------------------- the model's length and vocabulary


def stated_length(weights):
    """max_seq_len of params.json; None if it has none, like Meta's own files."""
    text = (Path(weights) / "params.json").read_text("utf-8")
    return json.loads(text).get("max_seq_len")


def model_length(weights, length):
    """A model's context length in words: its own, or a default and how to change it."""
    if stated_length(weights):
        return f"the {length} of the model in {weights}"
    return (f"{length}, a default, since {weights}/params.json has no max_seq_len (add it if the "
            "model was made for another length; LLaMA 1: 2048, CodeLlama: 16384)")


def print_default_length(weights, length, asked=None):
    """Prints a line if the length is neither the model's own nor asked for."""
    if not asked and not stated_length(weights):
        print(f"prompts may have {model_length(weights, length)}")


def warn_of_spare_rows(model, tokenizer, folder):
    """Prints a warning if so many rows of the embedding have no piece that the
    tokenizer is likely another model's. Such rows are allowed and never sampled."""
    spare = model.args.vocab_size - tokenizer.vocab_size
    if spare > MANY_SPARE * model.args.vocab_size:
        print(f"warning: {spare} of the embedding's {model.args.vocab_size} rows have no piece in "
              f"{folder}/tokenizer.model: is it this model's own?")
