"""Language models: steering, marked spans, prompts and decoding."""
