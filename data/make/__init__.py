"""What makes the shipped files of data/world/: corpus, quiz and base model (docs/world.md)."""
