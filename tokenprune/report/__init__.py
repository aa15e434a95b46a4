"""What was pruned and what it saved: measured, counted, compared, drawn."""
