"""Runs a plan over a host: sessions, calls, features, modulations, tokens, records."""
