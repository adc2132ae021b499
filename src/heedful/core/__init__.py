"""Values only: sites, calls, masks, statistics, methods and stacks. Nothing here knows a model."""
