"""What the GPU path does on a card, measured by one command of at most ten minutes.

    python -m experiments.gpu                          # writes experiments/results/gpu.json, gpu.md
    python -m experiments.gpu --device cpu --tiny      # all of it in small, to see that it runs

Needs a CUDA card, torch 2.10 or newer, and no weights or data: the models are random
and made on the card. Each part (experiments/parts.py) runs in a process of its own
under its own limit of time. Every figure is written as it comes, so a part that fails
or runs out of time or memory takes nothing with it; what was left out is named with the
reason. transformers and peft are compared with when they are installed.
"""

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from experiments import parts
from experiments.report import markdown
from support.cli import Parser, one_line, run_script
from support.device import pick_device
from support.files import read_json, write_json, write_text
from support.lock import file_lock

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600  # seconds of all parts together
# part: (seconds that it may take, what it measures), in the order in which they run
PARTS = {"step": (150, "a step of 7B's shape: ours, the floor, the known frameworks"),
         "memory": (90, "the measured peak against --dry-run's sum"),
         "commands": (130, "the main command, MMLU, k-means"),
         "growth": (90, "how the cost grows with heads, rank and length"),
         "profile": (140, "where a step's time goes, and torch.compile")}
PACKAGES = ("torch", "transformers", "peft", "numpy", "sentencepiece")

# ---------------------------------------------------------------- what is written


def load_results(out):
    path = out / "gpu.json"
    return read_json(path) if path.exists() else {"conditions": {}, "parts": {}}


def save_results(out, results):
    write_json(out / "gpu.json", results)
    write_text(out / "gpu.md", as_markdown(results))


def as_markdown(content):
    """gpu.md: the conditions, then each part with its status, tables and notes."""
    lines = ["# The GPU path, measured", "",
             markdown(["what", "value"], content["conditions"].items())]
    for name in (name for name in PARTS if name in content["parts"]):
        part = content["parts"][name]
        lines += ["", f"## {name}: {PARTS[name][1]}", "", f"{part['status']}"]
        for title, rows in part["tables"].items():
            header = list(dict.fromkeys(key for row in rows for key in row))
            cells = [[parts.show(row.get(key)) for key in header] for row in rows]
            lines += ["", f"**{title}**", "", markdown(header, cells)]
        lines += ["", *(f"- {note}" for note in part["notes"])] if part["notes"] else []
    return "\n".join(lines) + "\n"


def driver():
    """The driver's version, as nvidia-smi prints it."""
    program = shutil.which("nvidia-smi")
    if not program:
        return "unknown"
    done = subprocess.run([program, "--query-gpu=driver_version", "--format=csv,noheader"],
                          capture_output=True, text=True, timeout=30)
    return one_line(done.stdout.split("\n")[0]) or "unknown"


def conditions(device, tiny):
    """Card, driver, versions, day: what the figures depend on."""
    found = {"command": f"python -m experiments.gpu --device {device}" + " --tiny" * tiny,
             "size": "tiny: it runs, and no figure means anything" if tiny else "whole",
             "day": datetime.date.today().isoformat(), "device": device}
    if device.startswith("cuda"):
        card = torch.cuda.get_device_properties(device)
        found |= {"card": card.name, "memory": f"{card.total_memory / 2**30:.1f} GiB",
                  "capability": f"{card.major}.{card.minor}", "driver": driver(),
                  "CUDA of torch": torch.version.cuda}
    found |= {"python": platform.python_version(), "system": platform.system()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


# ---------------------------------------------------------------- the run


def run_part(part, out, device, tiny):
    """One part in this process. Raises ValueError if its device cannot be used."""
    device = pick_device(device)
    if ":" in device:  # cuda:1 is then what is waited for
        torch.cuda.set_device(device)
    results = load_results(out)
    results["conditions"] = conditions(device, tiny)

    def save(content):
        results["parts"][part] = content
        save_results(out, results)

    report = parts.Report(save)
    save(report.content)
    scale = parts.TINY if tiny else parts.FULL
    started = time.perf_counter()
    parts.attempt(report, part, partial(parts.MEASURES[part], report, scale, device))
    report.content["status"] = f"done, {time.perf_counter() - started:.0f} s"
    save(report.content)


def run_apart(part, out, device, tiny, limit):
    """One part in a process of its own, ended after `limit` seconds. Returns None, or
    why it did not finish."""
    command = [sys.executable, "-m", "experiments.gpu", "--part", part, "--device", device,
               "--out", str(out.resolve()), *["--tiny"] * tiny]
    # a file and no pipe: what a killed process has started may hold a pipe open
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        try:
            status = subprocess.run(command, cwd=ROOT, stderr=errors, timeout=limit,
                                    env={**os.environ, "PYTHONUNBUFFERED": "1"}).returncode
        except subprocess.TimeoutExpired:
            return f"stopped at its limit of {limit:.0f} s; what it had measured appears here"
        errors.seek(0)
        lines = [line for line in errors.read().split("\n") if line.strip()]
    if status:
        return f"FAILED with status {status}: {one_line(lines[-1] if lines else 'no message')}"
    return None


def run_parts(out, device, tiny):
    """Removes earlier results and runs all parts in turn; returns 1 if one failed."""
    for name in ("gpu.json", "gpu.md"):
        (out / name).unlink(missing_ok=True)
    started, failed = time.perf_counter(), False
    for part, (limit, what) in PARTS.items():
        left = LIMIT - (time.perf_counter() - started)
        limit = LIMIT if tiny else min(limit, left)
        print(f"\n{part}, at most {limit:.0f} s: {what}", flush=True)
        ended = run_apart(part, out, device, tiny, limit)
        if ended:
            print(ended, flush=True)
            failed |= ended.startswith("FAILED")
            results = load_results(out)
            results["parts"].setdefault(part, parts.Report().content)["status"] = ended
            save_results(out, results)
    print(f"\n{time.perf_counter() - started:.0f} s in all; wrote gpu.json and gpu.md to {out}")
    return int(failed)


def parse_args(argv):
    p = Parser("experiments.gpu", __doc__)
    p.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu with --tiny (cuda)")
    p.add_argument("--tiny", action="store_true",
                   help="tiny models, to see in a minute that all of it runs (off)")
    p.add_argument("--part", choices=PARTS, help="this part alone, without a limit of time (all)")
    p.add_argument("--out", type=Path,
                   help="folder (experiments/results; with --tiny runs/gpu-tiny)")
    args = p.parse_args(argv)
    args.out = args.out or (Path("runs/gpu-tiny") if args.tiny else ROOT / "experiments/results")
    if args.device == "cpu" and not args.tiny:
        p.error("7B's shape takes hours on a CPU: give --tiny as well")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        p.error("torch finds no CUDA device here; --device cpu --tiny shows that all of it runs")
    return args


def run(args):
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        return run_part(args.part, args.out, args.device, args.tiny)
    with file_lock(args.out / "gpu.lock", args.out / "gpu.json"):
        return run_parts(args.out, args.device, args.tiny)


def main(argv=None):
    return run_script("experiments.gpu", parse_args, run, argv,
                      stopped="stopped; what was measured is in --out",
                      memory="this card is too small for this part")


if __name__ == "__main__":
    sys.exit(main())
