"""What methods share and users of methods never see: blocks, budgets, chosen keys, rotary turns, searches for heads."""
