"""Less computed, read or kept, by models as they are."""
