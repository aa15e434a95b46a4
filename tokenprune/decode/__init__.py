"""What acts while tokens are generated: pruned heads, evicted cache entries, attention of a single step."""
