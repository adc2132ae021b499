"""What a model's attention does on a text, measured and left as it is."""
