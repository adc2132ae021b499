"""The same tiny models, data and budget for every mechanism: one yardstick for what replaces attention."""
