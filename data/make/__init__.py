"""What makes the files of data/world/: corpus, quiz and base model (docs/world.md)."""
