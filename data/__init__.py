"""Records, batches, MMLU's questions; Dolly and MMLU prepared; the embedded world."""

from pathlib import Path

WORLD = Path(__file__).resolve().parent / "world"
# in it: base/, train.jsonl, val.jsonl, keep.jsonl (to measure forgetting), quiz/
QUIZ_SHOTS = 0  # solved examples before a question, as in HydraLoRA's Table 1
