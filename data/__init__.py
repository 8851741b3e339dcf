"""Data: records and batches, MMLU's questions, Dolly and MMLU prepared, the embedded world."""

from pathlib import Path

WORLD = Path(__file__).resolve().parent / "world"
# in it: base/, train.jsonl, val.jsonl, keep.jsonl (to measure forgetting), quiz/ (as MMLU)
QUIZ_SHOTS = 0  # solved examples before each question of the quiz, as in HydraLoRA's Table 1
