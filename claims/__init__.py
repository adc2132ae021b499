"""The reproduction ledger: one small honest experiment for the direction of each paper's headline."""
