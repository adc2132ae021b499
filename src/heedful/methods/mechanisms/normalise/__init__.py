"""What replaces softmax."""
