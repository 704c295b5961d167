"""A trained ViT made cheaper: where it is redundant, which plan suits it, and its weights taken into that plan."""
