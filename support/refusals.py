"""Settings of train.py that cannot be, refused in one line."""

import math

from support.cli import check_min
from support.diagnose import model_length


def refuse_impossible(args, parser):
    """Ends in one line for settings that cannot be, before anything is read."""
    try:
        check_min(args, rank=1, epochs=1, batch_size=1, grad_accum=1, max_seq_len=1, max_steps=0,
                    save_every=0)
    except ValueError as error:
        parser.error(str(error))
    for name in ("lr", "alpha"):
        if not (getattr(args, name) > 0 and math.isfinite(getattr(args, name))):
            parser.error(f"--{name} must be positive and finite, got {getattr(args, name)}")
    refused = {
        f"--seed must be from 0 to 2**32 - 1, got {args.seed}": not 0 <= args.seed < 2**32,
        "--resume goes on with a run and --overwrite deletes it: give one of them":
            args.resume and args.overwrite,
        "--dropout must be at least 0 and below 1": not 0 <= args.dropout < 1,
        "--heads auto needs heads to count: --method full has none":
            args.method == "full" and args.heads == "auto",
        "--dry-run reads no data: --heads auto must be a number":
            args.dry_run and args.heads == "auto",
        "--gpu-memory is a positive number of GiB, and a question to --dry-run":
            args.gpu_memory is not None and not (args.dry_run and args.gpu_memory > 0),
        "--shard-base and --gpus share a base that is frozen: --method full trains it":
            (args.shard_base or args.gpus) and args.method == "full",
        "--gpus is a number of GPUs from 1, and a question to --dry-run":
            args.gpus is not None and not (args.dry_run and args.gpus > 0),
        "--dry-run asks about a shared base by --gpus N, not by --shard-base":
            args.dry_run and args.shard_base,
        f"--gate uniform needs heads to weigh: --method {args.method} has none":
            args.gate == "uniform" and args.method in ("lora", "full")}
    for message, applies in refused.items():
        if applies:
            parser.error(message)


def refuse_misfit(args, model):
    """Raises ValueError for settings that ask for more than the model has."""
    if (args.max_seq_len or 0) > model.args.max_seq_len:
        raise ValueError(f"--max-seq-len {args.max_seq_len} is more than "
                         f"{model_length(args.weights, model.args.max_seq_len)}: give less")
    if args.method != "full" and args.rank > model.args.ffn_dim:
        raise ValueError(f"--rank {args.rank} is more than any layer in {args.weights} is wide "
                         f"({model.args.ffn_dim}): give less")
