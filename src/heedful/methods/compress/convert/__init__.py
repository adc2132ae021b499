"""Another attention, taught to a model that had its own."""
