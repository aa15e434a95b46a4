"""The seam: the only rooms that name what belongs to transformers, timm and accelerate."""
