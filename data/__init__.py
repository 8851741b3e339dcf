"""Data: records and batches, MMLU's files, what prepares Dolly and MMLU, and the embedded world."""

from pathlib import Path

WORLD = Path(__file__).resolve().parent / "world"  # base/, train.jsonl, val.jsonl, quiz/
QUIZ_SHOTS = 0  # solved examples before a question of its quiz, as in HydraLoRA's Table 1
