"""Runs stacks: the stages of one call, the backends, and the run that holds what they find."""
