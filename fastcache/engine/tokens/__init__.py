"""Which tokens a partial step recomputes: scores, ages, choices."""
