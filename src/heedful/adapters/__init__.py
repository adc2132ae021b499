"""Model-specific code: how to get into the attention call of models that people already use."""
