"""Any number of stacks on the same prompts, measured with one yardstick."""
