"""Several tokens that attend, or are attended to, as one."""
