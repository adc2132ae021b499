"""What layers share, or hand on to one another, and layers that are put behind them."""
