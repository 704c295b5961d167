"""Files, URLs, processes and errors: what all else stands on, and what knows no model."""
