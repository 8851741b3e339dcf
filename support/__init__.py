"""What makes the scripts safe and readable, and teaches nothing of the method."""
